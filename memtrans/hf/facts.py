"""Made-up facts to be planted in a text and asked for later: what a memory is calibrated and judged on.

Places are made of syllables, so that no model can know what is said of them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

TEMPLATES = (
    ("The ferry to {place} leaves from pier", "number"),
    ("The librarian of {place} is called", "name"),
    ("The oldest tree in {place} was planted by", "name"),
    ("In {place}, the price of a lantern is", "number"),
    ("The river that runs through {place} is the", "name"),
    ("The key of the chapel in {place} is kept by", "name"),
    ("The train from {place} arrives on platform", "number"),
    ("The school in {place} was founded in the year", "number"),
)
_FIRST = (
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
_MIDDLE = ("a", "be", "do", "e", "i", "li", "mo", "na", "o", "ra", "ve", "wi")
_LAST = ("bury", "dale", "den", "ford", "garth", "ham", "ley", "mere", "ness", "stead", "thorpe", "wick")
_NAMES = (
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


def facts(count: int, seed: int, templates: Sequence[tuple[str, str]] = TEMPLATES) -> list[Fact]:
    """So many facts, no two of one place.

    templates: the beginning of a sentence with {place}, and what follows: "name" or "number".

    >>> facts(3, seed=0)[0] == facts(3, seed=0)[0]
    True
    """
    draw = random.Random(seed)
    places = [first + middle + last for first in _FIRST for middle in _MIDDLE for last in _LAST]
    draw.shuffle(places)
    if count > len(places):
        raise ValueError(f"count must be at most {len(places)}, got {count}")
    made = []
    for index, place in enumerate(places[:count]):
        beginning, kind = templates[index % len(templates)]
        answer = draw.choice(_NAMES) if kind == "name" else str(draw.randrange(1000, 9990))
        made.append(Fact(beginning.format(place=place), f" {answer}"))
    return made
