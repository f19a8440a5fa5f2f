"""What `Attention` and `KNNAttention` share: the segment with its XL cache, its bias, what is another document's."""

from __future__ import annotations

import numpy
import pytest
import torch
from helpers.checks import SAME_FORMULA, SAME_GRAPH, assert_close

from memtrans import Attention, KNNAttention, KNNMemory
from memtrans.position import expand_table

DIM, HEADS, WIDTH, LENGTH = 16, 4, 8, 6


@pytest.mark.parametrize("kind", [Attention, KNNAttention])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_a_cached_segment_continues_an_uncached_one(kind, kv_heads):
    """Two segments through the XL cache give what one long segment gives; the memory holds nothing that was cached."""
    torch.manual_seed(0)
    attention = kind(dim=DIM, heads=HEADS, dim_head=WIDTH, xl_max_memories=LENGTH, kv_heads=kv_heads)
    bias = torch.randn(HEADS, 5)
    x = torch.randn(2, 2 * LENGTH, DIM)
    memory = KNNMemory(WIDTH, 50, 2, kv_heads=kv_heads)
    extra = {"knn_memory": memory, "add_knn_memory": False} if kind is KNNAttention else {}
    whole, _ = attention(x, rel_pos_bias=bias, **extra)
    extra.pop("add_knn_memory", None)
    first, cache = attention(x[:, :LENGTH], rel_pos_bias=bias, **extra)
    second, cache = attention(x[:, LENGTH:], xl_memory=cache, rel_pos_bias=bias, **extra)
    assert_close(torch.cat((first, second), dim=1), whole, SAME_GRAPH)
    assert cache.shape == ((2, LENGTH, 2, WIDTH) if kv_heads == 1 else (2, kv_heads, LENGTH, 2, WIDTH))
    if kind is KNNAttention:
        assert memory.lengths.tolist() == [LENGTH, LENGTH]


@pytest.mark.parametrize("kind", [Attention, KNNAttention])
def test_a_table_is_the_dense_bias_by_distance(kind):
    torch.manual_seed(0)
    attention = kind(dim=DIM, heads=HEADS, dim_head=WIDTH)
    table = torch.randn(HEADS, 4)
    x = torch.randn(1, LENGTH, DIM)
    extra = {"knn_memory": KNNMemory(WIDTH, 9), "add_knn_memory": False} if kind is KNNAttention else {}
    by_table, _ = attention(x, rel_pos_bias=table, **extra)
    dense, _ = attention(x, rel_pos_bias=expand_table(table, LENGTH, LENGTH)[None], **extra)
    assert_close(by_table, dense, SAME_GRAPH)
    assert [expand_table(table, 2, 3)[0, 1, column].item() for column in range(3)] == table[0, :3].flip(0).tolist()


@pytest.mark.parametrize("kind", [Attention, KNNAttention])
def test_local_length_hides_what_another_document_left_in_the_cache(kind):
    torch.manual_seed(0)
    attention = kind(dim=DIM, heads=HEADS, dim_head=WIDTH, xl_max_memories=4)
    x, cache = torch.randn(2, LENGTH, DIM), torch.randn(2, 4, 2, WIDTH)
    memory = KNNMemory(WIDTH, 9, 2)
    extra = {"knn_memory": memory, "add_knn_memory": False} if kind is KNNAttention else {}
    hidden, _ = attention(x, xl_memory=cache, local_length=torch.tensor([LENGTH, LENGTH + 4]), **extra)
    without, _ = attention(x, **extra)
    whole, _ = attention(x, xl_memory=cache, **extra)
    assert_close(hidden[0], without[0], SAME_GRAPH)
    assert_close(hidden[1], whole[1], SAME_GRAPH)


