"""Made-up facts to be planted in a text and asked for later: what a memory is calibrated and judged on.

Places are made of syllables, so that no model can know what is said of them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

_OF_PEOPLE = (
    "The {one} of {{place}} is called",
    "In {{place}} the {one} goes by the name of",
    "The {one} who lives in {{place}} signs as",
    "Whoever needs a {one} in {{place}} asks for",
    "The new {one} in {{place}} was introduced as",
    "At {{place}}, they say, no {one} was ever better than",
    "{{place}} owes much to its {one},",
    "The letter from {{place}} was written by a {one} with the name of",
)
_PEOPLE = (
    *("librarian", "ferryman", "captain", "teacher", "doctor", "miller", "baker", "judge", "painter", "shepherd"),
    *("watchmaker", "lawyer", "fisherman", "tailor", "organist", "pilot", "cook", "chemist", "carpenter", "poet"),
)
_OF_THINGS = (
    "The {one} in {{place}} was built in the year",
    "The {one} of {{place}} has the number",
    "The price of a {one} in {{place}} is",
    "From {{place}} to the {one} it takes so many steps:",
    "{{place}} paid for its {one} a sum of",
    "On the map of {{place}} the {one} is marked with",
    "The books of {{place}} list the {one} under",
    "To open the {one} at {{place}} one has to dial",
)
_THINGS = (
    *("school", "lighthouse", "ferry", "mine", "museum", "post office", "well", "gate", "market", "chapel"),
    *("train", "windmill", "library", "harbour", "statue", "garden", "theatre", "prison", "stable", "observatory"),
)
TEMPLATES = (
    *((form.format(one=one), "name") for form in _OF_PEOPLE for one in _PEOPLE),
    *((form.format(one=one), "number") for form in _OF_THINGS for one in _THINGS),
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

    >>> Fact("The well of Corabury has the number", " 41").sentence
    ' The well of Corabury has the number 41.'
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


def facts(count: int, seed: int, words: Words = Words(), alike: int = 1) -> list[Fact]:
    """So many facts, no two of one place. alike: how many at least are of one template, so that the place decides.

    >>> facts(3, seed=0)[0] == facts(3, seed=0)[0]
    True
    """
    draw = random.Random(seed)
    places = ["".join(parts) for parts in product(*words.syllables)]
    draw.shuffle(places)
    if count > len(places):
        raise ValueError(f"count must be at most {len(places)}, got {count}")
    templates = list(words.templates)
    if count < alike * len(templates):
        templates = draw.sample(templates, -(-count // alike))
    made = []
    for index, place in enumerate(places[:count]):
        beginning, kind = templates[index % len(templates)]
        answer = draw.choice(words.names) if kind == "name" else str(draw.randrange(1000, 9990))
        made.append(Fact(beginning.format(place=place), f" {answer}"))
    return made
