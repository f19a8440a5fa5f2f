"""What `benchmarks/hf_judge.py` judges a memory by is nothing that a calibration is made of."""

from __future__ import annotations

import re
from collections.abc import Iterable

import pytest
from helpers.scripts import benchmark_script

from memtrans.hf import facts
from memtrans.hf.facts import Words

HF_JUDGE = benchmark_script("hf_judge")
OWN_ONES = (*facts._PEOPLE, *facts._THINGS)
JUDGED_ONES = (*HF_JUDGE.PEOPLE, *HF_JUDGE.THINGS)


@pytest.fixture(params=["facts", "alike"])
def judged(request: pytest.FixtureRequest) -> Words:
    found: Words = HF_JUDGE.KINDS[request.param]
    return found


def forms(words: Words, ones: Iterable[str]) -> set[str]:
    """The sentences, whoever and whatever they are of."""
    any_one = re.compile(rf"\b({'|'.join(ones)})\b")
    return {any_one.sub("{one}", template) for template, _ in words.templates}


def test_no_name_and_no_part_of_a_place_is_one_of_a_calibration(judged: Words) -> None:
    own = Words()
    assert not set(judged.answers["name"]) & set(own.answers["name"])
    for its, mine in zip(judged.syllables, own.syllables, strict=True):
        assert not set(its) & set(mine)


def test_no_sentence_is_one_of_a_calibration(judged: Words) -> None:
    own = forms(Words(), OWN_ONES)
    assert len(own) == 16 and not own & forms(judged, JUDGED_ONES)
    assert not set(OWN_ONES) & set(JUDGED_ONES)
