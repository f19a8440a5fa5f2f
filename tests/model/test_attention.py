"""`Attention` and `KNNAttention`: what they see, what they cache, what they store."""

from __future__ import annotations

import pytest
import torch
from helpers.checks import SAME_GRAPH, assert_close
from torch.nn.modules.module import register_module_forward_hook
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from memtrans import KNNAttention, KNNMemory
from memtrans.memory.leaving import leaving_range
from memtrans.position import T5RelativePositionBias

DIM, HEADS, WIDTH, LENGTH = 16, 4, 8, 6


def layer(**options) -> KNNAttention:
    torch.manual_seed(0)
    return KNNAttention(dim=DIM, heads=HEADS, dim_head=WIDTH, num_retrieved_memories=3, **options)


def test_the_memory_receives_the_normalised_keys_that_leave_the_cache():
    attention = layer(xl_max_memories=4)
    memory = KNNMemory(WIDTH, 50)
    x, cache = torch.randn(1, LENGTH, DIM), torch.randn(1, 4, 2, WIDTH)
    attention(x, knn_memory=memory, xl_memory=cache)
    key, value = attention.to_kv(x).chunk(2, dim=-1)
    key = torch.nn.functional.normalize(key, dim=-1)
    expected_keys = torch.cat((cache[:, :, 0], key[:, :2]), dim=1)
    expected_values = torch.cat((cache[:, :, 1], value[:, :2]), dim=1)
    state = memory.state_dict()
    assert_close(state["keys"], expected_keys, SAME_GRAPH)
    assert_close(state["values"], expected_values, SAME_GRAPH)


@pytest.mark.parametrize("cached", [0, 2, 4, 9])
@pytest.mark.parametrize("valid", [0, 1, 4])
@pytest.mark.parametrize("real", [0, 1, 5, 6])
def test_the_oldest_real_tokens_of_this_document_leave_for_the_memory(cached, valid, real):
    """Written as a list of tokens: foreign ones lead the cache, padding ends the segment; the newest real ones stay."""
    valid = min(valid, cached)
    mine = [f"cached {i}" for i in range(valid)] + [f"real {i}" for i in range(real)]
    tokens = ["foreign"] * (cached - valid) + mine + ["padding"] * (LENGTH - real)
    for room in (0, 3, 9):
        leaving = max(0, len(tokens) - room)
        first, last = leaving_range(leaving, len(tokens), LENGTH, torch.tensor([valid + LENGTH]), torch.tensor([real]))
        assert tokens[:leaving][int(first) : max(int(first), int(last))] == mine[: max(0, len(mine) - room)]


def test_padding_and_foreign_entries_are_not_stored_and_padding_takes_no_room_in_the_cache():
    attention = layer(xl_max_memories=4)
    memory = KNNMemory(WIDTH, 50, 4)
    x, cache = torch.randn(4, LENGTH, DIM), torch.randn(4, 4, 2, WIDTH)
    attention(
        x,
        knn_memory=memory,
        xl_memory=cache,
        local_length=torch.tensor([LENGTH, LENGTH + 1, LENGTH + 4, LENGTH + 4]),
        lengths=torch.tensor([1, LENGTH, LENGTH, 1]),
    )
    assert memory.lengths.tolist() == [0, 3, 6, 1]  # of each row, its real tokens but for the 4 that stay
    stored = memory.state_dict()["keys"]
    assert_close(stored[1, -3:][:1], cache[1, 3:, 0], SAME_GRAPH)
    assert_close(stored[3, -1:], cache[3, :1, 0], SAME_GRAPH)


def test_a_read_only_call_changes_nothing():
    attention, memory = layer(), KNNMemory(WIDTH, 50)
    x = torch.randn(1, LENGTH, DIM)
    attention(x, knn_memory=memory)
    before = memory.state_dict()
    attention(x, knn_memory=memory, add_knn_memory=False)
    assert all(torch.equal(before[name], tensor) for name, tensor in memory.state_dict().items())


def test_the_segment_does_not_find_itself():
    attention, x = layer(), torch.randn(1, LENGTH, DIM)
    fresh, _ = attention(x, knn_memory=KNNMemory(WIDTH, 50))
    read_only, _ = attention(x, knn_memory=KNNMemory(WIDTH, 50), add_knn_memory=False)
    assert torch.equal(fresh, read_only)


