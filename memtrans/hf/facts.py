"""Made-up facts to be planted in a text and asked for later: what a memory is calibrated and judged on.

Places are made of syllables, so that no model can know what is said of them.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

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
ANSWERS: Mapping[str, Sequence[Any]] = {"name": NAMES, "number": range(1000, 9990)}


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
    """What made-up facts are of: sentences, places and answers. Those of a calibration, in English, by default.

    A fact is a sentence behind another: a space, a template with a place in it, a space, an answer and a full stop.

    Attributes:
        templates: pairs, the beginning of a sentence with {place} in it and the kind of answer that ends it.
        answers: of each kind, texts or numbers; one of them by chance. Default: "name" and "number".
        syllables: lists of them; a place is one of each, in this order. No two facts are of one place.
        around: a place is put into one of these by chance, in place of {}.

    Raises:
        ValueError, TypeError: a template without {place} or with a kind that has no answers, a list that is empty or a
            text, something around a place that has no {}.

    >>> words = Words(
    ...     templates=[("Der Müller von {place} heißt", "name"), ("Die Brücke in {place} ist von", "year")],
    ...     answers={"name": ["Agnes", "Konrad"], "year": range(1200, 1900)},
    ...     syllables=[["Bel", "Dorn", "Kalt"], ["en", "er", "in"], ["bach", "dorf", "hausen"]],
    ... )
    >>> words.room
    27
    """

    templates: Sequence[tuple[str, str]] = TEMPLATES
    answers: Mapping[str, Sequence[Any]] = field(default_factory=lambda: ANSWERS)
    syllables: Sequence[Sequence[str]] = (FIRST, MIDDLE, LAST)
    around: Sequence[str] = ("{}",)

    def __post_init__(self) -> None:
        if not isinstance(self.answers, Mapping):
            raise TypeError(f"answers must be lists by kind, got {self.answers!r}")
        for kind, answers in self.answers.items():
            _check_list(f"answers[{kind!r}]", answers)
        _check_list("templates", self.templates)
        for template in self.templates:
            if not isinstance(template, tuple | list) or len(template) != 2 or "{place}" not in str(template[0]):
                raise ValueError(f"templates must be pairs of a text with {{place}} and a kind, got {template!r}")
            if template[1] not in self.answers:
                kinds = ", ".join(map(str, self.answers))
                raise ValueError(f"templates must be of kinds that have answers ({kinds}), got {template!r}")
        _check_list("syllables", self.syllables)
        for at, syllables in enumerate(self.syllables):
            _check_list(f"syllables[{at}]", syllables, str)
        _check_list("around", self.around, str)
        for text in self.around:
            if "{}" not in text:
                raise ValueError(f"around must be texts with {{}}, got {text!r}")

    @property
    def room(self) -> int:
        """How many places there are, and so facts."""
        return len(self._places())

    def _places(self) -> list[str]:
        return list(dict.fromkeys("".join(parts) for parts in product(*self.syllables)))

    def places(self, draw: random.Random) -> list[str]:
        """All of them, none twice, in an order by chance."""
        places = self._places()
        draw.shuffle(places)
        if tuple(self.around) == ("{}",):
            return places
        return [draw.choice(self.around).replace("{}", place) for place in places]


def _check_list(name: str, value: Any, of: type = object) -> None:
    """Raises TypeError unless it is a list or the like, of this type, ValueError if it is empty."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"{name} must be a list, got {value!r}")
    if not value:
        raise ValueError(f"{name} must not be empty, got {value!r}")
    if wrong := [one for one in value if not isinstance(one, of)]:
        raise TypeError(f"{name} must be of {of.__name__} alone, got {wrong[0]!r}")


def facts(count: int, seed: int, words: Words = Words(), alike: int = 1) -> list[Fact]:
    """So many facts, no two of one place. alike: how many at least are of one template, so that the place decides.

    >>> facts(3, seed=0)[0] == facts(3, seed=0)[0]
    True
    """
    draw = random.Random(seed)
    places = words.places(draw)
    if count > len(places):
        raise ValueError(f"count must be at most {len(places)}, got {count}")
    templates = list(words.templates)
    if count < alike * len(templates):
        templates = draw.sample(templates, -(-count // alike))
    made = []
    for index, place in enumerate(places[:count]):
        beginning, kind = templates[index % len(templates)]
        answer = draw.choice(words.answers[kind])
        made.append(Fact(beginning.replace("{place}", place), f" {answer}"))
    return made
