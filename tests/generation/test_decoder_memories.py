"""A decoder and its memories: whose documents its rows are, and what else happens to the memories meanwhile."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers.checks import SAME_GRAPH, assert_close
from helpers.devices import DEVICE, seeded

from memtrans import KNNMemory, KNNMemoryList, MemorizingTransformer, generate
from memtrans.generation.decoder import Decoder
from memtrans.generation.generate import stream
from memtrans.generation.sampling import Sampling

pytestmark = pytest.mark.device

SEGMENT, VOCABULARY, DOCUMENTS = 8, 30, 4


def build(**options) -> MemorizingTransformer:
    torch.manual_seed(0)
    sizes = {"num_tokens": VOCABULARY, "dim": 16, "depth": 3, "dim_head": 8, "heads": 4, "max_knn_memories": 40}
    return MemorizingTransformer(**sizes, num_retrieved_memories=4, memorizing_layers=(2, 3), **options).eval()


def text(length: int, seed: int) -> torch.Tensor:
    return torch.randint(VOCABULARY, (length,), generator=seeded(seed), device=DEVICE)


def memories_of(model: MemorizingTransformer, batch: int, **options) -> KNNMemoryList:
    return model.create_knn_memories(batch_size=batch, device=DEVICE, dtype=torch.float32, **options)


def filled(model: MemorizingTransformer) -> KNNMemoryList:
    """Memories of documents that said different things."""
    memories = memories_of(model, DOCUMENTS, spare=SEGMENT)
    tokens = torch.stack([text(2 * SEGMENT, seed) for seed in range(DOCUMENTS)])
    for segment in tokens.split(SEGMENT, dim=1):
        model(segment, memories)
    return memories


def of_documents(memories: KNNMemoryList, documents: list[int], model: MemorizingTransformer) -> KNNMemoryList:
    """Memories of these documents alone."""
    alone = memories_of(model, len(documents), spare=SEGMENT)
    alone.load_state_dict({name: tensor[documents] for name, tensor in memories.state_dict().items()})
    return alone


def assert_holds(memories: KNNMemoryList, documents: list[int], alone: KNNMemoryList) -> None:
    """These documents hold what the memories of them alone hold."""
    for memory, expected in zip(memories, alone, strict=True):
        state, of_alone = memory.state_dict(), expected.state_dict()
        longest = of_alone["keys"].shape[1]
        assert torch.equal(state["lengths"][documents], of_alone["lengths"])
        for name in ("keys", "values"):
            found = state[name][documents][:, -longest:]
            held = torch.arange(longest, device=DEVICE) >= longest - of_alone["lengths"][:, None]
            assert_close(found[held], of_alone[name][held], SAME_GRAPH, name)


@pytest.mark.parametrize("xl", [0, 6])
def test_rows_are_the_documents_in_scope_when_the_decoder_was_made(xl: int) -> None:
    model = build(xl_max_memories=xl)
    memories, documents = filled(model), [3, 1]
    before = memories[0].lengths[[0, 2]].tolist()
    held = of_documents(memories, documents, model)
    alone = Decoder(model, 2, segment=SEGMENT, memories=held)
    with memories.at_batch_indices(documents):
        decoder = Decoder(model, 2, segment=SEGMENT, memories=memories)
        prompts = [text(11, 7), text(3, 8)]
        assert_close(decoder.read(prompts), alone.read(prompts), SAME_GRAPH)
    for number in range(2 * SEGMENT):  # out of the scope in which it was made
        tokens = text(2, 100 + number)
        assert_close(decoder.step(tokens), alone.step(tokens), SAME_GRAPH, f"step {number}")
    assert_holds(memories, documents, held)
    assert memories[0].lengths[[0, 2]].tolist() == before
    assert memories[0].scoped_indices == list(range(DOCUMENTS))


def test_generate_inside_a_scope_reads_and_writes_the_documents_in_scope() -> None:
    model = build()
    memories = filled(model)
    held = of_documents(memories, [2, 3], model)
    prompts = [text(12, 5), text(9, 6)]
    expected = generate(model, prompts, 12, temperature=0, segment=SEGMENT, memories=held)
    with memories.at_batch_indices([2, 3]):
        found = generate(model, prompts, 12, temperature=0, segment=SEGMENT, memories=memories)
    assert torch.equal(found, expected)
    assert_holds(memories, [2, 3], held)


def others(memory: KNNMemory) -> dict[str, torch.Tensor]:
    """As many other entries as the memory has room for."""
    state = memory.state_dict()
    times = memory.max_memories // state["keys"].shape[1] + 1
    full = {name: state[name].flip(0).repeat(1, times, 1)[:, -memory.max_memories :] for name in ("keys", "values")}
    return {**full, "lengths": torch.full_like(state["lengths"], memory.max_memories)}


def replaced(memories: KNNMemoryList) -> None:
    """Gives every memory other entries, in a ring of its own."""
    for memory in memories:
        memory.load_state_dict(others(memory))


def refilled(memories: KNNMemoryList) -> None:
    """Gives every memory the entries that `replaced` gives it, in the ring that it has."""
    for memory in memories:
        state = others(memory)
        for pairs in torch.stack((state["keys"], state["values"]), dim=-2).split(SEGMENT, dim=1):
            memory.add(pairs)


def widened(memories: KNNMemoryList) -> None:
    """Makes room for a longer segment, which takes another ring, and gives document 0 one more entry."""
    for memory in memories:
        memory.snapshot(longest=5 * SEGMENT, like=memory.lengths)
    added(memories)


def added(memories: KNNMemoryList) -> None:
    with memories.at_batch_indices([0]):
        for memory in memories:
            memory.add(torch.ones(1, 1, 2, 8, device=DEVICE))


@pytest.mark.parametrize(("change", "in_place"), [(replaced, refilled), (widened, added)])
def test_a_decoder_searches_what_its_memories_hold_now(change, in_place) -> None:
    """Whether their entries lie where they lay when it was made, or were moved."""
    model = build()
    results = []
    for act in (change, in_place):
        memories = filled(model)
        decoder = Decoder(model, DOCUMENTS, segment=SEGMENT, memories=memories)
        decoder.read([text(3, row) for row in range(DOCUMENTS)])
        before = decoder.step(text(DOCUMENTS, 1))
        act(memories)
        after = [decoder.step(text(DOCUMENTS, 2 + number)) for number in range(SEGMENT)]
        results.append(torch.stack([before, *after]))
    assert_close(results[0], results[1], SAME_GRAPH)


@pytest.mark.parametrize(("change", "in_place"), [(replaced, refilled), (widened, added)])
def test_a_stream_goes_on_with_what_the_memories_hold_now(change, in_place) -> None:
    model = build()
    results = []
    for act in (change, in_place):
        memories = filled(model)
        decoder = Decoder(model, DOCUMENTS, segment=SEGMENT, memories=memories)
        decoder.read([text(3, row) for row in range(DOCUMENTS)])
        tokens = stream(decoder, 20, Sampling(temperature=0))
        first = list(itertools.islice(tokens, 8))  # on a GPU the step is a captured graph by now
        act(memories)
        next(tokens)
        results.append((torch.stack(first), decoder.logits.clone()))
    assert torch.equal(results[0][0], results[1][0])
    assert_close(results[0][1], results[1][1], SAME_GRAPH)
