"""A memorizing layer as a whole: project, search, attend, add, and back, over a memory that is full and has wrapped.

- `memtrans`: `KNNAttention` with one softmax; `memtrans-gate` with two and a gate; `memtrans-all` attends to all of the
  memory, without a search. `dense` does so by PyTorch's attention, beside the kernel for the local context; it has a
  gate, because PyTorch's attention gives no denominator to put two parts together with.
- `upstream`: the same layer in that package's arithmetic on the device, see `upstream.py`.
- `upstream-package`: the package itself where it is installed, with its memory on the CPU, read and not added to: an
  approximate index that begins anew when it is full.
- `memtrans-untraced`, `memtrans-traced`: the forward pass by itself, call by call, without and with
  `KNNMemoryList.tracing()`: at most 1.3 times the one the other.
- `attention`: the plain `Attention` layer of the same shape, without memory; `attention-sdpa` is the same layer with
  PyTorch's attention and a dense bias in place of the kernel.

Parameters and inputs are in the entry's dtype; gradients are those of the input, the bias and every parameter. In cases
of `d64` the layer has the projections of a model that was trained on text (trained_keys.py), the memory holds what it
made of the text, and each step reads the next segment of it; in those of `paper` all are random, and each step draws a
new input, in the time of every candidate. One input over and over would fill a memory with equal keys.
`peak_bytes` counts them, and what a step allocates, but not the memory's storage.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import upstream
from common import DEVICE, TOY, Case, bytes_of, case, compiled, measure, peak_bytes
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from trained_keys import entries, trained, with_trained_weights

from memtrans import Attention, KNNAttention, KNNMemory, KNNMemoryList
from memtrans.position import T5RelativePositionBias, expand_table
from memtrans_kernels import cosine, local_attention

SMALL_CASE = "d64-8k"  # of those that attend to all of a memory, and of those beside them
GPU_CASES = ("d64-64k", "paper-64k")
TEXT = ("trained", 500)
CASES = GPU_CASES if DEVICE == "cuda" or TOY else ("cpu-d64-64k",)
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


class SdpaAttention(Attention):
    """`Attention` through PyTorch's own, with a dense bias and no kernel of ours."""

    def forward(self, x: Tensor, *, rel_pos_bias: Tensor) -> Tensor:
        query, key, value = self.project(x)
        length = query.shape[2]
        future = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        mask = expand_table(rel_pos_bias, length, length)[None].to(query.dtype).masked_fill(future, -torch.inf)
        out = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=self.scale, enable_gqa=True)
        return self.to_out(out.transpose(1, 2).flatten(2))


class DenseAttention(KNNAttention):
    """`KNNAttention` that attends to all of a full memory by PyTorch's attention; heads that share keys are queries of
    one, which is the fastest way to ask it."""

    def forward(self, x: Tensor, *, knn_memory: KNNMemory, rel_pos_bias: Tensor) -> Tensor:
        snapshot = knn_memory.snapshot(like=x, longest=x.shape[1])
        query, key, value = self.project(x)
        query, key = cosine(query, key)
        scale = self.temperature()
        keys, values = (
            ring[:, None, : knn_memory.max_memories].to(query.dtype) for ring in (snapshot.keys, snapshot.values)
        )
        by_group = (query * scale[:, None, None]).to(query.dtype).flatten(1, 2)[:, None]  # (B, 1, H·N, D)
        to_memory = scaled_dot_product_attention(by_group, keys, values, scale=1.0).view_as(query)
        to_local, _ = local_attention(query, key, value, scale, rel_pos_bias)
        out = to_local.lerp(to_memory, self.memory_gate.sigmoid().to(query.dtype)[:, None, None])
        snapshot.append(key.detach(), value.detach())
        return self.to_out(out.transpose(1, 2).flatten(2))


class Candidate(NamedTuple):
    """A layer, and what it is called with besides its input."""

    layer: nn.Module
    arguments: dict[str, Any]
    bias: Tensor


def pairs(sizes: Case, entries: int) -> Tensor:
    """Random keys of unit length and values (B, G, entries, 2, D)."""
    made = torch.randn(sizes.batch, sizes.groups, entries, 2, sizes.width, device=DEVICE)
    made[..., 0, :] /= made[..., 0, :].norm(dim=-1, keepdim=True)
    return made.to(DTYPE)


def of_text(sizes: Case) -> bool:
    """Whether a case is timed on what a trained model makes of text."""
    return sizes.name.startswith("d64")


