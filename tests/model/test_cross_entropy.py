"""The loss over a large vocabulary is the plain one, and never holds more than a chunk of its logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from helpers.checks import SAME_FORMULA, SAME_GRAPH, assert_as_close_as, assert_close
from helpers.devices import DEVICE, seeded
from helpers.scripts import benchmark_script
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from memtrans import MemorizingTransformer, cross_entropy
from memtrans.cross_entropy import fits, linear_cross_entropy

pytestmark = pytest.mark.device

POSITIONS, DIM, VOCABULARY, IGNORED = 23, 6, 11, -1
# positions by themselves, parts that are not of one size, a single part
CHUNKS = {"one": 1, "eight": 8 * VOCABULARY, "all": 1 << 25}


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


@pytest.fixture(params=CHUNKS)
def of_chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", CHUNKS[request.param])


@pytest.fixture
def low_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every loss that can be is made a few positions at a time."""
    monkeypatch.setattr(cross_entropy, "MOST_LOGITS", 0)
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", 5 * 50)


@pytest.fixture
def in_chunks(low_limits: None) -> Iterator[mock.Mock]:
    """Counts the losses that are made so."""
    with mock.patch("memtrans.vocabulary.linear_cross_entropy", side_effect=linear_cross_entropy) as counted:
        yield counted


def inputs(dtype: torch.dtype, bias: bool = True) -> tuple[Tensor, Tensor, Tensor | None]:
    """hidden, weight and bias, with gradients."""
    shapes = [(POSITIONS, DIM), (VOCABULARY, DIM), *([(VOCABULARY,)] if bias else [])]
    made = [torch.randn(shape, generator=seeded(place), dtype=torch.float32) for place, shape in enumerate(shapes)]
    hidden, weight, *others = (tensor.to(dtype).requires_grad_() for tensor in made)
    return hidden, weight, others[0] if others else None


def some_labels() -> Tensor:
    labels = torch.randint(VOCABULARY, (POSITIONS,), generator=seeded(9))
    labels[3:12] = IGNORED
    labels[-1] = IGNORED
    return labels


def plain(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, reduction: str = "mean") -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight, bias), labels, ignore_index=IGNORED, reduction=reduction)


def ours(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, reduction: str = "mean") -> Tensor:
    return linear_cross_entropy(hidden, weight, bias, labels, IGNORED, reduction)


def with_gradients(loss: Callable[..., Tensor], *given: Tensor | None, reduction: str = "mean") -> list[Tensor]:
    """The loss of hidden, weight, bias and labels, and the gradients of three times its value."""
    result = loss(*given, reduction)
    wanted = [tensor for tensor in given[:3] if tensor is not None and tensor.requires_grad]
    return [result, *torch.autograd.grad(3 * result, wanted)]


# ------------------------------------------------------------------------------------------------------- the same loss


@pytest.mark.usefixtures("of_chunks")
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_plain_loss_with_its_gradients(reduction: str, bias: bool) -> None:
    given = (*inputs(torch.float64, bias), some_labels())
    found, expected = (with_gradients(loss, *given, reduction=reduction) for loss in (ours, plain))
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float64
        assert_close(one, other, SAME_FORMULA)


@pytest.mark.usefixtures("of_chunks")
def test_of_each_position_without_gradients_too() -> None:
    given = (*inputs(torch.float64), some_labels())
    with torch.no_grad():
        found, expected = ours(*given, "none"), plain(*given, "none")
    assert_close(found, expected, SAME_FORMULA)
    assert not found[some_labels() == IGNORED].any()
    with torch.no_grad():
        assert_close(ours(*given, "mean"), plain(*given, "mean"), SAME_FORMULA)


@pytest.mark.usefixtures("of_chunks")
@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16_loses_as_little_as_in_the_plain_loss(autocast: bool) -> None:
    narrow = inputs(torch.bfloat16)
    exact = with_gradients(plain, *(tensor.detach().double().requires_grad_() for tensor in narrow), some_labels())
    given = [tensor.detach().float().requires_grad_() for tensor in narrow] if autocast else narrow
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        found, usual = (with_gradients(loss, *given, some_labels()) for loss in (ours, plain))
    for name, one, other, expected in zip(("loss", "hidden", "weight", "bias"), found, usual, exact, strict=True):
        assert one.dtype == other.dtype
        assert_as_close_as(other, one, expected, torch.bfloat16, name)


def test_labels_of_which_none_is_scored_give_what_the_plain_loss_gives() -> None:
    given, labels = inputs(torch.float32), torch.full((POSITIONS,), IGNORED)
    assert ours(*given, labels).isnan()
    for found in with_gradients(ours, *given, labels, reduction="sum"):
        assert not found.any()


