"""memory_attention in plain PyTorch: the oracle of all tests, and the last-resort kernel.

    out = softmax([cap(scale · scores) + offset, cap(scale · q kᵀ) + bias, sink]) · [memory values, values, 0]

    query (B, H, N, D) · key (B, G, L, D), value (B, G, L, E) · memory_keys (R, M + S, D), memory_values (R, M + S, E)
    rows (B·G,) · scores, slots (B, H, N, K) · scale, memory_offset, sink (H,) · bias_table (H, distances)
    bias_dense (1 or B, H, N, L) · local_length (B,), key_mask (B, L), first (B, N): which local keys a query sees
    -> out (B, H, N, E), lse (B, H, N)

With a soft cap c, cap(x) = c · tanh(x / c); cap(x) = x without.

Source: Wu et al. 2022, section 3.1. Arithmetic is float32, or float64 where the inputs are (tests call it so); on CPU
and CUDA tensors alike, without a host round trip.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from memtrans_kernels.attention_inputs import AttentionInputs
from memtrans_kernels.impl.reference.philox import keep_mask
from memtrans_kernels.precision import arithmetic_dtype


def memory_attention(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """One softmax over K retrieved and L local logits; `memory_keys` is read by the backward pass alone."""
    dtype = arithmetic_dtype(inputs.query)
    local = inputs.scale.to(dtype)[:, None, None] * _dot(inputs.query, inputs.key, dtype)
    logits = _joint_logits(local, inputs)
    lse = logits.logsumexp(dim=-1)  # (B, H, N)
    if inputs.sink is not None:
        lse = torch.logaddexp(lse, inputs.sink.to(dtype)[:, None])
    weights = logits.sub_(_finite(lse)[..., None]).exp_()  # (B, H, N, K + L)
    return _attended(weights, inputs), lse


def formula(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """The same, for PyTorch to differentiate as often and in whatever mode it likes.

    The scores handed in are constants; here they depend on the query as what they are, <query, retrieved key>.
    """
    dtype = arithmetic_dtype(inputs.query)
    retrieved_keys = _gather(inputs.memory_keys.detach(), inputs.rows, inputs.slots, dtype)
    scores = torch.einsum("bhnd,bhnkd->bhnk", inputs.query.to(dtype), retrieved_keys)
    given = inputs.scores.detach().to(dtype).masked_fill(inputs.slots < 0, 0.0)
    inputs = inputs._replace(scores=given + (scores - scores.detach()), memory_values=inputs.memory_values.detach())
    local = inputs.scale.to(dtype)[:, None, None] * _dot(inputs.query, inputs.key, dtype)
    logits = _joint_logits(local, inputs)
    seen = logits.shape[-1]
    if inputs.sink is not None:
        logits = torch.cat(
            (logits, inputs.sink.to(dtype)[:, None, None].expand(*logits.shape[:1], -1, logits.shape[2], 1)), -1
        )
    nothing = (logits == -torch.inf).all(dim=-1)  # queries whose softmax has no derivative
    safe = logits.masked_fill(nothing[..., None], 0.0)
    weights = safe.softmax(dim=-1).masked_fill(nothing[..., None], 0.0)
    return _attended(weights[..., :seen], inputs), safe.logsumexp(dim=-1).masked_fill(nothing, -torch.inf)


def _attended(weights: Tensor, inputs: AttentionInputs) -> Tensor:
    """Values summed by weights (B, H, N, K + L), of which dropout takes some."""
    dtype, slots = weights.dtype, inputs.slots
    if inputs.dropout_p > 0.0:
        assert inputs.seed is not None
        weights = weights * keep_mask(inputs.seed, inputs.dropout_p, weights.shape) / (1.0 - inputs.dropout_p)
    to_memory, to_local = weights.split([slots.shape[-1], inputs.key.shape[-2]], dim=-1)
    gathered = _gather(inputs.memory_values, inputs.rows, slots, dtype)  # (B, H, N, K, D)
    out = _weighted_sum(to_local, inputs.value, dtype) + torch.einsum("bhnk,bhnkd->bhnd", to_memory, gathered)
    return out.to(inputs.query.dtype).contiguous()


def memory_attention_backward(
    inputs: AttentionInputs,
    grad_out: Tensor,  # (B, H, N, E)
    grad_lse: Tensor,  # (B, H, N)
    out: Tensor,  # (B, H, N, E)
    lse: Tensor,  # (B, H, N)
    of_keys: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, scale, bias_table, bias_dense, memory_offset, sink (empty where there is none).

    of_keys: whether those of key and value are wanted; else they are empty too.

    With P the softmax, P' = P after dropout, dP' = <grad_out, values> and delta = <grad_out, out> = sum P' dP':
    d logits = P (keep / (1 - p) dP' - delta + grad_lse), d products = cap'(products) d logits, and the sink's weight
    has dP' = 0.
    """
    query, key, value, scale = inputs.query, inputs.key, inputs.value, inputs.scale
    dtype = arithmetic_dtype(query)
    grad_out, scale_wide = grad_out.to(dtype), scale.to(dtype)[:, None, None]
    dot = _dot(query, key, dtype)
    weights = _joint_logits(scale_wide * dot, inputs).sub_(_finite(lse.to(dtype))[..., None]).exp_()  # P

    sizes = [inputs.neighbours, key.shape[-2]]
    gathered = _gather(inputs.memory_values, inputs.rows, inputs.slots, dtype)
    grad_weights = torch.cat((torch.einsum("bhnd,bhnkd->bhnk", grad_out, gathered), _dot(grad_out, value, dtype)), -1)
    dropped = weights  # P'
    if inputs.dropout_p > 0.0:
        assert inputs.seed is not None
        factor = keep_mask(inputs.seed, inputs.dropout_p, weights.shape).to(dtype) / (1.0 - inputs.dropout_p)
        dropped, grad_weights = weights * factor, grad_weights * factor
    delta = (grad_out * out.to(dtype)).sum(dim=-1, keepdim=True) - grad_lse.to(dtype)[..., None]
    grad_logits = grad_weights.sub_(delta).mul_(weights)
    of_biases = _grad_biases(grad_logits, inputs)
    found_scores = inputs.scores.to(dtype).masked_fill(inputs.slots < 0, 0.0)
    if inputs.soft_cap is not None:
        grad_logits = grad_logits * _slope(scale_wide * torch.cat((found_scores, dot), dim=-1), inputs.soft_cap)
    grad_memory, grad_local = grad_logits.split(sizes, dim=-1)

    retrieved_keys = _gather(inputs.memory_keys, inputs.rows, inputs.slots, dtype)
    grad_query = _weighted_sum(grad_local, key, dtype) + torch.einsum("bhnk,bhnkd->bhnd", grad_memory, retrieved_keys)
    grad_key, grad_value = query.new_empty(0), query.new_empty(0)  # an operator may not return one tensor twice
    if of_keys:
        grad_key = _sum_over_queries(grad_local * scale_wide, query, key, dtype).to(key.dtype)
        grad_value = _sum_over_queries(dropped.split(sizes, dim=-1)[1], grad_out, value, dtype).to(value.dtype)
    grad_scale = (grad_local * dot).sum(dim=(0, 2, 3)) + (grad_memory * found_scores).sum(dim=(0, 2, 3))
    return (
        (grad_query * scale_wide).to(query.dtype).contiguous(),
        grad_key.contiguous(),
        grad_value.contiguous(),
        grad_scale.to(scale.dtype),
        *of_biases,
        query.new_empty(0) if inputs.sink is None else _grad_sink(inputs.sink, lse.to(dtype), delta[..., 0]),
    )


