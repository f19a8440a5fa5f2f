"""Attention to given neighbours and to the local context, forward and with its gradients.

`-xl512` puts 512 cached keys before the segment's own. `upstream` is that package's arithmetic on the device of the
tensors: neighbours gathered as pairs, logits concatenated, a dense bias. `sdpa-dense` attends to the whole memory
instead of K neighbours, without any local context, and has no backward pass here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from common import DEVICE, case, full_ring, measure
from torch import Tensor

from memtrans_kernels import memory_attention

XL = "-xl512"
CASES = ["cpu-d64-64k"] if DEVICE == "cpu" else ["d64-64k", "d64-64k-xl512", "d128-64k", "paper-64k", "decode-d64-64k"]
DISTANCES = 129  # of the bias table: T5 tells distances up to 128 apart


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

    @property
    def leaves(self) -> list[Tensor]:
        return [self.query, self.key, self.value, self.scale, self.bias_table]

    @property
    def gathered_bytes(self) -> int:
        """Of the values that a forward pass cannot do without."""
        return self.slots.numel() * self.memory_values.shape[-1] * self.memory_values.element_size()


def problem(name: str, dtype: torch.dtype) -> Problem:
    """Random unit queries and keys; neighbours anywhere in the memory."""
    sizes = case(name.removesuffix(XL))
    batch, heads, groups, length, width = sizes.batch, sizes.heads, sizes.groups, sizes.length, sizes.width
    local = length + (512 if name.endswith(XL) else 0)
    ring = full_ring(sizes, torch.float32 if DEVICE == "cpu" else torch.float16, DEVICE)
    query, key, value = (
        torch.randn(batch, count, tokens, width, device=DEVICE)
        for count, tokens in ((heads, length), (groups, local), (groups, local))
    )
    query, key, value = F.normalize(query, dim=-1).to(dtype), F.normalize(key, dim=-1).to(dtype), value.to(dtype)
    slots = torch.randint(ring.keys.shape[1], (batch, heads, length, sizes.neighbours), device=DEVICE)
    of_head = ring.rows.reshape(batch, groups).repeat_interleave(heads // groups, dim=1)[:, :, None, None]
    scores = (query.to(ring.keys.dtype)[:, :, :, None] * ring.keys[of_head, slots]).sum(-1, dtype=torch.float32)
    scale, table = torch.full((heads,), 20.0, device=DEVICE), torch.randn(heads, DISTANCES, device=DEVICE)
    given = Problem(query, key, value, ring.keys, ring.values, ring.rows, scores, slots.int(), scale, table)
    for leaf in given.leaves:
        leaf.requires_grad_()
    return given


def ours(given: Problem) -> Tensor:
    return memory_attention(**vars(given))[0]


def upstream(given: Problem) -> Tensor:
    """One softmax over concatenated logits; every head's neighbours gathered as (B, H, N, K, 2, D)."""
    batch, heads, length, _ = given.query.shape
    groups, local = given.key.shape[1:3]
    row = given.rows.reshape(batch, groups).repeat_interleave(heads // groups, dim=1)[:, :, None, None]
    pairs = torch.stack((given.memory_keys[row, given.slots], given.memory_values[row, given.slots]), dim=-2)
    memory_key, memory_value = pairs.to(given.query.dtype).unbind(dim=-2)
    scale = given.scale.to(given.query.dtype)[:, None, None]
    distance = torch.arange(local - length, local, device=row.device)[:, None] - torch.arange(local, device=row.device)
    bias = given.bias_table.to(given.query.dtype)[:, distance.clamp(0, DISTANCES - 1)]
    of_group = given.query.unflatten(1, (groups, -1))
    dot = torch.einsum("bghnd,bgld->bghnl", of_group, given.key).flatten(1, 2)
    near = (dot * scale + bias).masked_fill(distance < 0, -torch.inf)
    far = torch.einsum("bhnd,bhnkd->bhnk", given.query, memory_key) * scale
    to_memory, to_local = torch.cat((far, near), dim=-1).softmax(dim=-1).split([far.shape[-1], local], dim=-1)
    local_out = torch.einsum("bghnl,bgld->bghnd", to_local.unflatten(1, (groups, -1)), given.value).flatten(1, 2)
    return torch.einsum("bhnk,bhnkd->bhnd", to_memory, memory_value) + local_out


def sdpa_dense(given: Problem) -> Tensor:
    """Attends to every slot of the memory."""
    batch, groups = given.key.shape[:2]
    memory = (given.memory_keys, given.memory_values)
    keys, values = (tensor.unflatten(0, (batch, groups)).to(given.query.dtype) for tensor in memory)
    return F.scaled_dot_product_attention(given.query, keys, values, scale=20.0, enable_gqa=True)


IMPLEMENTATIONS: dict[str, Callable[[Problem], Tensor]] = {"memtrans": ours, "upstream": upstream}
if DEVICE == "cuda":
    IMPLEMENTATIONS |= {"upstream-compiled": torch.compile(upstream, dynamic=False), "sdpa-dense": sdpa_dense}
FORWARD, BACKWARD = "forward", "forward+backward"


def with_gradients(function: Callable[[Problem], Tensor], given: Problem, grad_out: Tensor) -> None:
    torch.autograd.grad(function(given), given.leaves, grad_out)


def without_gradients(function: Callable[[Problem], Tensor], given: Problem) -> None:
    with torch.no_grad():
        function(given)


def peak_bytes(run: Callable[[], Any]) -> int:
    """Allocated at most, inputs included; 0 on a CPU."""
    if DEVICE == "cpu":
        return 0
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


@pytest.mark.parametrize("mode", [FORWARD, BACKWARD])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", CASES)
def test_memory_attention(benchmark: Any, name: str, impl: str, mode: str) -> None:
    if mode == BACKWARD and (impl == "sdpa-dense" or name.startswith("decode-")):
        pytest.skip("forward only")
    dtype = torch.float32 if DEVICE == "cpu" else torch.bfloat16
    given = problem(name, dtype)
    function = IMPLEMENTATIONS[impl]
    grad_out = torch.randn_like(given.query)
    step = without_gradients if mode == FORWARD else partial(with_gradients, grad_out=grad_out)
    run = partial(step, function, given)
    measure(
        benchmark, run, op="memory_attention", impl=impl, case=name, mode=mode, dtype=dtype,
        gathered_bytes=given.gathered_bytes, peak_bytes=peak_bytes(run),
    )  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_upstreams_arithmetic_is_ours(name: str) -> None:
    given = problem(name, torch.float32)
    with torch.no_grad():
        expected, actual = upstream(given), ours(given)
    torch.testing.assert_close(actual, expected, atol=5e-3, rtol=0.0)  # upstream rounds no score to the ring's dtype