def test_a_position_that_is_not_scored_spoils_nothing() -> None:
    hidden, weight, bias = inputs(torch.float32)
    with torch.no_grad():
        hidden[3] = 3e38  # its logits are infinite, and NaN
    hidden.requires_grad_()
    result, of_hidden, *_ = with_gradients(ours, hidden, weight, bias, some_labels())
    assert result.isfinite() and of_hidden.isfinite().all()


def test_only_the_gradients_that_are_wanted_are_made() -> None:
    hidden, weight, bias = inputs(torch.float64)
    frozen = weight.detach()
    expected = with_gradients(plain, hidden, weight, bias, some_labels())
    found = with_gradients(ours, hidden, frozen, bias, some_labels())
    for one, other in zip(found, (*expected[:2], expected[3]), strict=True):
        assert_close(one, other, SAME_FORMULA)
    operator = torch.ops.memtrans_model.linear_cross_entropy
    labels = some_labels()
    _, *gradients = operator(hidden, frozen, bias, labels, labels >= 0, [False, False, True], False)
    assert [gradient.numel() for gradient in gradients] == [0, 0, VOCABULARY]


def test_it_can_be_differentiated_twice() -> None:
    given, labels = inputs(torch.float64), some_labels()
    found = []
    for loss in (ours, plain):
        grads = torch.autograd.grad(loss(*given, labels), given, create_graph=True)
        found.append(torch.autograd.grad(sum(grad.square().sum() for grad in grads), given))
    for one, other in zip(*found, strict=True):
        assert_close(one, other, SAME_FORMULA)


def test_the_operator_passes_opcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", 8 * VOCABULARY)
    labels = some_labels()
    arguments = (*inputs(torch.float32), labels, labels >= 0, [True, True, True], False)
    torch.library.opcheck(torch.ops.memtrans_model.linear_cross_entropy.default, arguments)


# ----------------------------------------------------------------------------------------------------------- the memory


@pytest.mark.cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compiled", [False, True])
def test_no_more_is_held_than_a_chunk_of_the_logits(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, compiled: bool
) -> None:
    positions, dim, vocabulary, parts = 512, 8, 1000, 16
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", positions * vocabulary // parts)
    hidden = torch.randn(positions, dim, generator=seeded(0), requires_grad=True)
    weight = torch.randn(vocabulary, dim, generator=seeded(1), requires_grad=True)
    labels = torch.randint(vocabulary, (positions,), generator=seeded(2))

    def step(loss: Callable[..., Tensor]) -> None:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            result = loss(hidden, weight, None, labels)
        torch.autograd.grad(result, (hidden, weight))

    in_parts = torch.compile(ours, fullgraph=True) if compiled else ours
    step(in_parts)
    allocations = benchmark_script("allocations").allocations
    found, usual = allocations(lambda: step(in_parts)), allocations(lambda: step(plain))
    logits = 4 * positions * vocabulary  # bytes, in float32
    assert usual.largest >= logits and usual.peak >= 2 * logits  # they would be seen
    assert found.largest <= logits // parts
    # of a chunk the logits and their logarithms, or in place of both the gradient; where a compiler makes that of the
    # logits, in half the width; and a few times what is learned, which is small
    chunks = 1 if compiled and dtype == torch.bfloat16 else 2
    assert found.peak <= chunks * logits // parts + 3 * 4 * dim * (positions + vocabulary)


# ------------------------------------------------------------------------------------------------------------ the model


def build(**options: object) -> MemorizingTransformer:
    torch.manual_seed(0)
    sizes = {"num_tokens": 50, "dim": 16, "depth": 2, "dim_head": 8, "heads": 2, "memorizing_layers": ()}
    return MemorizingTransformer(**{**sizes, "pad_id": 0, **options})


X = torch.randint(1, 50, (2, 12), generator=seeded(3))
LABELS = torch.randint(1, 50, (2, 12), generator=seeded(4))
LABELS[0, :3], LABELS[1, -4:] = 0, -100


def learned(model: nn.Module, loss: Callable[..., Tensor] | None = None, **options: object) -> list[Tensor]:
    """The loss of a model and the gradients of its parameters."""
    result = (model if loss is None else loss)(X, labels=LABELS, **options)
    result.backward()
    return [result, *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]


def expected_of(change: Callable[[nn.Module], object] = lambda model: None, **options: object) -> list[Tensor]:
    """The same without chunks."""
    with mock.patch.object(cross_entropy, "MOST_LOGITS", 1 << 26):
        model = build()
        change(model)
        return learned(model, **options)


def assert_all_close(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, SAME_GRAPH)


def tie(model: nn.Module) -> None:
    model.to_logits[1].weight = model.token_emb.weight


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("change", [lambda model: None, tie], ids=["", "tied"])
def test_a_model_learns_the_same_in_chunks(in_chunks: mock.Mock, reduction: str, change: Callable) -> None:
    expected = expected_of(change, reduction=reduction)
    assert not in_chunks.called
    model = build()
    change(model)
    assert_all_close(learned(model, reduction=reduction), expected)
    assert in_chunks.called