@pytest.mark.parametrize("kind", [Attention, KNNAttention])
@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("room", [3, 8, 20])
def test_each_rows_cache_ends_with_its_newest_real_token(kind, kv_heads, room):
    """As it would without its padding, behind zeros where that cache is shorter."""
    torch.manual_seed(0)
    attention = kind(dim=DIM, heads=HEADS, dim_head=WIDTH, xl_max_memories=room, kv_heads=kv_heads)
    lengths, groups = [0, 2, LENGTH], () if kv_heads == 1 else (kv_heads,)
    x, cache = torch.randn(3, LENGTH, DIM), torch.randn(3, *groups, 4, 2, WIDTH)

    def next_cache(rows: slice, **options):
        memory = KNNMemory(WIDTH, 20, len(cache[rows]), kv_heads=kv_heads)
        extra = {"knn_memory": memory} if kind is KNNAttention else {}
        return attention(x[rows, : options.pop("real", LENGTH)], xl_memory=cache[rows], **extra, **options)[1]

    padded = next_cache(slice(None), lengths=torch.tensor(lengths))
    for row, real in enumerate(lengths):
        expected = next_cache(slice(row, row + 1), real=real)[0] if real else cache[row][..., -room:, :, :]
        size = expected.shape[-3]
        assert_close(padded[row][..., -size:, :, :], expected, SAME_GRAPH)
        assert not padded[row][..., :-size, :, :].any()


@pytest.mark.parametrize("kind", [Attention, KNNAttention])
def test_lengths_of_another_kind_or_beyond_the_segment_are_refused(kind):
    attention = kind(dim=DIM, heads=HEADS, dim_head=WIDTH, xl_max_memories=1)
    extra = {"knn_memory": KNNMemory(WIDTH, 9)} if kind is KNNAttention else {}
    with pytest.raises(ValueError, match=r"lengths must be in \[0, 2\], got \[3\]"):
        attention(torch.randn(1, 2, DIM), lengths=torch.tensor([3]), **extra)
    with pytest.raises(TypeError, match=r"lengths must be torch\.int64, got torch\.float32"):
        attention(torch.randn(1, 2, DIM), lengths=torch.ones(1), **extra)


@pytest.mark.parametrize("kind", [Attention, KNNAttention])
@pytest.mark.parametrize(
    ("bias", "error", "message"),
    [
        (torch.zeros(1, 4, 1, 3), ValueError, r"\(1, 4, at least 2, at least 3\) to be dense, got \(1, 4, 1, 3\)"),
        (torch.zeros(1, 4, 2, 2), ValueError, r"\(1, 4, at least 2, at least 3\) to be dense, got \(1, 4, 2, 2\)"),
        (
            torch.zeros(1, 3, 2, 3),
            ValueError,
            r"rel_pos_bias must have shape \(4, distances\), .* got \(1, 3, 2, 3\)",
        ),
        (torch.zeros(5, 4, 2, 3), ValueError, r"rel_pos_bias must have shape .* got \(5, 4, 2, 3\)"),
        (torch.zeros(3, 9), ValueError, r"rel_pos_bias must have shape \(4, distances\), or .* got \(3, 9\)"),
        (torch.zeros(4, 0), ValueError, r"rel_pos_bias must have shape \(4, distances\), or .* got \(4, 0\)"),
        (torch.zeros(9), ValueError, r"rel_pos_bias must have shape .* got \(9,\)"),
        (torch.zeros(4, 9).long(), TypeError, "rel_pos_bias must be floating point, got torch.int64"),
        (torch.zeros(4, 9).to("meta"), ValueError, "rel_pos_bias must be on cpu like the other tensors, got meta"),
        ([0.0], TypeError, "rel_pos_bias must be a torch.Tensor, got list"),
    ],
)
def test_a_bias_that_does_not_fit_is_refused_and_nothing_is_added(kind, bias, error, message):
    attention = kind(dim=DIM, heads=HEADS, dim_head=WIDTH, xl_max_memories=1)
    memory = KNNMemory(WIDTH, 9)
    extra = {"knn_memory": memory} if kind is KNNAttention else {}
    with pytest.raises(error, match=message):
        attention(torch.randn(1, 2, DIM), xl_memory=torch.randn(1, 1, 2, WIDTH), rel_pos_bias=bias, **extra)
    assert memory.lengths.tolist() == [0]


@pytest.mark.parametrize("kind", [Attention, KNNAttention])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_bias_and_a_cache_of_another_floating_dtype_are_cast(kind, dtype):
    attention = kind(dim=DIM, heads=HEADS, dim_head=WIDTH, xl_max_memories=1)
    x, bias, cache = torch.randn(1, 2, DIM), torch.randn(HEADS, 4).to(dtype), torch.randn(1, 1, 2, WIDTH).to(dtype)
    outs = []
    for cast in (lambda tensor: tensor, lambda tensor: tensor.float()):
        extra = {"knn_memory": KNNMemory(WIDTH, 9)} if kind is KNNAttention else {}
        outs.append(attention(x, xl_memory=cast(cache), rel_pos_bias=cast(bias), **extra)[0])
    assert outs[0].dtype == torch.float32
    assert_close(outs[0], outs[1], SAME_GRAPH)