def full_memory(sizes: Case, dtype: torch.dtype | None = None) -> KNNMemory:
    """Filled a segment at a time, until the ring has wrapped and no slot is empty."""
    memory = KNNMemory(
        sizes.width, sizes.capacity, sizes.batch, kv_heads=sizes.groups, spare=sizes.length, device=DEVICE, dtype=dtype
    )
    for _ in range(3):
        new = pairs(sizes, sizes.length)
        memory.add(new if sizes.groups > 1 else new[:, 0])
    segments = sizes.capacity // sizes.length
    if of_text(sizes):
        of_model = torch.stack(entries(trained(*TEXT), sizes.capacity), dim=-2)  # (B, M, 2, D)
        for new in of_model.split(sizes.length, dim=1):
            memory.add(new)
    else:
        for _ in range(segments):
            new = pairs(sizes, sizes.length)
            memory.add(new if sizes.groups > 1 else new[:, 0])
    assert int(memory.lengths.min()) == sizes.capacity
    return memory


def table(sizes: Case) -> Tensor:
    """Bias by distance (H, distances)."""
    return T5RelativePositionBias(scale=1.0, heads=sizes.heads).to(DEVICE).table().detach()


def dense(sizes: Case) -> Tensor:
    """(1, H, N, N)"""
    return expand_table(table(sizes), sizes.length, sizes.length)[None].to(DTYPE)


def shape(sizes: Case) -> dict[str, int]:
    return {"dim": sizes.heads * sizes.width, "heads": sizes.heads, "dim_head": sizes.width, "kv_heads": sizes.groups}


def ours(
    sizes: Case,
    folder: Path,
    combine: str = "softmax",
    attend_to: str = "neighbours",
    kind: type[KNNAttention] = KNNAttention,
) -> Candidate:
    options = {} if attend_to == "neighbours" else {"attend_to": attend_to}  # which older commits do not have
    layer = kind(**shape(sizes), num_retrieved_memories=sizes.neighbours, combine=combine, **options)
    if of_text(sizes):
        with_trained_weights(trained(*TEXT), layer)
    bias = table(sizes)
    whole = kind is DenseAttention or attend_to == "all"  # a memory in the dtype of the queries is read as it is
    return Candidate(layer, {"knn_memory": full_memory(sizes, DTYPE if whole else None), "rel_pos_bias": bias}, bias)


def all_of_the_memory(sizes: Case, folder: Path) -> Candidate:
    return ours(sizes, folder, attend_to="all")


def dense_attention(sizes: Case, folder: Path) -> Candidate:
    return ours(sizes, folder, combine="gate", kind=DenseAttention)


def ours_with_a_gate(sizes: Case, folder: Path) -> Candidate:
    return ours(sizes, folder, combine="gate")