def _grad_biases(grad_logits: Tensor, inputs: AttentionInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Of bias_table, bias_dense and memory_offset, from the gradients of the logits; empty where there is none."""
    grad_memory, grad_local = grad_logits.split([inputs.neighbours, inputs.key.shape[-2]], dim=-1)
    table, dense, offset = inputs.bias_table, inputs.bias_dense, inputs.memory_offset
    nothing = inputs.query.new_empty
    return (
        nothing(0) if table is None else _grad_bias_table(grad_local, table, inputs.causal),
        nothing(0) if dense is None else grad_local.sum_to_size(dense.shape).to(dense.dtype, copy=True),
        nothing(0) if offset is None else grad_memory.sum(dim=(0, 2, 3)).to(offset.dtype),
    )


def _joint_logits(local: Tensor, inputs: AttentionInputs) -> Tensor:
    """The K retrieved logits, then the L local ones; -inf where there is nothing to attend to.

    local: (B, H, N, L), scaled; they become logits in place.
    """
    length, local_keys = local.shape[-2:]
    distance = _distance(length, local_keys, local.device)
    local = _capped(local, inputs.soft_cap)
    if inputs.bias_table is not None:
        away = distance if inputs.causal else distance.abs()
        local += inputs.bias_table.to(local.dtype)[:, away.clamp(0, inputs.distances - 1)]
    if inputs.bias_dense is not None:
        local += inputs.bias_dense.to(local.dtype)
    local.masked_fill_(_hidden(distance, inputs), -torch.inf)
    if inputs.neighbours == 0:
        return local
    missing = inputs.slots < 0
    retrieved = inputs.scale.to(local.dtype)[:, None, None] * inputs.scores.to(local.dtype).masked_fill(missing, 0.0)
    retrieved = _capped(retrieved, inputs.soft_cap)
    if inputs.memory_offset is not None:
        retrieved = retrieved + inputs.memory_offset.to(local.dtype)[:, None, None]
    return torch.cat((retrieved.masked_fill_(missing, -torch.inf), local), dim=-1)


def _hidden(distance: Tensor, inputs: AttentionInputs) -> Tensor:
    """Which queries do not see which local keys, broadcastable to (B, H, N, L); distance: (N, L)."""
    position = torch.arange(distance.shape[1], device=distance.device)
    hidden = distance < 0 if inputs.causal else torch.zeros_like(distance, dtype=torch.bool)
    if inputs.local_length is not None:  # keys before the newest so many are not this document's
        hidden = hidden | (position < distance.shape[1] - inputs.local_length[:, None, None, None])
    if inputs.first is not None:
        hidden = hidden | (position < inputs.first[:, None, :, None])
    return hidden if inputs.key_mask is None else hidden | ~inputs.key_mask[:, None, None]


def _capped(products: Tensor, soft_cap: float | None) -> Tensor:
    return products if soft_cap is None else soft_cap * (products / soft_cap).tanh()


def _slope(products: Tensor, soft_cap: float) -> Tensor:
    """Derivative of `_capped`."""
    return 1.0 - (products / soft_cap).tanh().square()


def _grad_sink(sink: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """Of what weighs exp(sink - lse) and is worth nothing; lse, delta: (B, H, N)."""
    weight = (sink.to(lse.dtype)[:, None] - _finite(lse)).exp()
    return -(weight * delta).sum(dim=(0, 2)).to(sink.dtype)


def _distance(length: int, local_keys: int, device: torch.device) -> Tensor:
    """How far behind its query a local key stands (N, L): negative in the future; the cache comes first."""
    query_position = torch.arange(local_keys - length, local_keys, device=device)
    return query_position[:, None] - torch.arange(local_keys, device=device)


def _finite(lse: Tensor) -> Tensor:
    """0 for a query with nothing to attend to, so that its weights are exp(-inf) = 0 and not NaN."""
    return lse.masked_fill(lse == -torch.inf, 0.0)


def _dot(query: Tensor, key: Tensor, dtype: torch.dtype) -> Tensor:
    """<query, key> per head, (B, H, N, L); H query heads share G key heads."""
    grouped = query.to(dtype).unflatten(1, (key.shape[1], -1))
    return torch.einsum("bghnd,bgld->bghnl", grouped, key.to(dtype)).flatten(1, 2)


def _weighted_sum(weights: Tensor, value: Tensor, dtype: torch.dtype) -> Tensor:
    """sum over L of weights (B, H, N, L) times value (B, G, L, D)."""
    grouped = weights.unflatten(1, (value.shape[1], -1))
    return torch.einsum("bghnl,bgld->bghnd", grouped, value.to(dtype)).flatten(1, 2)


def _sum_over_queries(weights: Tensor, query: Tensor, key: Tensor, dtype: torch.dtype) -> Tensor:
    """sum over the queries and heads of a group of weights (B, H, N, L) times query (B, H, N, D)."""
    groups = key.shape[1]
    weights, query = weights.unflatten(1, (groups, -1)), query.to(dtype).unflatten(1, (groups, -1))
    return torch.einsum("bghnl,bghnd->bgld", weights, query)


def _gather(memory: Tensor, rows: Tensor, slots: Tensor, dtype: torch.dtype) -> Tensor:
    """Retrieved entries (B, H, N, K, D); zeros where the slot is -1, whatever the ring holds."""
    batch, heads = slots.shape[:2]
    row = rows.reshape(batch, -1).repeat_interleave(heads * batch // max(rows.numel(), 1), dim=1)  # (B, H)
    gathered = memory[row[:, :, None, None], slots.clamp(min=0)].to(dtype)
    return gathered.masked_fill((slots < 0)[..., None], 0.0)


def _grad_bias_table(grad_local: Tensor, bias_table: Tensor, causal: bool) -> Tensor:
    """Sums the gradients of all (query, key) pairs at the same distance, on either side where keys behind are seen.

    Along a diagonal and not by `index_add`, whose order of summation differs from run to run on CUDA.
    """
    distances = bias_table.shape[-1]
    length, local_keys = grad_local.shape[-2:]
    table = grad_local.new_zeros(bias_table.shape)
    if length and local_keys:
        backwards = grad_local.sum(dim=0).flip(-1)  # (H, N, L); row i, shifted by i, has a distance in each column
        shifted = F.pad(backwards, (0, length)).flatten(1)[:, :-length].unflatten(1, (length, -1))
        behind, by_distance = shifted.sum(dim=1).tensor_split([length - 1], dim=1)  # (H, N - 1), (H, L)
        if not causal:
            by_distance[:, 1:length] += behind.flip(-1)
        near = min(distances, local_keys)
        table[:, :near] = by_distance[:, :near]
        table[:, -1] += by_distance[:, distances:].sum(dim=-1)
    return table.to(bias_table.dtype)
