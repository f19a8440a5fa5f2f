"""`MemorizingTransformer`: layers find their memories, and wrong calls say what is wrong."""

from __future__ import annotations

import pytest
import torch
from helpers.checks import SAME_GRAPH, assert_close
from helpers.small_models import BATCH, LENGTH, VOCABULARY, build, segments

from memtrans import MemorizingTransformer
from memtrans_kernels import StaleMemoryError


@pytest.fixture
def searched(monkeypatch):
    """Which memory each search and each add of a forward went to, by its ring."""
    from memtrans.memory.snapshot import MemorySnapshot

    seen: dict[str, list[int]] = {"search": [], "add": []}
    nearest, append = MemorySnapshot.nearest, MemorySnapshot.append
    monkeypatch.setattr(
        MemorySnapshot, "nearest", lambda self, *a: seen["search"].append(id(self.ring)) or nearest(self, *a)
    )
    monkeypatch.setattr(
        MemorySnapshot, "append", lambda self, *a: seen["add"].append(id(self.ring)) or append(self, *a)
    )
    return seen


@pytest.mark.parametrize(
    ("shift", "legacy", "expected"), [(0, False, [0, 1, 2]), (1, False, [1, 2, 0]), (1, True, [1, 2, 0])]
)
def test_the_shift_looks_above_and_upstreams_rotates_reads_and_writes_together(searched, shift, legacy, expected):
    model = build(memorizing_layers=(2, 3, 4), shift_knn_memories_down=shift, legacy=legacy)
    memories = model.create_knn_memories(batch_size=BATCH, device="cpu")
    rings = [id(memory.snapshot().ring) for memory in memories]
    model(segments(1)[0], memories)
    assert [rings.index(ring) for ring in searched["search"]] == expected
    assert [rings.index(ring) for ring in searched["add"]] == (expected if legacy else [0, 1, 2])


def test_upstreams_rotation_changes_nothing_and_the_shift_does():
    """What a layer retrieves under upstream's shift is what it retrieves without one; ours is another layer's."""
    outputs = {}
    for name, options in {
        "none": {},
        "rotated": {"shift_knn_memories_down": 1, "legacy": True},
        "shifted": {"shift_knn_memories_down": 1},
    }.items():
        model = build(memorizing_layers=(2, 3), **options).eval()
        memories = model.create_knn_memories(batch_size=BATCH)
        outputs[name] = torch.stack([model(x, memories) for x in segments(3)])
    assert torch.equal(outputs["rotated"], outputs["none"])
    assert not torch.allclose(outputs["shifted"][1:], outputs["none"][1:])


def test_no_layer_sees_this_segments_keys_shifted_or_not():
    for shift in (0, 1):
        model = build(memorizing_layers=(2, 3), shift_knn_memories_down=shift).eval()
        x = segments(1)[0]
        added = model(x, model.create_knn_memories(batch_size=BATCH))
        read_only = model(x, model.create_knn_memories(batch_size=BATCH), add_knn_memory=False)
        assert torch.equal(added, read_only)


def test_one_pass_over_a_document_in_scopes_equals_the_whole_batch():
    model = build().eval()
    whole, scoped = (model.create_knn_memories(batch_size=BATCH) for _ in range(2))
    for x in segments(3):
        together = model(x, whole)
        for row in range(BATCH):
            with scoped.at_batch_indices([row]):
                assert_close(model(x[row : row + 1], scoped), together[row : row + 1], SAME_GRAPH)


def test_gradient_accumulation_in_scopes_gives_the_batch_gradient():
    tokens, gradients = segments(2), []
    for scopes in ([[0, 1]], [[0], [1]]):
        model = build(pad_id=-1)
        memories = model.create_knn_memories(batch_size=BATCH)
        for x in tokens:
            for scope in scopes:
                with memories.at_batch_indices(scope):
                    model(x[scope], memories, labels=x[scope]).mul(len(scope) / BATCH).backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for split, whole in zip(*gradients, strict=True):
        assert_close(split, whole, SAME_GRAPH)


