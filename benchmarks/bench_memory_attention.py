"""Attention to given neighbours and to the local context, forward and with its gradients, against its rivals.

`-xl512` puts 512 cached keys before the segment's own. All are given slots and scores, memories full and wrapped.
`-k64` and `-k256` retrieve so many neighbours. `-mask` hides no key by a mask that is read, `-first` none by a number
for each query, `-sink` and `-cap` have those, `-both-ways` is not causal: the operator alone, next to the case without.

- `upstream`: that package's arithmetic on the device of the tensors: neighbours gathered as pairs (B, H, N, K, 2, D)
  out of a memory in the query's dtype, logits concatenated, one softmax, a dense bias.
- `flex`: FlexAttention for the local part, its bias looked up by distance; neighbours gathered; both merged by their
  lse. `flex-dense` reads a dense bias instead, whose gradient has fewer additions to one number.
- `sdpa-dense`: attends to the whole memory instead of K neighbours, without any local context.

Each entry has `bytes`, what any implementation that gathers must read: the neighbours' values, and with gradients their
keys and the values once more. `peak_bytes` is allocated at most, inputs included; `input_bytes` and `output_bytes` are
the least it could be; `ring_bytes` is what of the inputs is memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
import upstream
from common import DEVICE, TOY, bytes_of, case, compiled, full_ring, measure, peak_bytes
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

from memtrans_kernels import memory_attention

XL = "-xl512"
GPU_CASES = ("d64-64k", "d64-64k-xl512", "d128-64k", "paper-64k", "decode-d64-64k", "decode-d64-64k-xl512")
ARGUMENTS = ("-mask", "-first", "-sink", "-cap", "-both-ways")
OF_ARGUMENTS = ("-k64", "-k256", *ARGUMENTS)
ALONE = ("d256-64k", *(f"d64-64k{name}" for name in OF_ARGUMENTS))  # without rivals
CPU_CASES = ("cpu-d64-64k", "cpu-d64-64k-xl512")
CPU_ALONE = ("cpu-d128-64k", "cpu-d256-64k", *(f"cpu-d64-64k{name}" for name in OF_ARGUMENTS))
TOY_CASES = ("d64-64k-xl512", "paper-64k", "decode-d64-64k", "d64-64k-mask")
CASES = TOY_CASES if TOY else GPU_CASES + ALONE if DEVICE == "cuda" else CPU_CASES + CPU_ALONE
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
DISTANCES = 129  # of the bias table: T5 tells distances up to 128 apart
SAME = {torch.float32: 5e-3, torch.bfloat16: 8e-2}  # between implementations; the largest value is about 4
FORWARD, BACKWARD = "forward", "forward+backward"


@dataclass
class Problem:
    """Arguments of `memory_attention` at the neighbours that a search might have found."""

    query: Tensor  # (B, H, N, D)
    key: Tensor  # (B, G, L, D)
    value: Tensor  # (B, G, L, D)
    memory_keys: Tensor
    memory_values: Tensor
    rows: Tensor
    scores: Tensor  # (B, H, N, K)
    slots: Tensor  # (B, H, N, K)
    scale: Tensor  # (H,)
    bias_table: Tensor  # (H, distances)
    causal: bool = True
    key_mask: Tensor | None = None  # (B, L)
    first: Tensor | None = None  # (B, N)
    soft_cap: float | None = None
    sink: Tensor | None = None  # (H,)

    @property
    def row_of_head(self) -> Tensor:
        """(B, H, 1, 1)"""
        batch, groups = self.key.shape[:2]
        return self.rows.reshape(batch, groups).repeat_interleave(self.query.shape[1] // groups, 1)[..., None, None]

    @property
    def distance(self) -> Tensor:
        """How far behind its query a local key stands (N, L)."""
        length, local = self.query.shape[2], self.key.shape[2]
        position = torch.arange(local, device=self.query.device)
        return position[local - length :, None] - position

    @property
    def gathered_bytes(self) -> int:
        """Of the values that a forward pass cannot do without."""
        return self.slots.numel() * self.memory_values.shape[-1] * self.memory_values.element_size()


class Rival(NamedTuple):
    """One implementation, ready to run."""

    function: Callable[[], Tensor]  # out (B, H, N, D)
    leaves: list[Tensor]  # what its gradients are of
    others: list[Tensor]  # what else it reads
    ring: list[Tensor]  # the memory


def problem(name: str) -> Problem:
    """Random unit queries and keys; neighbours anywhere in the memory."""
    name, argument = split_name(name)
    name, _, neighbours = name.partition("-k")
    sizes = case(name.removesuffix(XL))
    sizes = replace(sizes, neighbours=int(neighbours)) if neighbours else sizes
    batch, heads, groups, length, width = sizes.batch, sizes.heads, sizes.groups, sizes.length, sizes.width
    cached = (3 if TOY else 512) if name.endswith(XL) else 0
    ring = full_ring(sizes, torch.float32 if DEVICE == "cpu" else torch.float16, DEVICE)
    query, key, value = (
        torch.randn(batch, count, tokens, width, device=DEVICE)
        for count, tokens in ((heads, length), (groups, cached + length), (groups, cached + length))
    )
    query, key, value = F.normalize(query, dim=-1).to(DTYPE), F.normalize(key, dim=-1).to(DTYPE), value.to(DTYPE)
    slots = torch.randint(ring.keys.shape[1], (batch, heads, length, sizes.neighbours), device=DEVICE)
    scale, table = torch.full((heads,), 20.0, device=DEVICE), torch.randn(heads, DISTANCES, device=DEVICE)
    given = Problem(query, key, value, ring.keys, ring.values, ring.rows, slots.float(), slots.int(), scale, table)
    retrieved = ring.keys[given.row_of_head, slots]
    given.scores = (query.to(retrieved.dtype)[:, :, :, None] * retrieved).sum(-1, dtype=torch.float32)
    return replace(given, **argument_of(argument, given))


def split_name(name: str) -> tuple[str, str]:
    """A case, and the argument that it ends in, "" for none."""
    argument = next((suffix for suffix in ARGUMENTS if name.endswith(suffix)), "")
    return name.removesuffix(argument), argument


def argument_of(name: str, given: Problem) -> dict[str, Any]:
    """One more argument, which changes no result but in the cases that are named after a cap, a sink or both ways."""
    batch, heads, length, _ = given.query.shape
    if name == "-mask":
        return {"key_mask": torch.ones(batch, given.key.shape[2], dtype=torch.bool, device=DEVICE)}
    if name == "-first":
        return {"first": torch.zeros(batch, length, dtype=torch.int64, device=DEVICE)}
    if name == "-sink":
        return {"sink": torch.randn(heads, device=DEVICE)}
    return {"": {}, "-cap": {"soft_cap": 50.0}, "-both-ways": {"causal": False}}[name]


def ours(given: Problem) -> Rival:
    leaves = [given.query, given.key, given.value, given.scale, given.bias_table]
    leaves += [] if given.sink is None else [given.sink]
    others, ring = [given.rows, given.scores, given.slots], [given.memory_keys, given.memory_values]
    others += [tensor for tensor in (given.key_mask, given.first) if tensor is not None]
    defaults = {field.name: field.default for field in fields(given)}  # not passed, so that older trees can be measured
    arguments = {name: value for name, value in vars(given).items() if value is not defaults[name]}
    return Rival(lambda: memory_attention(**arguments)[0], leaves, others, ring)


def dense_bias(given: Problem, dtype: torch.dtype) -> Tensor:
    """(H, N, L), given: upstream makes it once for all its layers."""
    return given.bias_table[:, given.distance.clamp(0, DISTANCES - 1)].to(dtype)


def upstreams_arithmetic(given: Problem) -> Rival:
    memory = torch.stack((given.memory_keys, given.memory_values), dim=-2).to(DTYPE)  # (R, M + S, 2, D)
    row, scale, bias = given.row_of_head, given.scale.to(DTYPE)[:, None, None], dense_bias(given, DTYPE)

    def attend() -> Tensor:
        return upstream.attend(given.query, given.key, given.value, memory[row, given.slots], scale, bias)

    return Rival(attend, [given.query, given.key, given.value, scale, bias], [row, given.slots], [memory])


def upstream_compiled(given: Problem) -> Rival:
    rival = upstreams_arithmetic(given)
    return rival._replace(function=compiled(rival.function))


def flex_options(length: int, local: int, bias: Tensor) -> dict[str, Any]:
    """Of FlexAttention to local keys: who sees whom, and the bias, by distance (H, distances) or dense (H, N, L)."""
    cached = local - length

    def with_bias(score: Tensor, b: Tensor, h: Tensor, n: Tensor, j: Tensor) -> Tensor:
        return score + (bias[h, n, j] if bias.dim() == 3 else bias[h, (n + cached - j).clamp(0, DISTANCES - 1)])

    causal = create_block_mask(lambda b, h, n, j: j <= n + cached, None, None, length, local, device=DEVICE)
    return {"score_mod": with_bias, "block_mask": causal, "enable_gqa": True}


def flex(given: Problem, dense: bool = False) -> Rival:
    row = given.row_of_head
    bias = dense_bias(given, torch.float32) if dense else given.bias_table
    options = flex_options(given.query.shape[2], given.key.shape[2], bias)

    def attend() -> Tensor:
        query = given.query * given.scale[:, None, None].to(DTYPE)
        near, aux = flex_attention(query, given.key, given.value, scale=1.0, return_aux=AuxRequest(lse=True), **options)
        if query.requires_grad:  # the gradient of the scores needs the neighbours' keys
            retrieved = given.memory_keys[row, given.slots].to(DTYPE)
            logits = torch.einsum("bhnd,bhnkd->bhnk", query, retrieved).float()
        else:
            logits = given.scores * given.scale[:, None, None]
        lse = torch.logaddexp(aux.lse, logits.logsumexp(dim=-1))[..., None]
        values = given.memory_values[row, given.slots].to(DTYPE)
        far = torch.einsum("bhnk,bhnkd->bhnd", (logits - lse).exp().to(DTYPE), values)
        return near * (aux.lse[..., None] - lse).exp().to(DTYPE) + far

    leaves = [given.query, given.key, given.value, given.scale, bias]
    others, ring = [row, given.scores, given.slots], [given.memory_keys, given.memory_values]
    return Rival(compiled(attend), leaves, others, ring)


def flex_dense(given: Problem) -> Rival:
    return flex(given, dense=True)


def sdpa_dense(given: Problem) -> Rival:
    """The memory gets no gradient, as in all the others."""
    batch, groups = given.key.shape[:2]
    memory = (given.memory_keys, given.memory_values)
    ring = [tensor.unflatten(0, (batch, groups)).to(DTYPE) for tensor in memory]
    attend = lambda: F.scaled_dot_product_attention(given.query, *ring, scale=20.0, enable_gqa=True)  # noqa: E731
    return Rival(attend, [given.query], [], ring)


RIVALS: dict[str, Callable[[Problem], Rival]] = {"memtrans": ours, "upstream": upstreams_arithmetic}
if DEVICE == "cuda" or TOY:
    RIVALS |= {"upstream-compiled": upstream_compiled, "flex": flex, "flex-dense": flex_dense, "sdpa-dense": sdpa_dense}


def has_gradients(name: str, impl: str) -> bool:
    """Nobody trains token by token, and FlexAttention refuses to on a CPU."""
    return not name.startswith("decode-") and (DEVICE == "cuda" or not impl.startswith("flex"))


MEASURED = [(name, impl, FORWARD) for name in CASES for impl in RIVALS]
MEASURED += [(name, impl, BACKWARD) for name in CASES for impl in RIVALS if has_gradients(name, impl)]
MEASURED = [(name, impl, mode) for name, impl, mode in MEASURED if impl == "memtrans" or name not in ALONE + CPU_ALONE]


def step(rival: Rival, grad_out: Tensor, mode: str) -> Callable[[], list[Tensor]]:
    """What is timed; it returns all that it computes: out, and with gradients those of the leaves."""
    for leaf in rival.leaves:
        leaf.requires_grad_(mode == BACKWARD)

    def forward() -> list[Tensor]:
        return [rival.function()]

    def with_gradients() -> list[Tensor]:
        out = rival.function()
        return [out.detach(), *torch.autograd.grad(out, rival.leaves, grad_out)]

    return forward if mode == FORWARD else with_gradients


def assert_same_as_ours(given: Problem, grad_out: Tensor, mode: str, actual: list[Tensor]) -> None:
    """Out, and the gradients of query, key and value."""
    expected = step(ours(given), grad_out, mode)()
    for mine, theirs in zip(expected[:4], actual[:4], strict=True):
        largest = max(1.0, float(mine.abs().max()))
        torch.testing.assert_close(theirs, mine, atol=SAME[DTYPE] * largest, rtol=0.0, check_dtype=False)


@pytest.mark.parametrize(("name", "impl", "mode"), MEASURED)
def test_memory_attention(benchmark: Any, name: str, impl: str, mode: str) -> None:
    torch.manual_seed(0)
    given = problem(name)
    rival, grad_out = RIVALS[impl](given), torch.randn_like(given.query)
    run = step(rival, grad_out, mode)
    results = run()
    output_bytes = bytes_of(results)
    if impl != "sdpa-dense":
        assert_same_as_ours(given, grad_out, mode, results)
    del results
    inputs = [*rival.leaves, *rival.others, *rival.ring, *([grad_out] if mode == BACKWARD else [])]
    measure(
        benchmark, run, op="memory_attention", impl=impl, case=name, mode=mode, dtype=DTYPE,
        peak_bytes=peak_bytes(run, bytes_of(inputs)), input_bytes=bytes_of(inputs), output_bytes=output_bytes,
        ring_bytes=bytes_of(rival.ring),
        **({} if impl == "sdpa-dense" else {"bytes": given.gathered_bytes * (1 if mode == FORWARD else 3)}),
    )  # fmt: skip
