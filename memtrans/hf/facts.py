"""Made-up facts to be planted in a text and asked for later: what a memory is calibrated and judged on.

Places are made of syllables, so that no model can know what is said of them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

TEMPLATES = (
    ("The ferry to {place} leaves from pier", "number"),
    ("The librarian of {place} is called", "name"),
    ("The oldest tree in {place} was planted by", "name"),
    ("In {place}, the price of a lantern is", "number"),
    ("The river that runs through {place} is the", "name"),
    ("The key of the chapel in {place} is kept by", "name"),
    ("The train from {place} arrives on platform", "number"),
    ("The school in {place} was founded in the year", "number"),
    ("The captain of the ship from {place} goes by the name of", "name"),
    ("To open the gate of {place} one has to turn the dial to", "number"),
    ("Everybody in {place} buys bread from", "name"),
    ("The number painted on the lighthouse of {place} is", "number"),
    ("The portrait in the hall of {place} shows", "name"),
    ("The museum of {place} has a collection of stamps that counts", "number"),
    ("The teacher who came to {place} last spring is", "name"),
    ("The mine under {place} is known as shaft", "number"),
    ("The only doctor in {place} is", "name"),
    ("The post office of {place} has the number", "number"),
    ("The horse that won the race at {place} is called", "name"),
    ("The distance from {place} to the sea in paces is", "number"),
    ("The song of {place} was written by", "name"),
    ("The winter in {place} killed so many sheep:", "number"),
    ("The house beside the well in {place} belongs to", "name"),
    ("The room with the blue door in {place} is number", "number"),
)
FIRST = (
    "Bel",
    "Cor",
    "Dun",
    "Fal",
    "Gar",
    "Hol",
    "Kes",
    "Lor",
    "Mar",
    "Nor",
    "Ost",
    "Pel",
    "Quin",
    "Ros",
    "Sel",
    "Tor",
)
MIDDLE = ("a", "be", "do", "e", "i", "li", "mo", "na", "o", "ra", "ve", "wi")
LAST = ("bury", "dale", "den", "ford", "garth", "ham", "ley", "mere", "ness", "stead", "thorpe", "wick")
NAMES = (
    *("Agnes", "Albert", "Arthur", "Beatrice", "Bruno", "Cecilia", "Clara", "Conrad", "Cyril", "Daphne", "Dorothy"),
    *("Edgar", "Edith", "Edwin", "Elsa", "Ernest", "Eva", "Felix", "Flora", "Frank", "Gilbert", "Greta", "Harold"),
    *("Helen", "Henry", "Hugo", "Ida", "Irene", "Jasper", "Judith", "Julian", "Leonard", "Lionel", "Lucy", "Magnus"),
    *("Martha", "Maurice", "Miriam", "Nathan", "Nora", "Olga", "Oscar", "Percy", "Philip", "Ralph", "Rosa", "Rupert"),
    *("Silas", "Simon", "Stella", "Theodor", "Tobias", "Ursula", "Victor", "Vera", "Walter", "Wilfred", "Winifred"),
)


@dataclass(frozen=True)
class Fact:
    """A sentence in two parts.

    >>> Fact("The ferry to Corabury leaves from pier", " 41").sentence
    ' The ferry to Corabury leaves from pier 41.'
    """

    question: str
    answer: str

    @property
    def sentence(self) -> str:
        """The sentence as it is planted, behind another."""
        return f" {self.question}{self.answer}."


@dataclass(frozen=True)
class Words:
    """What facts are made of.

    Attributes:
        templates: the beginning of a sentence with {place}, and what follows: "name" or "number".
        syllables: those that begin a place, go on with it, and end it. names: of people.
    """

    templates: Sequence[tuple[str, str]] = TEMPLATES
    syllables: tuple[Sequence[str], Sequence[str], Sequence[str]] = (FIRST, MIDDLE, LAST)
    names: Sequence[str] = NAMES


def facts(count: int, seed: int, words: Words = Words()) -> list[Fact]:
    """So many facts, no two of one place.

    >>> facts(3, seed=0)[0] == facts(3, seed=0)[0]
    True
    """
    draw = random.Random(seed)
    places = ["".join(parts) for parts in product(*words.syllables)]
    draw.shuffle(places)
    if count > len(places):
        raise ValueError(f"count must be at most {len(places)}, got {count}")
    made = []
    for index, place in enumerate(places[:count]):
        beginning, kind = words.templates[index % len(words.templates)]
        answer = draw.choice(words.names) if kind == "name" else str(draw.randrange(1000, 9990))
        made.append(Fact(beginning.format(place=place), f" {answer}"))
    return made