def test_knn_attn_heads_may_differ_from_heads():
    model = build(knn_attn_heads=3)
    logits = model(segments(1)[0], model.create_knn_memories(batch_size=BATCH))
    assert logits.shape == (BATCH, LENGTH, VOCABULARY)
    assert model.knn_rel_pos_bias.relative_attention_bias.weight.shape == (32, 3)


def test_embeddings_in_and_out():
    model, x = build(memorizing_layers=()), segments(1)[0]
    embeddings = model(inputs_embeds=model.token_emb(x), return_embeddings=True)
    assert_close(model.to_logits[1](embeddings), model(x), SAME_GRAPH)


def test_labels_equal_to_pad_id_are_not_scored_and_with_minus_one_every_byte_is():
    x = segments(1)[0]
    labels = x.clone()
    labels[:, :4] = 0
    for pad_id, scored in ((0, labels[:, 4:]), (-1, labels)):
        model = build(memorizing_layers=(), pad_id=pad_id)
        logits = model(x)[:, -scored.shape[1] :]
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), scored.flatten())
        assert_close(model(x, labels=labels), expected, SAME_GRAPH)


def test_memories_may_be_any_sequence_or_snapshots():
    model, x = build(), segments(2)
    memories = model.create_knn_memories(batch_size=BATCH)
    model(x[0], tuple(memories))
    snapshots = [memory.snapshot() for memory in memories]
    first = model(x[1], snapshots)
    assert torch.equal(model(x[1], snapshots, add_knn_memory=False), first), "a snapshot finds the same again"
    with pytest.raises(StaleMemoryError, match="a snapshot must be given to one segment alone"):
        model(x[1], snapshots)
    assert memories[0].lengths.tolist() == [2 * LENGTH] * BATCH