def test_the_offset_and_the_gate_start_as_documented():
    attention = layer(memory_offset=-2.0, gate_output=True)
    assert attention.memory_offset.tolist() == [-2.0] * HEADS
    out, _ = attention(torch.randn(1, LENGTH, DIM), knn_memory=KNNMemory(WIDTH, 50))
    assert torch.equal(out, torch.zeros_like(out))
    assert set(dict(layer().named_parameters())) == {"scale", "to_q.weight", "to_kv.weight", "to_out.weight"}


def test_a_gate_is_a_parameter_for_each_head_and_starts_at_equal_parts():
    attention = layer(combine="gate")
    assert attention.memory_gate.sigmoid().tolist() == [0.5] * HEADS
    assert set(attention.state_dict()) - set(layer().state_dict()) == {"memory_gate"}


def test_a_gate_goes_from_the_local_part_alone_to_the_retrieved_part_alone():
    attention, x = layer(combine="gate"), torch.randn(2, 1, LENGTH, DIM)
    memory, local_values = KNNMemory(WIDTH, 50), []
    attention(x[0], knn_memory=memory)
    changed = x[1].clone()
    for gate in (-50.0, 50.0):
        attention.memory_gate.data.fill_(gate)
        mixed, _ = attention(x[1], knn_memory=memory, add_knn_memory=False)
        without, _ = attention(x[1], knn_memory=KNNMemory(WIDTH, 50))
        local_values.append((mixed, without))
    assert torch.equal(*local_values[0]), "a closed gate shows no memory"
    assert torch.equal(local_values[0][1], local_values[1][1]), "an open gate shows no memory that is not there"
    changed[:, 0] += 1.0  # the oldest local key and value; later queries stay as they are
    open_to_memory, _ = attention(changed, knn_memory=memory, add_knn_memory=False)
    assert_close(open_to_memory[:, 1:], local_values[1][0][:, 1:], SAME_GRAPH)


def test_a_gate_mixes_only_in_documents_that_remember_something():
    """With no gradient of the gate where there is nothing to open it to."""
    attention, x = layer(combine="gate"), torch.randn(2, LENGTH, DIM, requires_grad=True)
    memory = KNNMemory(WIDTH, 50, 2)
    attention(x, knn_memory=memory)
    memory.clear_rows(torch.tensor([True, False]))
    out, _ = attention(x, knn_memory=memory, add_knn_memory=False)
    without, _ = attention(x, knn_memory=KNNMemory(WIDTH, 50, 2))
    assert torch.equal(out[0], without[0]) and not torch.equal(out[1], without[1])
    out[0].sum().backward(retain_graph=True)
    assert torch.equal(attention.memory_gate.grad, torch.zeros(HEADS)) and x.grad.isfinite().all()
    out[1].sum().backward()
    assert (attention.memory_gate.grad != 0.0).all()


def test_a_gate_drops_weights_of_either_part():
    attention, x = layer(combine="gate", dropout=0.5), torch.randn(1, LENGTH, DIM)
    memory = KNNMemory(WIDTH, 50)
    attention(x, knn_memory=memory)
    for gate in (-50.0, 50.0):
        attention.memory_gate.data.fill_(gate)
        first, second = (attention(x, knn_memory=memory, add_knn_memory=False)[0] for _ in range(2))
        assert not torch.equal(first, second)


def test_a_low_offset_turns_the_memory_off():
    attention, x = layer(memory_offset=-1e4), torch.randn(2, 1, LENGTH, DIM)
    memory = KNNMemory(WIDTH, 50)
    attention(x[0], knn_memory=memory)
    with_memory, _ = attention(x[1], knn_memory=memory)
    without, _ = attention(x[1], knn_memory=KNNMemory(WIDTH, 50))
    assert_close(with_memory, without, SAME_GRAPH)


def test_a_temperature_may_be_computed_beforehand():
    attention, x, memory = layer(memory_offset=0.0), torch.randn(1, LENGTH, DIM), KNNMemory(WIDTH, 50)
    attention(x, knn_memory=memory)
    out, _ = attention(x, knn_memory=memory, add_knn_memory=False)
    given, _ = attention(x, knn_memory=memory, add_knn_memory=False, temperature=attention.temperature())
    colder, _ = attention(x, knn_memory=memory, add_knn_memory=False, temperature=2 * attention.temperature())
    assert torch.equal(given, out) and not torch.equal(colder, out)