@pytest.mark.usefixtures("low_limits")
def test_so_does_one_that_is_compiled_whole() -> None:
    expected, model, graphs = expected_of(), build(), []

    def seen(graph: torch.fx.GraphModule, given: list) -> Callable:
        graphs.append(graph.code)
        return torch._dynamo.lookup_backend("inductor")(graph, given)

    assert_all_close(learned(model, torch.compile(model, fullgraph=True, backend=seen)), expected)
    assert len(graphs) == 1 and "linear_cross_entropy" in graphs[0]


def test_tokens_have_losses_of_their_own(in_chunks: mock.Mock) -> None:
    model = build(xl_max_memories=4)
    with torch.no_grad():
        each, _ = model(X, labels=LABELS, reduction="none")
        total, _ = model(X, labels=LABELS, reduction="sum")
    assert in_chunks.call_count == 2
    assert each.shape == LABELS.shape and not each[LABELS <= 0].any()
    assert_close(each.sum(), total, SAME_GRAPH)
    with_graph, _ = model(X, labels=LABELS, reduction="none")  # of which each may be weighted: all logits are kept
    assert in_chunks.call_count == 2 and with_graph.requires_grad
    assert_close(with_graph, each, SAME_GRAPH)


class Other(nn.Linear):
    """A layer whose forward pass may be another."""


def replaced(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> None:
    model.to_logits[1] = make(model.to_logits[1])


def other_class(linear: nn.Linear) -> nn.Module:
    made = Other(linear.in_features, linear.out_features)
    made.load_state_dict(linear.state_dict())
    return made


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "another class": lambda model: replaced(model, other_class),
    "wrapped": lambda model: replaced(model, lambda linear: nn.Sequential(linear)),
    "a parametrisation": lambda model: weight_norm(model.to_logits[1]),
    "a hook": lambda model: model.to_logits[1].register_forward_hook(lambda *_: None),
    "a hook of both": lambda model: model.to_logits.register_forward_pre_hook(lambda *_: None),
    "float16": lambda model: None,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_head_that_may_be_something_else_is_called(in_chunks: mock.Mock, change: str) -> None:
    expected, model = expected_of(CHANGES[change]), build()
    CHANGES[change](model)
    with torch.autocast(DEVICE, torch.float16, enabled=change == "float16"):
        found = learned(model)
    assert not in_chunks.called
    if change != "float16":
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("wanted", ["of weights", "of embeddings", "forward"])
def test_transforms_get_the_plain_loss(in_chunks: mock.Mock, monkeypatch: pytest.MonkeyPatch, wanted: str) -> None:
    monkeypatch.setenv("MEMTRANS_BACKEND", "reference")  # attention's, which transforms know
    model, hidden, tangent = build(), *torch.randn(2, *X.shape, 16, generator=seeded(5))
    own = dict(model.named_parameters())

    def loss(weights: dict[str, Tensor], embeddings: Tensor) -> Tensor:
        return torch.func.functional_call(model, weights, (), {"inputs_embeds": embeddings, "labels": LABELS})

    of_own = partial(loss, own)
    ways: dict[str, Callable[[], object]] = {
        "of weights": lambda: torch.func.grad(loss)(own, hidden),
        "of embeddings": lambda: torch.func.grad(of_own)(hidden),
        "forward": lambda: torch.func.jvp(of_own, (hidden,), (tangent,)),
    }
    found = torch.utils._pytree.tree_leaves(ways[wanted]())
    assert not in_chunks.called
    monkeypatch.setattr(cross_entropy, "MOST_LOGITS", 1 << 26)
    assert_all_close(found, torch.utils._pytree.tree_leaves(ways[wanted]()))


def test_few_logits_are_kept() -> None:
    with mock.patch("memtrans.vocabulary.linear_cross_entropy") as never:
        loss = build()(X, labels=LABELS)
    assert not never.called
    targets = LABELS.masked_fill(LABELS == -100, 0).flatten()
    assert torch.equal(loss, F.cross_entropy(build()(X).flatten(0, 1), targets, ignore_index=0))
    assert cross_entropy.in_chunks(1 << 18, 257) and not cross_entropy.in_chunks(1 << 18, 256)


def test_what_dtypes_fit() -> None:
    hidden, weight, bias = inputs(torch.float32)
    assert fits(hidden, weight, bias) and fits(hidden.bfloat16(), weight.bfloat16(), None)
    assert not fits(hidden.bfloat16(), weight, bias) and not fits(hidden.half(), weight.half(), None)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert fits(hidden, weight.bfloat16(), bias) and not fits(hidden, weight.double(), bias)


def test_another_reduction_is_refused() -> None:
    with pytest.raises(ValueError, match="reduction must be one of mean, sum, none, got 'average'"):
        build()(X, labels=LABELS, reduction="average")