def test_a_default_layer_and_layers_given_in_any_form():
    assert build().memorizing_layers == (2,)
    assert build(memorizing_layers=4).memorizing_layers == (4,)
    assert build(memorizing_layers=[4, 2, 2]).memorizing_layers == (2, 4)
    assert build(xl_max_memories=5).xl_memory_layers == (1, 2, 3, 4)
    assert build(xl_memory_layers=(1,)).xl_memory_layers == ()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m, k: m(torch.full((2, 4), 30), k), IndexError, r"x must be token ids in \[0, 30\), got 30"),
        (lambda m, k: m(torch.full((2, 4), -1), k), IndexError, r"x must be token ids in \[0, 30\), got -1"),
        (lambda m, k: m(torch.ones(2, 4), k), ValueError, r"x must be integers of shape \(B, N\), got torch.float32"),
        (
            lambda m, k: m(torch.ones(3, 4).long(), k),
            ValueError,
            r"knn_memories\[0\] must have the batch's 3 documents in scope, .* got 2 documents",
        ),
        (lambda m, k: m(torch.ones(2, 4).long(), []), ValueError, r"one memory for each of the layers \(2,\), got 0"),
        (lambda m, k: m(None, k), ValueError, "exactly one of x and inputs_embeds must be given"),
        (
            lambda m, k: m(torch.ones(2, 4).long(), k, labels=torch.ones(2, 3).long()),
            ValueError,
            r"labels must have shape \(2, 4\), got \(2, 3\)",
        ),
        (
            lambda m, k: m(torch.ones(2, 4).long(), k, labels=torch.full((2, 4), 99)),
            IndexError,
            r"labels must be token ids in \[0, 30\), got 99",
        ),
        (
            lambda m, k: m(torch.ones(2, 4).long(), k, labels=torch.ones(2, 4)),
            ValueError,
            r"labels must be integers of shape \(B, N\), got torch.float32",
        ),
        (lambda m, k: m(torch.ones(2, 4).long().to("meta"), k), ValueError, "x must be on cpu like the other tensors"),
        (
            lambda m, k: m(torch.ones(2, 4).long(), k, lengths=torch.tensor([-3, 4])),
            ValueError,
            r"lengths must be in \[0, 4\], got \[-3, 4\]",
        ),
        (
            lambda m, k: m(torch.ones(2, 4).long(), k, lengths=torch.tensor([5, 4])),
            ValueError,
            r"lengths must be in \[0, 4\], got \[5, 4\]",
        ),
        (lambda m, k: m([[1, 2]], k), TypeError, "x must be a torch.Tensor, got list"),
        (lambda m, k: m(torch.ones(0, 4).long(), k), ValueError, r"x must have at least one row, got shape \(0, 4\)"),
        (
            lambda m, k: m(torch.ones(2, 4).long(), k, torch.ones(1, 2, 3, 2, 8)),
            TypeError,
            "xl_memories must be a sequence of caches, got Tensor",
        ),
        (lambda m, k: m(torch.ones(2, 4).long(), k[0]), TypeError, "knn_memories must be a sequence .* got KNNMemory"),
        (
            lambda m, k: m(torch.ones(2, 4).long(), ["k"]),
            TypeError,
            r"knn_memories\[0\] must be a KNN.* got str",
        ),
        (lambda m, k: m(torch.ones(2, 4).long(), k, xl_length=[1, 1]), TypeError, "xl_length must be a torch.Tensor"),
        (
            lambda m, k: m(inputs_embeds=torch.ones(2, 4, 16).double(), knn_memories=k),
            TypeError,
            "inputs_embeds must be torch.float32 like the weights .*, got torch.float64",
        ),
        (
            lambda m, k: m(torch.ones(2, 4).long(), k, lengths=torch.ones(2)),
            TypeError,
            "lengths must be torch.int64, got torch.float32",
        ),
        (
            lambda m, k: m(inputs_embeds=torch.full((2, 4, 16), float("nan")), knn_memories=k),
            ValueError,
            "inputs_embeds must be finite",
        ),
        (
            lambda m, k: m(inputs_embeds=torch.ones(2, 4, 7), knn_memories=k),
            ValueError,
            r"inputs_embeds must have shape \(B, N, 16\), got \(2, 4, 7\)",
        ),
        (
            lambda m, k: m(torch.ones(2, 4).long(), k, xl_memories=[None]),
            ValueError,
            r"xl_memories must hold one cache for each of the layers \(\), got 1",
        ),
    ],
)
def test_a_wrong_call_names_argument_value_and_expectation(call, error, message):
    model = build()
    memories = model.create_knn_memories(batch_size=BATCH)
    with pytest.raises(error, match=message):
        call(model, memories)
    assert memories[0].lengths.tolist() == [0, 0]


def test_a_refused_call_leaves_every_memory_and_every_row_as_it_was():
    """The second memory or the last cache is wrong, and a row holds a start token."""
    model = build(memorizing_layers=(2, 3), xl_max_memories=5, clear_memories_on_sos_token_id=3)
    memories = model.create_knn_memories(batch_size=BATCH)
    _, caches = model(segments(1)[0].clamp(min=4), memories)
    tokens = torch.full((BATCH, 4), 3)
    before = [memory.lengths.tolist() for memory in memories]
    wrong_memory = [memories[0], build(dim_head=5).create_knn_memories(batch_size=BATCH)[0]]
    with pytest.raises(ValueError, match=r"knn_memories\[1\] must have .* dim=8, got .* dim=5"):
        model(tokens, wrong_memory, caches)
    with pytest.raises(ValueError, match=r"xl_memories\[3\] must have shape"):
        model(tokens, memories, [*caches[:3], caches[3][..., :7]])
    assert [memory.lengths.tolist() for memory in memories] == before


SIZES = ("num_tokens", "dim", "depth", "dim_head", "heads", "knn_attn_heads", "kv_heads", "max_knn_memories")


@pytest.mark.parametrize("name", [*SIZES, "num_retrieved_memories"])
def test_a_size_of_zero_or_one_that_is_no_integer_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        build(**{name: 0})
    with pytest.raises(TypeError, match=f"{name} must be an integer, got 2.0"):
        build(**{name: 2.0})


