"""`whole_attention` attends to all that a memory holds, as float64 does, whatever the keys are like."""

from __future__ import annotations

import pytest
import torch
from helpers.checks import ATTENTION, LSE, assert_close
from helpers.devices import DEVICE, live_backends, seeded
from torch import Tensor

from memtrans_kernels import Ledger, StaleMemoryError, whole_attention
from memtrans_kernels.attention_inputs import WholeInputs

pytestmark = pytest.mark.device

on_every_backend = pytest.mark.parametrize("backend", live_backends("whole_attention"))
B, H, D, E, M, S = 2, 4, 24, 40, 70, 21
STORED = 150  # entries, ever: the ring has wrapped, in the middle of a tile


class Given(WholeInputs):
    """Arguments of `whole_attention`."""

    def seen(self) -> Tensor:
        """Which slots of each row hold an entry that a search may find (R, M + S)."""
        slots, newest = self.keys.shape[1], self.cursor[:, None] - 1
        entry = newest - (newest - torch.arange(slots, device=DEVICE)) % slots
        held = (entry >= self.start[:, None]) & (entry > newest - self.capacity)
        return held & self.keys.isfinite().all(dim=-1)


def given(
    entries: int = STORED,
    dtype: torch.dtype = torch.float32,
    groups: int = 2,
    length: int = 37,
    local: bool = True,
    scale: float = 6.0,
    width: int = D,
) -> Given:
    """Cosines, over rows that are permuted and one of which is not asked for; NaN in slots that nobody may read."""
    rows = B * groups + 1
    numbers = {"generator": seeded(0), "device": DEVICE}
    query, keys = torch.randn(B, H, length, width, **numbers), torch.randn(rows, M + S, width, **numbers)
    query, keys = (torch.nn.functional.normalize(t, dim=-1).to(dtype) for t in (query, keys))
    values = torch.randn(rows, M + S, E, **numbers).to(dtype)
    order = torch.arange(rows - 1, -1, -1, device=DEVICE)[: B * groups]
    start, cursor = torch.zeros(rows, dtype=torch.int64, device=DEVICE), torch.full((rows,), entries, device=DEVICE)
    parts: tuple[Tensor, ...] = ()
    if local:
        parts = torch.randn(B, H, length, E, **numbers).to(dtype), torch.randn(B, H, length, **numbers) * 3
        parts = *parts, torch.linspace(-2, 2, H, device=DEVICE)
    arguments = Given(query, keys, values, order, start, cursor, M, torch.full((H,), scale, device=DEVICE), *parts)
    hidden = ~arguments.seen()[..., None]
    return arguments._replace(keys=keys.masked_fill(hidden, torch.nan), values=values.masked_fill(hidden, torch.nan))


