"""The recall task: each answer is in the text once, as far away as the question says."""

from __future__ import annotations

import re

import pytest
import torch

from memtrans.data.recall import FAR, NAME_LENGTH, RecallDocuments, RecallTask

ITEM_LENGTH = NAME_LENGTH + 3  # a name, '=' or '?', a value, ';'
TASK = RecallTask()


def text_of(document) -> str:
    return bytes(document.content.tolist()).decode()


@pytest.mark.parametrize("number", range(5))
def test_a_document_is_statements_and_questions_and_a_fact_is_asked_for_at_most_once(number):
    text = text_of(RecallDocuments(0, TASK).document(number))
    items = re.findall(r"([a-z]{2})([=?])([a-z]);", text)
    assert len(items) * ITEM_LENGTH == len(text)
    facts = [(name, value) for name, kind, value in items if kind == "="]
    asked = [(name, value) for name, kind, value in items if kind == "?"]
    assert len({name for name, _ in facts}) == len(facts)
    assert len({name for name, _ in asked}) == len(asked)
    assert set(asked) <= set(facts)


@pytest.mark.parametrize("number", range(5))
def test_a_distance_leads_from_the_question_back_to_the_statement(number):
    document = RecallDocuments(0, TASK).document(number)
    text = text_of(document)
    places = document.distances.nonzero().flatten().tolist()
    assert places
    for place in places:
        name, answer = text[place - NAME_LENGTH : place], text[place + 1]
        assert text[place] == "?"
        stated = place - NAME_LENGTH - int(document.distances[place])
        assert text[stated : stated + NAME_LENGTH + 2] == f"{name}={answer}"


def test_a_good_part_of_the_questions_is_far():
    distances = torch.cat([RecallDocuments(1, TASK).document(number).distances for number in range(10)])
    asked = distances[distances > 0]
    assert 0.2 < (asked >= FAR).float().mean() < 0.6
    assert asked.max() < TASK.far[1] + 100


def test_the_first_documents_are_short_and_ask_soon():
    documents = RecallDocuments(0, RecallTask(near_documents=3))
    for number in range(3):
        document = documents.document(number)
        assert len(document) <= TASK.near_length + ITEM_LENGTH
        assert document.distances.max() < 2 * TASK.near[1]
    assert documents.document(3).distances.max() >= FAR


def test_seed_and_number_determine_a_document():
    assert text_of(RecallDocuments(0, TASK).document(4)) == text_of(RecallDocuments(0, TASK).document(4))
    others = {text_of(RecallDocuments(seed, TASK).document(number)) for seed in (0, 1, "held out") for number in (0, 1)}
    assert len(others) == 6