def test_dropout_is_drawn_anew_in_training_and_never_in_evaluation():
    attention, memory, x = layer(dropout=0.5), KNNMemory(WIDTH, 50), torch.randn(1, LENGTH, DIM)
    first, second = (attention(x, knn_memory=memory, add_knn_memory=False)[0] for _ in range(2))
    assert not torch.equal(first, second)
    attention.eval()
    first, second = (attention(x, knn_memory=memory, add_knn_memory=False)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"heads": 0}, ValueError, "heads must be at least 1, got 0"),
        ({"num_buckets": 32.0}, TypeError, r"num_buckets must be an integer, got 32\.0"),
        ({"max_distance": 16}, ValueError, "max_distance must be at least 17, got 16"),
    ],
)
def test_a_position_bias_that_cannot_be_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        T5RelativePositionBias(1.0, **options)


@pytest.mark.parametrize(("i", "j"), [(5, 5), (3, 200)])
def test_positions_count_from_the_querys_true_position(i, j):
    bias = T5RelativePositionBias(scale=2.0, heads=HEADS)
    dense = bias(i, j)
    for query in range(i):
        for key in range(0, j - i + query + 1, 7):
            distance = torch.tensor(j - i + query - key)
            expected = 2.0 * bias.relative_attention_bias(bias.bucket(distance))
            assert torch.equal(dense[0, :, query, key], expected)


def test_a_dense_bias_may_leave_out_the_batch_or_share_the_heads():
    attention, x, memory = layer(), torch.randn(1, LENGTH, DIM), KNNMemory(WIDTH, 9)
    bias = torch.randn(1, 1, LENGTH, LENGTH)
    outs = [
        attention(x, knn_memory=memory, add_knn_memory=False, rel_pos_bias=given)[0]
        for given in (bias.expand(1, HEADS, -1, -1), bias, bias[0].expand(HEADS, -1, -1))
    ]
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


def test_autocast_makes_another_dtype_fit():
    attention, memory = layer(), KNNMemory(WIDTH, 9)
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = attention(torch.randn(1, 2, DIM, dtype=torch.bfloat16), knn_memory=memory)
    assert out.isfinite().all()