def in_float64(case: Given) -> tuple[Tensor, Tensor, float]:
    """Out, lse and the largest size of a logit, one head of one document at a time."""
    (batch, heads, length, _), groups = case.query.shape, case.rows.numel() // case.query.shape[0]
    out = torch.zeros(batch, heads, length, case.values.shape[2], dtype=torch.float64, device=DEVICE)
    lse, largest = torch.full((batch, heads, length), -torch.inf, dtype=torch.float64, device=DEVICE), 0.0
    for b in range(batch):
        for h in range(heads):
            row = int(case.rows[b * groups + h // (heads // groups)])
            seen = case.seen()[row]
            logits = float(case.scale[h]) * (case.query[b, h].double() @ case.keys[row, seen].double().T)
            value = case.values[row, seen].double()
            largest = max(largest, float(logits.abs().max())) if logits.numel() else largest
            if case.memory_offset is not None:
                logits = logits + float(case.memory_offset[h])
            if case.local_out is not None:  # one more key, of this query alone
                of_local = case.local_lse[b, h].double()
                logits = torch.cat([logits, of_local[:, None]], dim=1)
            lse[b, h] = logits.logsumexp(dim=1)
            weights = (logits - lse[b, h].nan_to_num(neginf=0.0)[:, None]).exp()
            out[b, h] = weights[:, : value.shape[0]] @ value
            if case.local_out is not None:
                out[b, h] += weights[:, -1:] * case.local_out[b, h].double()
    return out, lse, largest


def assert_right(case: Given, backend: str, dtype: torch.dtype = torch.float32) -> None:
    """A logit is rounded to 2^-24 of its size, and so is what it weighs."""
    expected_out, expected_lse, largest = in_float64(case)
    rounding = largest * 2.0**-23
    out, lse = whole_attention(*case, backend=backend)
    nothing = expected_lse == -torch.inf
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert torch.equal(lse == -torch.inf, nothing) and not out[nothing].any()
    assert_close(out, expected_out, ATTENTION[dtype] + rounding, "out")
    finite = expected_lse.masked_fill(nothing, 0.0)
    assert_close(lse.masked_fill(nothing, 0.0), finite, LSE + rounding, "lse")


@on_every_backend
@pytest.mark.parametrize("entries", [0, 1, 16, 64, M, M + S, M + S + 3, STORED, 2 * (M + S), 10_000])
def test_it_is_right_wherever_the_ring_stands(backend: str, entries: int) -> None:
    assert_right(given(entries), backend)


@on_every_backend
@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_it_is_right_in_every_dtype(backend: str, dtype: torch.dtype, groups: int, local: bool) -> None:
    if dtype == torch.bfloat16 and backend == "triton" and DEVICE == "cpu":
        pytest.skip("Triton's interpreter multiplies the bits of bfloat16 numbers")
    assert_right(given(dtype=dtype, groups=groups, local=local), backend, dtype)


@on_every_backend
def test_cleared_rows_and_queries_that_see_nothing_at_all(backend: str) -> None:
    case = given()
    start = case.start.clone()
    start[case.rows[0]] = STORED  # holds nothing
    start[case.rows[1]] = STORED - 3
    local_lse = case.local_lse.clone()
    local_lse[0, :, 5] = -torch.inf  # and saw nothing elsewhere
    assert_right(case._replace(start=start, local_lse=local_lse), backend)


KEYS = {
    "not finite": lambda keys: keys.masked_fill(torch.arange(D, device=DEVICE) == 3, torch.inf),
    "NaN": lambda keys: keys * torch.nan,
    "far longer": lambda keys: keys * 300.0,
    "far shorter": lambda keys: keys * 1e-4,
    "zero": lambda keys: keys * 0.0,
}


@on_every_backend
@pytest.mark.parametrize("scale", [0.1, 6.0, -6.0])
@pytest.mark.parametrize("which", ["the oldest", "the newest", "all but the oldest"])
@pytest.mark.parametrize("kind", KEYS)
def test_keys_that_the_others_do_not_tell_of(backend: str, kind: str, which: str, scale: float) -> None:
    """A kernel that guesses the largest logit by some keys must not be fooled by the others."""
    case = given(scale=scale)
    slot = torch.arange(M + S, device=DEVICE)
    oldest, newest = (STORED - M) % (M + S), (STORED - 1) % (M + S)
    chosen = {"the oldest": slot == oldest, "the newest": slot == newest, "all but the oldest": slot != oldest}[which]
    keys = torch.where(chosen[:, None], KEYS[kind](case.keys), case.keys)
    gone = (~keys.isfinite().all(dim=-1))[..., None]  # what stands beside such a key must not be read either
    assert_right(case._replace(keys=keys, values=case.values.masked_fill(gone, torch.nan)), backend)


@on_every_backend
def test_long_queries_among_short_ones(backend: str) -> None:
    case = given()
    query = case.query * torch.logspace(-6, 2, case.query.shape[2], device=DEVICE)[:, None]
    assert_right(case._replace(query=query, scale=case.scale / 6.0), backend)


@on_every_backend
def test_inputs_without_order_in_memory(backend: str) -> None:
    case = given()
    query = case.query.transpose(1, 2).contiguous().transpose(1, 2)
    local_out = case.local_out.transpose(1, 2).contiguous().transpose(1, 2)
    keys = torch.stack([case.keys, case.keys], dim=-1)[..., 0]
    assert_right(case._replace(query=query, local_out=local_out, keys=keys), backend)


@on_every_backend
def test_no_queries(backend: str) -> None:
    case = given(local=False)
    out, lse = whole_attention(*case._replace(query=case.query[:, :, :0]), backend=backend)
    assert out.shape == (B, H, 0, E) and lse.shape == (B, H, 0)


def test_a_wanted_gradient_is_an_error() -> None:
    case = given()
    with pytest.raises(RuntimeError, match="whole_attention has no gradient, and scale requires one"):
        whole_attention(*case._replace(scale=case.scale.requires_grad_()))
    with torch.no_grad():
        whole_attention(*case)


def test_a_derivative_by_torch_func_or_in_forward_mode_is_an_error() -> None:
    case = given(local=False)

    def out(query: Tensor) -> Tensor:
        return whole_attention(*case._replace(query=query))[0].sum()

    with pytest.raises(RuntimeError, match=r"no derivatives by torch\.func or in forward mode"), torch.no_grad():
        torch.func.jvp(out, (case.query,), (torch.ones_like(case.query),))
    with pytest.raises(RuntimeError, match=r"no derivatives by torch\.func or in forward mode"):
        torch.func.grad(lambda queries: torch.func.vmap(out)(queries).sum())(torch.stack([case.query] * 2))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_call_that_comes_too_late_is_an_error(compiled: bool) -> None:
    case, added = given(), torch.zeros(B * 2 + 1, dtype=torch.int64)
    call = torch.compile(whole_attention, fullgraph=True, backend="eager") if compiled else whole_attention
    with torch.no_grad():
        call(*case, ledger=Ledger(added + S, added, S))
        with pytest.raises(StaleMemoryError, match=f"spare={S} .* this search comes after {S + 1}"):
            call(*case, ledger=Ledger(added + S + 1, added, S))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"local_lse": None}, "local_out and local_lse must be given together"),
        ({"capacity": M + S + 1}, r"capacity must be in \[1, 91\], the slots of a row, got 92"),
        ({"scale": torch.ones(3)}, r"scale must have shape \(H\) with H=4, got \(3,\)"),
        ({"memory_offset": torch.ones(H, dtype=torch.int64)}, "memory_offset must be floating point"),
        ({"cursor": torch.zeros(5)}, "cursor must be torch.int64, got torch.float32"),
        ({"cursor": torch.full((5,), -1)}, "cursor must be at least 0"),
    ],
)
def test_arguments_that_do_not_fit_are_named(wrong: dict, message: str) -> None:
    moved = {name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in wrong.items()}
    if message.endswith("at least 0") and DEVICE != "cpu":
        pytest.skip("looking would make the host wait")
    with pytest.raises((ValueError, TypeError), match=message):
        whole_attention(*given()._replace(**moved))
