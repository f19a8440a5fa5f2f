"""Memories of pretrained models on a GPU: what replays a graph does what passes launched one by one do."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from helpers.byte_tokenizers import bytes_tokenizer
from helpers.checks import GPU_MODEL, assert_close
from helpers.hf_families import made, tokens
from transformers import StaticCache

from memtrans import cuda_graph
from memtrans.hf import add_memory, reading
from memtrans.hf.calibrate import Plan, Step, fill
from memtrans.hf.lessons import Course

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]


@pytest.mark.parametrize("search", [False, True])
@torch.no_grad()
def test_reading_by_replays_stores_what_passes_do(search: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = tokens(length=700).to("cuda")  # 43 segments of 16, and what is left
    held = []
    for worth in (1, 10**6):
        monkeypatch.setattr(reading, "WORTH", worth)
        memory = add_memory(made("llama", head_dim=32).to("cuda"), max_memories=2000, k=8, segment=16)
        memory.read(ids, search=search)
        assert memory._entries is not None
        assert memory.lengths.tolist() == [700 - 44] * 2
        held.append((memory.ids(1), memory._entries.memories[1].state_dict()["keys"]))
    assert torch.equal(held[0][0], held[1][0])
    assert_close(held[0][1], held[1][1], GPU_MODEL, "keys")


@pytest.mark.parametrize("form", ["offset", "gain", "mix", "across", "value", "next"])
def test_a_step_that_is_replayed_learns_what_steps_one_by_one_learn(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "It was a bright cold day in the hills, and all the clocks were being wound again. " * 60
    learned, captured = [], []
    for first in (2, 10**6):
        monkeypatch.setattr(cuda_graph, "EAGER_CALLS", first)
        model = made("llama", vocab_size=260, head_dim=32).to("cuda").requires_grad_(False)
        memory = add_memory(model, max_memories=1500, k=8, segment=16)
        with memory.learning(form):
            memory.reset(2)
        for parameter in memory.parameters():
            parameter.requires_grad_(True)
        course = Course.of(memory, bytes_tokenizer(), [text], [400, 1200], 8, 2)
        step = Step(model, memory, course, Plan(24, 2, 0.05, 2.0, 0))
        for seed in (1, 2):
            lesson = course.lesson(seed).to(model.device)
            with memory.reading_again():
                fill(memory, lesson)
            step.take_up(lesson, lesson.draw(12, course.asked, course.sizes, seed))
            for number in range(12):
                step.run(1.0 - number / 24)
        captured.append([replay.captured for replay in step.replays])
        learned.append([parameter.detach().clone() for parameter in memory.parameters()])
    assert captured == [[True, True], [False, False]]
    for mine, its in zip(*learned, strict=True):
        assert_close(mine, its, GPU_MODEL)


@torch.no_grad()
def test_a_token_that_is_replayed_follows_its_place_the_memory_and_what_was_learned() -> None:
    device = torch.device("cuda")
    model = made("llama", head_dim=32).to(device)
    memory = add_memory(model, max_memories=2000, k=8, segment=16)
    for layer in memory.layers.values():
        layer.learned.learn_to_ask("mix")
    memory.read(tokens(1, length=400).to(device))
    cache = StaticCache(config=model.config, max_cache_len=16)
    model(tokens(1, length=9, seed=2).to(device), past_key_values=cache, use_cache=True)
    ids, place = tokens(1, length=1, seed=4).to(device), torch.full((1, 1), 9, device=device)
    logits = torch.zeros(1, 1, model.config.vocab_size, device=device)

    def token() -> None:
        mask = (torch.arange(16, device=device) <= place)[:, None, None]
        said = {"position_ids": place, "attention_mask": mask, "past_key_values": cache, "use_cache": True}
        logits.copy_(model(ids, **said).logits)
        for layer in cache.layers:  # the next one is written into the same place
            layer.cumulative_length.fill_(9)

    replay = cuda_graph.Replay(token, model.device)
    for _ in range(cuda_graph.EAGER_CALLS + 1):
        replay()
    assert replay.captured
    for change in (
        lambda: place.zero_(),  # the first token of all looks at no memory
        lambda: place.fill_(9),
        lambda: memory.read(tokens(1, length=300, seed=5).to(device)),
        lambda: [parameter.normal_(std=0.3) for parameter in memory.parameters()],
        lambda: memory.clear_rows(torch.ones(1, dtype=torch.bool, device=device)),
    ):
        before = logits.clone()
        change()
        replay()
        replayed = logits.clone()
        token()
        assert_close(replayed, logits, GPU_MODEL, "logits")
        assert not torch.allclose(replayed, before, atol=1e-3)


@torch.no_grad()
def test_what_is_held_follows_a_model_that_moves() -> None:
    model, question = made("llama", head_dim=32), tokens(length=6, seed=2)
    memory = add_memory(model, max_memories=100, k=8, segment=16)
    memory.read(tokens(length=30))
    here = model(question).logits
    there = model.to("cuda")(question.to("cuda")).logits
    assert_close(there.cpu(), here, GPU_MODEL, "logits")
    memory.read(tokens(length=30).to("cuda"))
    assert memory.lengths.tolist() == [56, 56]
    assert memory.ids(0).tolist() == tokens(length=30)[0, [*range(1, 16), *range(17, 30)]].tolist() * 2