def upstreams_arithmetic(sizes: Case, folder: Path) -> Candidate:
    chunks = [pairs(sizes, sizes.length) for _ in range(sizes.capacity // sizes.length)]
    layer = upstream.Layer(sizes.heads * sizes.width, sizes.heads, torch.cat(chunks, dim=2), sizes.neighbours)
    bias = dense(sizes)
    return Candidate(layer, {"bias": bias}, bias)


def upstreams_package(sizes: Case, folder: Path) -> Candidate:
    package = pytest.importorskip("memorizing_transformers_pytorch")
    memory = package.KNNMemory(
        sizes.width, sizes.capacity, sizes.batch, memmap_filename=str(folder / "memory"), multiprocessing=False
    )
    memory.add(pairs(sizes, sizes.capacity)[:, 0].float())
    options = {name: size for name, size in shape(sizes).items() if name != "kv_heads"}
    layer = package.KNNAttention(**options, num_retrieved_memories=sizes.neighbours)
    bias = dense(sizes).float()
    return Candidate(layer, {"knn_memory": memory, "add_knn_memory": False, "rel_pos_bias": bias}, bias)


def plain_attention(sizes: Case, folder: Path) -> Candidate:
    bias = table(sizes)
    return Candidate(Attention(**shape(sizes)), {"rel_pos_bias": bias}, bias)


def plain_attention_by_pytorch(sizes: Case, folder: Path) -> Candidate:
    bias = table(sizes)
    return Candidate(SdpaAttention(**shape(sizes)), {"rel_pos_bias": bias}, bias)


CANDIDATES: dict[str, Callable[[Case, Path], Candidate]] = {
    "memtrans": ours,
    "memtrans-gate": ours_with_a_gate,
    "memtrans-all": all_of_the_memory,
    "dense": dense_attention,
    "upstream": upstreams_arithmetic,
    "upstream-package": upstreams_package,
    "attention": plain_attention,
    "attention-sdpa": plain_attention_by_pytorch,
}
COMPILED = ("memtrans", "memtrans-gate", "upstream", "attention", "attention-sdpa")
OF_WHOLE = ("memtrans-all", "dense")
MEASURED = [
    (name, impl)
    for name in CASES
    for impl in CANDIDATES
    if (impl != "upstream-package" or case(name).groups == 1) and (impl not in OF_WHOLE or of_text(case(name)))
]
BESIDE_DENSE = []  # what is timed forward too
if DEVICE == "cuda" or TOY:
    MEASURED += [(name, f"{impl}-compiled") for name in CASES for impl in COMPILED]
    BESIDE_DENSE = [(name, impl) for name in (SMALL_CASE, "d64-64k") for impl in ("memtrans", *OF_WHOLE)]
    MEASURED += [(SMALL_CASE, impl) for impl in ("memtrans", "memtrans-compiled", *OF_WHOLE, "memtrans-all-compiled")]


def next_input(sizes: Case, x: Tensor) -> Callable[[], object]:
    """What puts the next input of a case into x (B, N, dim): a segment of a text that goes round, or random numbers.

    The text is longer than any memory, so none ever holds the segment that is read.
    """
    if not of_text(sizes):
        return x.normal_
    inputs = trained(*TEXT).inputs.to(x.dtype)
    number = torch.full((1,), len(inputs) - 2, device=x.device)

    def advance() -> None:
        number.add_(1).remainder_(len(inputs))
        torch.index_select(inputs, 0, number, out=x.detach()[None])

    return advance


@pytest.mark.parametrize(("name", "impl"), MEASURED)
def test_model(benchmark: Any, name: str, impl: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = case(name)
    dtype = torch.float32 if impl == "upstream-package" else DTYPE  # its search returns nothing else
    layer, arguments, bias = CANDIDATES[impl.removesuffix("-compiled")](sizes, tmp_path)
    layer = layer.to(DEVICE, dtype)
    x = torch.randn(sizes.batch, sizes.length, sizes.heads * sizes.width, device=DEVICE, dtype=dtype)
    advance = next_input(sizes, x)
    grad_out = torch.randn_like(x)
    leaves = [x.requires_grad_(), bias.requires_grad_(), *layer.parameters()]
    forward = compiled(layer) if impl.endswith("-compiled") else layer

    def step() -> None:
        with torch.no_grad():
            advance()
        out = forward(x, **arguments)
        torch.autograd.grad(out[0] if isinstance(out, tuple) else out, leaves, grad_out)

    measure(
        benchmark, step, op="model", impl=impl, case=name, mode="forward+backward", dtype=dtype,
        capturable=impl != "upstream-package", tokens=x.shape[0] * x.shape[1],
        peak_bytes=peak_bytes(step, bytes_of([*leaves, grad_out])),
    )  # fmt: skip


@pytest.mark.parametrize(("name", "impl"), BESIDE_DENSE)
@torch.no_grad()
def test_forward(benchmark: Any, name: str, impl: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = case(name)
    layer, arguments, _ = CANDIDATES[impl](sizes, tmp_path)
    layer = layer.to(DEVICE, DTYPE)
    x = torch.randn(sizes.batch, sizes.length, sizes.heads * sizes.width, device=DEVICE, dtype=DTYPE)
    advance = next_input(sizes, x)

    def step() -> None:
        advance()
        layer(x, **arguments)

    measure(
        benchmark, step, op="model", impl=impl, case=name, mode="forward", dtype=DTYPE,
        tokens=x.shape[0] * x.shape[1],
    )  # fmt: skip


@pytest.mark.parametrize("name", [name for name in CASES if name.endswith("d64-64k")])
@pytest.mark.parametrize("impl", ["memtrans-untraced", "memtrans-traced"])
@torch.no_grad()
def test_tracing(benchmark: Any, name: str, impl: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = case(name)
    layer, arguments, _ = ours(sizes, tmp_path)
    layer, memories = layer.to(DEVICE, DTYPE), KNNMemoryList([arguments["knn_memory"]])
    x = torch.randn(sizes.batch, sizes.length, sizes.heads * sizes.width, device=DEVICE, dtype=DTYPE)
    advance = next_input(sizes, x)
    watching = memories.tracing if impl == "memtrans-traced" else nullcontext

    def step() -> None:
        advance()
        with watching():
            layer(x, **arguments)

    measure(
        benchmark, step, op="model", impl=impl, case=name, mode="forward", dtype=DTYPE, capturable=False,
        tokens=x.shape[0] * x.shape[1],
    )  # fmt: skip