def test_counts_that_upstream_writes_as_0_point_are_whole_numbers():
    model = build(xl_max_memories=3.0, shift_knn_memories_down=0.0, shift_xl_memories_down=1.0)
    assert (model.layers[0][0].fn.xl_max_memories, model.shift_xl_memories_down) == (3, 1)
    with pytest.raises(TypeError, match=r"xl_max_memories must be an integer, got 2\.5"):
        build(xl_max_memories=2.5)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"memorizing_layers": 2.0}, TypeError, r"memorizing_layers must be an integer, got 2\.0"),
        ({"clear_memories_on_eos_token_id": 30}, ValueError, r"eos_token_id must be a token id in \[0, 30\), got 30"),
        ({"pad_id": None}, TypeError, "pad_id must be an integer, got None"),
        ({"ff_mult": -1}, ValueError, "ff_mult must be a finite number above 0, got -1"),
        ({"ff_dropout": 1.0}, ValueError, r"ff_dropout must be in \[0, 1\), got 1\.0"),
        ({"attn_scale_init": float("nan")}, ValueError, "attn_scale_init must be a finite number above 0, got nan"),
        ({"memory_offset": "low"}, ValueError, "memory_offset must be a finite number, got 'low'"),
        ({"xl_max_memories": -1}, ValueError, "xl_max_memories must be at least 0, got -1"),
    ],
)
def test_an_option_out_of_range_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        build(**options)


@pytest.mark.parametrize(("given", "left"), [((2, 9), (2,)), (9, ()), ((0, 3), (3,))])
def test_22_3_layers_that_do_not_exist_are_left_out_with_a_warning_that_says_what_does(given, left):
    with pytest.warns(UserWarning, match=r"memorizing_layers must name layers from 1 to depth=4, got \[(9|0)\]"):
        model = build(memorizing_layers=given)
    assert model.memorizing_layers == left
    assert len(model.create_knn_memories(batch_size=1)) == len(left)


def read_then_fail(model, memories):
    model(torch.arange(9)[None], memories)
    model(torch.full((1, 9), 9), memories)


def test_21_11_memories_of_a_context_stay_readable_behind_it_also_after_an_exception():
    model = MemorizingTransformer(num_tokens=9, dim=16, depth=2, dim_head=8, heads=2, memorizing_layers=2)
    with pytest.raises(IndexError), model.knn_memories_context(batch_size=1) as memories:
        read_then_fail(model, memories)
    assert memories[0].lengths.tolist() == [9]
    model(torch.arange(9)[None], memories)
    assert memories[0].lengths.tolist() == [18]


@pytest.mark.parametrize("memorizing", [(), (1, 2), (2,)])
def test_21_16_every_parameter_has_a_gradient_whichever_layers_have_a_memory(memorizing):
    """DistributedDataParallel with its defaults waits for all of them."""
    model = MemorizingTransformer(num_tokens=9, dim=16, depth=2, dim_head=8, heads=2, memorizing_layers=memorizing)
    x, memories = torch.arange(9)[None], model.create_knn_memories(batch_size=1)
    for _ in range(2):
        model(x, memories, labels=x).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_21_16_a_snapshot_made_under_inference_mode_can_be_trained_with():
    model = MemorizingTransformer(num_tokens=9, dim=16, depth=2, dim_head=8, heads=2, memorizing_layers=2)
    x, memories = torch.arange(9)[None], model.create_knn_memories(batch_size=1)
    model(x, memories)
    with torch.inference_mode():
        snapshots = [memory.snapshot() for memory in memories]
    model(x, snapshots, labels=x).backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    memories.clear_memory()
    model(x, memories)
    model(x, [memory.snapshot() for memory in memories], labels=x).backward()
    assert all(torch.equal(parameter.grad, grad) for parameter, grad in zip(model.parameters(), expected, strict=True))
