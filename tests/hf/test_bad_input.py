"""Bad input is a clear error, and what it was given to stays as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.hf_families import VOCABULARY, made, tokens
from torch import Tensor

from memtrans.hf import ModelMemory, add_memory
from memtrans.memory.ring import Ring

SIZES: dict[str, Any] = {"max_memories": 100, "k": 8, "segment": 16}
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"layers": [0, 2]}, r"layers must be among the attention layers \[0, 1\], got \[2\]"),
    ({"layers": [0, -1]}, r"layers must be among the attention layers \[0, 1\], got \[-1\]"),
    ({"layers": [1, 1]}, r"layers must be .* none twice, got \[1, 1\]"),
    ({"layers": []}, r"layers must be at least one number"),
    ({"layers": "some"}, "layers must be 'all' or numbers"),
    ({"layers": [0.5]}, "layers must be an integer, got 0.5"),
    ({"max_memories": 0}, "max_memories must be at least 1, got 0"),
    ({"k": 0}, "k must be at least 1, got 0"),
    ({"distance": "start"}, "distance must be 'previous' or a number of positions, got 'start'"),
    ({"distance": -1}, "distance must be at least 0, got -1"),
    ({"segment": 65}, "segment must be at most half of the model's 128 positions, got 65"),
    ({"segment": 16, "distance": 113}, "segment must be .* keys that are stored 113 further back"),
    ({"sink": 16}, "sink must be less than segment=16, got 16"),
    ({"combine": "sum"}, "combine must be one of softmax, gate, got 'sum'"),
    ({"offset": "none"}, "offset must be 'auto' or a number, got 'none'"),
    ({"offset": float("nan")}, "offset must be"),
    ({"dtype": torch.int8}, "dtype must be one of"),
    ({"spare": -1}, "spare must be at least 0, got -1"),
    ({"backend": "gpu"}, "backend must be one of"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=[str(given) for given, _ in WRONG])
def test_an_argument_that_will_not_do_changes_nothing(arguments: dict[str, Any], message: str) -> None:
    model = made("llama")
    configurations = [layer.self_attn.config for layer in model.model.layers]
    with pytest.raises((ValueError, TypeError), match=message):
        add_memory(model, **{**SIZES, **arguments})
    assert [layer.self_attn.config for layer in model.model.layers] == configurations
    assert all(layer.self_attn.config is model.config for layer in model.model.layers)
    assert not any("memtrans" in name for name, _ in model.named_modules())


@pytest.mark.parametrize("layers", ["all", [0]])
def test_a_model_has_one_memory_at_most(layers: Any) -> None:
    model = made("llama")
    first = add_memory(model, layers=[1], **SIZES)
    with pytest.raises(ValueError, match=r"got \[1\], which have one: call remove"):
        add_memory(model, layers=layers, **SIZES)
    assert not hasattr(model.model.layers[0].self_attn, "memtrans")
    first.remove()
    add_memory(model, layers=layers, **SIZES)


AFTER_REMOVAL: dict[str, Any] = {
    "read": lambda memory: memory.read(tokens()),
    "writing": lambda memory: memory.writing().__enter__(),
    "training": lambda memory: memory.training().__enter__(),
    "tracing": lambda memory: memory.tracing().__enter__(),
    "reset": lambda memory: memory.reset(2),
    "parameters": lambda memory: memory.parameters(),
    "save": lambda memory: memory.save("nowhere"),
    "load": lambda memory: memory.load("nowhere"),
}


def test_a_memory_that_was_removed_does_nothing_in_silence() -> None:
    model = made("llama")
    removed = add_memory(model, **SIZES)
    removed.remove()
    memory = add_memory(model, **SIZES)
    for name, use in AFTER_REMOVAL.items():
        with pytest.raises(ValueError, match=r"memory must be in its model, got one that remove\(\) took out"):
            use(removed)
        assert memory.lengths.tolist() == [], name
    removed.remove()
    memory.read(tokens())
    assert memory.lengths.tolist() == [22, 22]


def test_reading_inside_off_is_refused() -> None:
    memory = add_memory(made("llama"), **SIZES)
    with memory.off(), pytest.raises(ValueError, match=r"read must be called outside off\(\)"):
        memory.read(tokens())


def test_a_pass_of_nothing_gets_the_error_of_the_model() -> None:
    model = made("llama")
    memory = add_memory(model, **SIZES)
    memory.read(tokens())
    for called in (model, model.model):
        with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
            called()


def test_what_is_no_pretrained_model_is_refused() -> None:
    with pytest.raises(TypeError, match="model must be a transformers model, got Linear"):
        add_memory(torch.nn.Linear(1, 1))


def test_a_batch_of_other_documents_is_refused() -> None:
    model = made("llama")
    memory = add_memory(model, **SIZES)
    memory.read(tokens())
    with pytest.raises(ValueError, match=r"1 rows for each of the 2 documents .* got 3 rows: reset"):
        model(tokens(batch=3))
    assert memory.lengths.tolist() == [22, 22]
    memory.clear_rows(torch.tensor([True, True]))
    memory.read(tokens(batch=3))  # nothing is lost now
    assert memory.lengths.tolist() == [22, 22, 22]


def test_holes_in_a_mask_are_refused_before_anything_is_stored() -> None:
    model = made("llama")
    memory, mask = add_memory(model, **SIZES), torch.ones(2, 16, dtype=torch.int64)
    mask[1, 4] = 0
    with memory.writing(), pytest.raises(ValueError, match=r"got holes in rows \[1\]"):
        model(tokens(length=16), attention_mask=mask)
    with pytest.raises(ValueError, match=r"got holes in rows \[1\]"):
        memory.read(tokens(length=16), mask)
    assert memory.lengths.sum() == 0


@pytest.mark.parametrize(
    ("ids", "mask", "kind", "message"),
    [
        ({"input_ids": [[1]]}, None, TypeError, "ids must be a torch.Tensor, got dict"),
        ([[1, 2, 3]], None, TypeError, "ids must be a torch.Tensor, got list"),  # of a tokenizer without return_tensors
        (torch.ones(1, 3), None, ValueError, "ids must be integers of shape"),
        (torch.tensor([1, 2, 3]), None, ValueError, "ids must be integers of shape"),
        (torch.tensor([[1, 999]]), None, IndexError, "ids must be token ids in"),
        (torch.tensor([[1, 2]]), [[1, 1]], TypeError, "attention_mask must be a torch.Tensor, got list"),
        (torch.tensor([[1, 2]]), torch.ones(1, 3), ValueError, "attention_mask must be"),
    ],
)
def test_what_is_no_text_is_refused(ids: Any, mask: Any, kind: type[Exception], message: str) -> None:
    memory = add_memory(made("llama"), max_memories=20, segment=8)
    with pytest.raises(kind, match=message):
        memory.read(ids, mask)
    assert memory.lengths.tolist() == []


def test_a_writing_pass_is_a_segment_without_a_cache() -> None:
    model = made("llama")
    memory = add_memory(model, **SIZES)
    cache = model(tokens(length=8), use_cache=True).past_key_values
    with memory.writing():
        with pytest.raises(ValueError, match="at most segment=16 tokens, got 17: read"):
            model(tokens(length=17))
        with pytest.raises(ValueError, match="must have no cache"):
            model(tokens(length=8), past_key_values=cache)
    with pytest.raises(ValueError, match=r"new_document must be given inside writing\(\) or training\(\) alone"):
        model(tokens(length=8), new_document=torch.tensor([True, False]))
    assert memory.lengths.tolist() == []


def test_a_layer_that_is_not_handed_the_memory_is_an_error() -> None:
    model = made("llama")
    memory = add_memory(model, **SIZES)
    memory.read(tokens())
    layer = model.model.layers[1]
    handed_on = layer.forward
    layer.forward = lambda *args, **kwargs: handed_on(*args, **{**kwargs, "memtrans_state": None})
    with pytest.raises(RuntimeError, match=r"layers \[1\] of LlamaModel were not handed the memory"):
        model(tokens())


def held(memory: ModelMemory) -> list[Any]:
    """What every layer holds, and the ids."""
    assert memory._entries is not None
    states = [layer.state_dict() for layer in memory._entries.memories.values()]
    layers = [(state["keys"], state["lengths"].tolist()) for state in states]
    return [memory.ids(0).tolist(), memory._entries.read.tolist(), *layers]


def outside_the_vocabulary(model: Any, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    ids = tokens(length=16, seed=1).clone()
    ids[0, 5] = VOCABULARY
    return ids


def interrupted_between_layers(model: Any, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(model.model.layers[1].self_attn, "forward", interrupt)
    return tokens(length=16, seed=1)


def no_room_in_the_second_layer(model: Any, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    enough, asked = Ring.make_room, list[int]()

    def make_room(ring: Ring, ticket: Tensor, length: int) -> None:
        asked.append(length)
        if len(asked) == 2:
            raise MemoryError
        enough(ring, ticket, length)

    monkeypatch.setattr(Ring, "make_room", make_room)
    return tokens(length=16, seed=1)


@pytest.mark.parametrize(
    "fails", [outside_the_vocabulary, interrupted_between_layers, no_room_in_the_second_layer], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("max_memories", [100, 20])
def test_a_pass_that_fails_adds_nothing_to_any_layer(fails: Any, max_memories: int) -> None:
    model = made("llama")
    memory = add_memory(model, **{**SIZES, "max_memories": max_memories})
    memory.read(tokens(length=30))
    before = held(memory)
    with pytest.MonkeyPatch.context() as patched:
        ids = fails(model, patched)
        with pytest.raises((IndexError, KeyboardInterrupt, MemoryError)):
            memory.read(ids)
    torch.testing.assert_close(held(memory), before, rtol=0.0, atol=0.0)
    memory.read(tokens(length=16, seed=2))
    fresh = add_memory(made("llama"), **{**SIZES, "max_memories": max_memories})
    fresh.read(tokens(length=30))
    fresh.read(tokens(length=16, seed=2))
    torch.testing.assert_close(held(memory), held(fresh), rtol=0.0, atol=0.0)