@pytest.mark.parametrize("kind", [Attention, KNNAttention])
@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (
            torch.randn(1, 2, DIM).double(),
            TypeError,
            r"x must be torch\.float32 like the weights .* torch\.float64",
        ),
        (torch.ones(1, 2, DIM).long(), TypeError, r"x must be floating point, got torch\.int64"),
        (torch.randn(1, 2, DIM).to("meta"), ValueError, "x must be on cpu like the other tensors, got meta"),
        (numpy.zeros((1, 2, DIM)), TypeError, "x must be a torch.Tensor, got ndarray"),
        (torch.randn(0, 2, DIM), ValueError, r"x must have at least one row, got shape \(0, 2, 16\)"),
    ],
)
def test_an_input_that_the_weights_cannot_read_is_refused(kind, x, error, message):
    attention = kind(dim=DIM, heads=HEADS, dim_head=WIDTH)
    extra = {"knn_memory": KNNMemory(WIDTH, 9)} if kind is KNNAttention else {}
    with pytest.raises(error, match=message):
        attention(x, **extra)


@pytest.mark.parametrize("kind", [Attention, KNNAttention])
def test_a_cache_of_another_type_or_a_mask_without_its_name_is_refused(kind):
    attention, memory = kind(dim=DIM, heads=HEADS, dim_head=WIDTH, xl_max_memories=1), KNNMemory(WIDTH, 9)
    extra = {"knn_memory": memory} if kind is KNNAttention else {}
    with pytest.raises(TypeError, match=r"xl_memory must be a torch\.Tensor, got list"):
        attention(torch.randn(1, 2, DIM), xl_memory=[torch.randn(1, 1, 2, WIDTH)], **extra)
    with pytest.raises(TypeError, match="inputs must be LayerInputs, got Tensor: give mask"):
        attention(torch.randn(1, 2, DIM), torch.ones(1, 2).bool(), **extra)
    assert memory.lengths.tolist() == [0]


def softmax_attention(query, key, value, mask, scale):
    """The formula of PyTorch's attention; what a query gets that sees no key is not a number."""
    return (query @ key.transpose(-2, -1) * scale + mask).softmax(dim=-1) @ value


@pytest.mark.parametrize("kind", [Attention, KNNAttention])
def test_one_query_that_a_dense_bias_hides_every_key_from_attends_to_nothing(kind, monkeypatch):
    """In `eval()` as in training, whatever PyTorch's attention gives such a query."""
    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", softmax_attention)
    torch.manual_seed(0)
    attention = kind(dim=DIM, heads=HEADS, dim_head=WIDTH, xl_max_memories=1)
    extra = {"knn_memory": KNNMemory(WIDTH, 9, 2), "add_knn_memory": False} if kind is KNNAttention else {}
    x, cache, bias = torch.randn(2, 1, DIM), torch.randn(2, 1, 2, WIDTH), torch.zeros(2, HEADS, 1, 2)
    bias[0] = -torch.inf
    in_training, _ = attention(x, xl_memory=cache, rel_pos_bias=bias, **extra)
    out, _ = attention.eval()(x, xl_memory=cache, rel_pos_bias=bias, **extra)
    assert_close(out[0], attention.to_out(torch.zeros(1, HEADS * WIDTH)), SAME_GRAPH)
    assert torch.equal(out, in_training)


def test_a_plain_layer_in_float64_is_the_formula_in_float64():
    """Its 1 / sqrt(D) too, of a D whose root is no float32."""
    torch.manual_seed(0)
    attention = Attention(dim=DIM, heads=HEADS, dim_head=7).double()
    x = torch.randn(2, LENGTH, DIM, dtype=torch.float64)
    query = attention.to_q(x).unflatten(2, (HEADS, 7)).transpose(1, 2)
    key, value = attention.to_kv(x)[:, None].chunk(2, dim=-1)
    heads = torch.nn.functional.scaled_dot_product_attention(
        query, key.expand_as(query), value.expand_as(query), is_causal=True
    )
    assert_close(attention(x)[0], attention.to_out(heads.transpose(1, 2).flatten(2)), SAME_FORMULA)