def products(attention, x):
    """The operators that a segment calls which are matrix products of its projections, and what it gives."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        found = attention.project(x)
    return [event.name for event in seen.events() if event.name in ("aten::linear", "aten::cat")], found


WATCHING = {  # whoever watches a layer sees it called
    "a hook": lambda attention: attention.to_q.register_forward_hook(lambda *_: None),
    "a hook of all modules": lambda attention: register_module_forward_hook(lambda *_: None),
}


@pytest.mark.parametrize("watching", WATCHING.values(), ids=WATCHING)
@pytest.mark.parametrize(("kv_heads", "value_width"), [(1, None), (2, None), (1, 4), (4, 12)])
def test_an_eager_training_step_projects_by_one_product_and_gives_the_same(kv_heads, value_width, watching):
    attention = layer(kv_heads=kv_heads, value_dim_head=value_width)
    x = torch.randn(2, 6, 16)
    names, joint = products(attention, x)
    assert names == ["aten::cat", "aten::linear"]
    with torch.no_grad():
        names, apart = products(attention, x)
    assert names == ["aten::linear"] * 2  # by the token nothing is copied
    for one, other in zip(joint, apart, strict=True):
        assert_close(one, other, SAME_GRAPH)
    weights, signs = [attention.to_q.weight, attention.to_kv.weight], [torch.randn(one.shape) for one in joint]
    found = torch.autograd.grad(joint, weights, signs)
    with watching(attention):
        names, watched = products(attention, x)
    assert names == ["aten::linear"] * 2
    for one, other in zip(found, torch.autograd.grad(watched, weights, signs), strict=True):
        assert_close(one, other, SAME_GRAPH)


def test_projections_of_different_dtypes_stay_apart():
    attention, x = layer(), torch.randn(1, 3, 16)
    attention.to_kv.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert "aten::cat" not in products(attention, x)[0]


@pytest.mark.parametrize("name", ["to_q", "to_kv"])
def test_a_projection_with_a_bias_of_its_own_keeps_it(name):
    attention, x = layer(), torch.zeros(1, 3, 16)
    old = getattr(attention, name)
    setattr(attention, name, torch.nn.Linear(old.in_features, old.out_features))
    with torch.no_grad():
        expected = attention.project(x)
    for one, other in zip(attention.project(x), expected, strict=True):
        assert torch.equal(one, other)


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match=r"x must have shape \(B, N, 16\), got \(1, 2, 5\)"):
        layer()(torch.randn(1, 2, 5), knn_memory=KNNMemory(WIDTH))
    with pytest.raises(ValueError, match=r"knn_memory must have the batch's 3 documents in scope, .* got 1 documents"):
        layer()(torch.randn(3, 2, DIM), knn_memory=KNNMemory(WIDTH))
    with pytest.raises(TypeError, match=r"lengths must be torch\.int64, got torch\.float32"):
        layer()(torch.randn(1, 2, DIM), knn_memory=KNNMemory(WIDTH), lengths=torch.ones(1))
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\), got 1.0"):
        layer(dropout=1.0)
    with pytest.raises(ValueError, match="attn_scale_init must be a finite number above 0, got 0"):
        layer(attn_scale_init=0)
    with pytest.raises(ValueError, match="combine must be one of softmax, gate, got 'sum'"):
        layer(combine="sum")
    with pytest.raises(ValueError, match=r"memory_offset must be None with combine='gate', got -2.0"):
        layer(combine="gate", memory_offset=-2.0)
    with pytest.raises(ValueError, match="heads must be a positive multiple of kv_heads=3, got 4"):
        layer(kv_heads=3)
    with pytest.raises(ValueError, match=r"xl_memory must have shape \(1, 3, 2, 8\), got \(1, 3, 2, 7\)"):
        layer()(torch.randn(1, 2, DIM), knn_memory=KNNMemory(WIDTH), xl_memory=torch.randn(1, 3, 2, 7))
    with pytest.raises(ValueError, match=r"knn_memory must have .* dim=8, got 1 documents, kv_heads=1 and dim=5"):
        layer()(torch.randn(1, 2, DIM), knn_memory=KNNMemory(5))
    with pytest.raises(ValueError, match=r"add_to must have .* kv_heads=1 and dim=8, got 1 documents, kv_heads=2"):
        layer()(torch.randn(1, 2, DIM), knn_memory=KNNMemory(WIDTH), add_to=KNNMemory(WIDTH, kv_heads=2))
    with pytest.raises(TypeError, match="knn_memory must be a KNNMemory or a snapshot of one, got list"):
        layer()(torch.randn(1, 2, DIM), knn_memory=[KNNMemory(WIDTH)])
    with pytest.raises(ValueError, match=r"local_length must be in \[0, 2\], got \[9\]"):
        layer()(torch.randn(1, 2, DIM), knn_memory=KNNMemory(WIDTH), local_length=torch.tensor([9]))
    with pytest.raises(TypeError, match=r"num_retrieved_memories must be an integer, got 2\.0"):
        KNNAttention(dim=DIM, num_retrieved_memories=2.0)
    with pytest.raises(ValueError, match=r"temperature must have shape \(H\) with H=4, got \(1,\)"):
        layer()(torch.randn(1, 2, DIM), knn_memory=KNNMemory(WIDTH), temperature=torch.ones(1))


def fill_and_attend(attention, memory, inputs, how):
    """Two segments before the one whose backward is asked for; `how` runs that one."""
    for segment in inputs[:2]:
        attention(segment, knn_memory=memory)
    x = inputs[2].clone().requires_grad_()
    how(x).square().sum().backward()
    return x.grad


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("given", ["knn_memory", "add_to", "a snapshot taken there"])
def test_a_memory_itself_is_refused_where_activation_checkpointing_runs_a_segment_again(given, reentrant):
    attention, memory = layer(), KNNMemory(WIDTH, 50, 2)
    inputs = torch.randn(3, 2, LENGTH, DIM)
    snapshot = KNNMemory(WIDTH, 50, 2, device="cpu").snapshot()

    def attend(x):
        here = memory.snapshot(like=x, longest=LENGTH) if given == "a snapshot taken there" else memory
        memories = {"knn_memory": snapshot, "add_to": here} if given == "add_to" else {"knn_memory": here}
        return attention(x, **memories)[0]

    name = given if given in ("knn_memory", "add_to") else "the memory"
    with pytest.raises(RuntimeError, match=rf"{name} must be a snapshot .* call memory.snapshot\(\) once, before"):
        fill_and_attend(attention, memory, inputs, lambda x: checkpoint(attend, x, use_reentrant=reentrant))
    assert memory.lengths.tolist() == [3 * LENGTH] * 2, "stored once"


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_memory_made_inside_of_what_runs_again_is_as_good_there_as_at_first(reentrant):
    attention, inputs = layer(), torch.randn(3, 2, LENGTH, DIM)

    def read(x):
        memory = KNNMemory(WIDTH, 50, 2, spare=2 * LENGTH)
        attention(x, knn_memory=memory)
        return attention(x.flip(1), knn_memory=memory)[0]

    gradients = [
        fill_and_attend(attention, KNNMemory(WIDTH, 50, 2), inputs, how)
        for how in (read, lambda x: checkpoint(read, x, use_reentrant=reentrant))
    ]
    assert torch.equal(*gradients)


def evaluate_then_train(mode):
    """The gradients of segments that find a memory laid out, scoped, cleared, widened and loaded inside of `mode`."""
    attention, memory = layer(), KNNMemory(WIDTH, 50, 2, spare=LENGTH)
    inputs = torch.randn(3, 2, LENGTH, DIM)

    def train():
        return fill_and_attend(attention, memory, inputs, lambda x: attention(x, knn_memory=memory)[0])

    with mode:
        attention(inputs[0], knn_memory=memory)
        memory.set_scoped_indices([1, 0])
        memory.clear([1])
        attention(torch.cat((inputs[1], inputs[2]), dim=1), knn_memory=memory)
    memory.clear_rows(torch.tensor([False, True]))
    gradient = train()
    with mode:
        memory.load_state_dict(memory.state_dict())
    return torch.stack((gradient, train()))


def test_a_memory_that_first_met_an_evaluation_trains_like_any_other():
    """No backward may read what was made in inference mode."""
    assert torch.equal(evaluate_then_train(torch.inference_mode()), evaluate_then_train(torch.no_grad()))


class OwnSearch(KNNMemory):
    def search(self, queries, topk, *_, **__):
        raise AssertionError("no layer calls it")


class OwnAdd(KNNMemory):
    def add(self, memories, count=None):
        raise AssertionError("no layer calls it")


class OwnName(KNNMemory):
    """Changes nothing that a layer goes past."""

    def __repr__(self) -> str:
        return "mine"


@pytest.mark.parametrize(("kind", "named"), [(OwnSearch, "OwnSearch with search"), (OwnAdd, "OwnAdd with add")])
def test_21_10_a_memory_whose_methods_no_layer_would_call_is_refused_by_name(kind, named):
    attention, memory = layer(), kind(WIDTH, 50, 2)
    for given in ({"knn_memory": memory}, {"knn_memory": KNNMemory(WIDTH, 50, 2), "add_to": memory}):
        with pytest.raises(TypeError, match=f"must have the methods of KNNMemory, .* got a .*{named} of its own"):
            attention(torch.randn(2, 3, DIM), **given)
    patched = KNNMemory(WIDTH, 50, 2)
    patched.search = memory.search
    with pytest.raises(TypeError, match="KNNMemory with search of its own"):
        attention(torch.randn(2, 3, DIM), knn_memory=patched)


def test_21_10_a_subclass_with_other_methods_of_its_own_is_a_memory():
    memory = OwnName(WIDTH, 50, 2)
    layer()(torch.randn(2, 3, DIM), knn_memory=memory)
    assert memory.lengths.tolist() == [3, 3]


def test_21_10_a_foreign_memory_of_the_same_name_is_named_with_its_module():
    foreign = type("KNNMemory", (), {"__module__": "elsewhere.knn_memory"})()
    with pytest.raises(TypeError, match=r"must be a KNNMemory or .*, got elsewhere\.knn_memory\.KNNMemory"):
        layer()(torch.randn(2, 3, DIM), knn_memory=foreign)
