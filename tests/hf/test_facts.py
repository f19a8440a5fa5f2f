"""Facts are of the words that are given, and words that no facts can be made of are refused."""

from __future__ import annotations

import random
from typing import Any

import pytest

from memtrans.hf import Words
from memtrans.hf.facts import facts

WORDS: dict[str, Any] = {
    "templates": [("Die Brücke in {place} ist von", "year"), ("In {place} heißt der Müller {sic}", "name")],
    "answers": {"year": range(1200, 1300), "name": ["Konrad"]},
    "syllables": [["Bel", "Dorn"], ["en", "er"], ["bach", "dorf"]],
}


def test_facts_by_default_stay_what_they_were() -> None:
    made = [(fact.question, fact.answer) for fact in facts(2, seed=0)]
    assert made == [
        ("The books of Garwistead list the library under", " 8231"),
        ("At Garbebury, they say, no shepherd was ever better than", " Arthur"),
    ]
    assert [fact.answer for fact in facts(96, seed=7, alike=8)[:4]] == [" Henry", " 7163", " 4839", " 8393"]


def test_a_fact_is_a_template_with_a_place_and_an_answer_of_its_kind() -> None:
    made = facts(8, 0, Words(**WORDS))
    years = [fact for fact in made if fact.question.startswith("Die Brücke in ")]
    names = [fact for fact in made if fact.question.endswith(" heißt der Müller {sic}")]  # braces that mean nothing
    assert len(years) == len(names) == 4
    assert all(1200 <= int(fact.answer) < 1300 for fact in years)
    assert {fact.answer for fact in names} == {" Konrad"}
    assert facts(8, 0, Words(**WORDS)) == made != facts(8, 1, Words(**WORDS))


def test_no_two_facts_are_of_one_place_though_it_is_made_in_two_ways() -> None:
    words = Words(syllables=[["Ab", "Abe"], ["eld", "ld"], ["on"]])
    assert words.room == 3
    assert sorted(words.places(random.Random(0))) == ["Abeeldon", "Abeldon", "Abldon"]
    with pytest.raises(ValueError, match="count must be at most 3, got 4"):
        facts(4, 0, words)


def test_a_place_is_put_into_what_may_stand_around_it() -> None:
    words = Words(**WORDS, around=["Alt-{}", "{} am See"])
    places = words.places(random.Random(0))
    assert {place.replace("Alt-", "").replace(" am See", "") for place in places} == set(
        Words(**WORDS).places(random.Random(0))
    )
    assert {place.startswith("Alt-") for place in places} == {True, False}
    assert all(place.startswith("Alt-") != place.endswith(" am See") for place in places)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"templates": []}, r"templates must not be empty, got \[\]"),
        ({"templates": "{place}"}, "templates must be a list, got '{place}'"),
        (
            {"templates": [("The mill of", "year")]},
            r"templates must be pairs of a text with {place} and a kind, got \('The mill of', 'year'\)",
        ),
        ({"templates": ["The mill of {place}"]}, "templates must be pairs .*, got 'The mill of {place}'"),
        ({"templates": [5]}, "templates must be pairs .*, got 5"),
        (
            {"templates": [("{place} has", "mills")]},
            r"templates must be of kinds that have answers \(year, name\), got \('{place} has', 'mills'\)",
        ),
        ({"answers": ["Ida"]}, r"answers must be lists by kind, got \['Ida'\]"),
        ({"answers": {"name": "Ida"}}, r"answers\['name'\] must be a list, got 'Ida'"),
        ({"answers": {"name": []}}, r"answers\['name'\] must not be empty, got \[\]"),
        ({"syllables": []}, r"syllables must not be empty, got \[\]"),
        ({"syllables": ["Bel", "dale"]}, r"syllables\[0\] must be a list, got 'Bel'"),
        ({"syllables": [["Bel"], []]}, r"syllables\[1\] must not be empty"),
        ({"syllables": [["Bel", 5]]}, r"syllables\[0\] must be of str alone, got 5"),
        ({"around": ["{}", "Upper"]}, "around must be texts with {}, got 'Upper'"),
        ({"around": [None]}, "around must be of str alone, got None"),
    ],
)
def test_words_that_no_facts_can_be_made_of_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        Words(**{**WORDS, **changed})
