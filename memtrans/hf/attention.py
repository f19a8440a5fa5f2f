"""The attention function of a layer with a memory, in the form that transformers' AttentionInterface asks for.

query (B, H, N, D), key (B, G, L, D) and value (B, G, L, E), rotated and with what a cache holds: what
`memory_attention` takes.
Shapes: the letters of `memtrans_kernels`.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from memtrans.hf.families import file_of, layer_type
from memtrans.hf.layer_memory import Asking, spoken
from memtrans.hf.state import ForwardState, Stored, behind, kept
from memtrans.hf.telling import tell
from memtrans.local_keys import LocalKeys
from memtrans.memory.snapshot import memory_share
from memtrans_kernels import local_attention, memory_attention, merge_attention

NAME = "memtrans"
BASE = "_memtrans_base"  # of a layer's own configuration: the one that it stands for


def configured(config: Any, name: str = NAME) -> Any:
    """A copy of a configuration for one attention module, which chooses the attention function of that name."""
    own = copy.copy(config)
    setattr(own, BASE, config)
    own._attn_implementation = name
    return own


def base_of(module: nn.Module) -> Any:
    """The attention function that the model has chosen for its other layers."""
    implementation = getattr(module.config, BASE)._attn_implementation
    eager = file_of(module).eager_attention_forward
    return eager if implementation in (None, "eager") else ALL_ATTENTION_FUNCTIONS[implementation]


class Call(NamedTuple):
    """What transformers hands to an attention function; mask and arguments are the model's own."""

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Any
    arguments: dict[str, Any]

    @property
    def layer(self) -> int:
        """The number of the layer."""
        return int(self.module.layer_idx)  # type: ignore[arg-type]

    def asking(self, state: ForwardState) -> Asking:
        """How its memory is asked."""
        if self.layer in state.asking:
            return state.asking[self.layer]
        return self.module.memtrans(state.entries)  # type: ignore[operator]

    def saying(self, state: ForwardState) -> Tensor | None:
        """What is made of its values; see `spoken`."""
        if self.layer in state.saying:
            return state.saying[self.layer]
        found: Tensor | None = self.module.memtrans.itself.saying()  # type: ignore[union-attr, operator]
        return found

    def saying_behind(self, state: ForwardState) -> Tensor | None:
        """What is made of what attention to stored values gives; None where it was made of them before."""
        return self.saying(state) if state.as_they_are else None

    def base(self) -> tuple[Tensor, Tensor | None]:
        """What the model's own function gives: (B, N, H, D), and weights if it has them."""
        return base_of(self.module)(self.module, self.query, self.key, self.value, self.mask, **self.arguments)


def memory_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    memtrans_state: ForwardState | None = None,
    **arguments: Any,
) -> tuple[Tensor, Tensor | None]:
    """Searches, attends, keeps what is to be stored; without a state it is the model's own function."""
    call = Call(module, query, key, value, attention_mask, arguments)
    if memtrans_state is None:
        return call.base()
    memtrans_state.seen.add(call.layer)
    if memtrans_state.plain and _is_causal_alone(call):
        call = call._replace(mask=None)
    if not memtrans_state.searches:
        result = call.base()
    elif memtrans_state.combine == "gate":
        result = _attend_by_gate(call, memtrans_state)
    else:
        result = _attend(call, memtrans_state)
    if memtrans_state.stored is not None:
        memtrans_state.stored[call.layer] = _stored(call, memtrans_state)
    return result


def _is_causal_alone(call: Call) -> bool:
    """Whether the dense mask of a pass that said nothing of masks hides later tokens and no others.

    Transformers leaves such a mask out, but not while a graph is captured, when it cannot look at positions.
    """
    window = call.arguments.get("sliding_window")
    return (
        isinstance(call.mask, Tensor)
        and call.mask.dim() == 4
        and (window is None or call.query.shape[2] <= window)
        and layer_type(call.module) in (None, "full_attention", "sliding_attention")
        and getattr(call.module.config, BASE)._attn_implementation == "sdpa"  # which is causal without a mask
    )


def _stored(call: Call, state: ForwardState) -> Stored:
    """The segment's keys, turned to where they are to stand, and what its values say."""
    length = call.query.shape[2]
    key, value = call.key[:, :, -length:].detach(), _to_say(call, state, call.value[:, :, -length:].detach())
    if call.layer in state.turns:
        rotation, angles = state.turns[call.layer]
        key = rotation.turned(key, angles)
    (key, count), (value, _) = kept(key, state.sink, state.padding), kept(value, state.sink, state.padding)
    return Stored(key, value, count)


@torch.no_grad()
def _to_say(call: Call, state: ForwardState, value: Tensor) -> Tensor:
    """Of a segment's values (B, G, N, E) what is stored; in a calibration (B, G, N, 2E) where the next ones count."""
    saying = call.saying(state)
    if saying is None:
        return value
    if saying.shape[1] > value.shape[3]:
        value = torch.cat((value, behind(value, state.padding)), -1)
    return value if state.as_they_are else spoken(value, saying)


def _attend_to_retrieved(call: Call, state: ForwardState, retrieved: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Attention to the neighbours alone: (B, H, N, E), and lse."""
    key = call.key[:, :, :0].detach()
    value = call.value.new_empty(*key.shape[:3], retrieved["memory_values"].shape[2])
    out, lse = memory_attention(key=key, value=value, **retrieved)
    saying = call.saying_behind(state)
    return out if saying is None else spoken(out, saying), lse


def _retrieved(call: Call, state: ForwardState) -> tuple[dict[str, Any], Tensor]:
    """What attention to the memory hands to the operator, the neighbours and how logits are scaled; and the offset."""
    offset, query = call.asking(state).offset, call.asking(state).asked(call.query)
    snapshot = state.snapshots[call.layer]
    scores, slots = snapshot.nearest(query, state.k)
    if state.blind is not None:
        blind = state.blind.to(query.device)[:, None, :, None]
        slots.masked_fill_(blind, -1)  # scores of no slot count for nothing
        if state.watched is not None:
            scores.masked_fill_(blind, -torch.inf)
    scaling = call.arguments.get("scaling")
    factor = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    heads, device = query.shape[1], query.device
    scale = state.once(
        ("scale", heads, factor, device), lambda: torch.full((heads,), factor, device=device, dtype=wide)
    )
    retrieved = {
        "query": query,
        "memory_keys": snapshot.keys,
        "memory_values": snapshot.values,
        "rows": snapshot.rows,
        "scores": scores,
        "slots": slots,
        "scale": scale,
        "ledger": snapshot.ledger,
        **_dropout(call.arguments.get("dropout", 0.0), query),
        **_soft_cap(call),
    }
    return retrieved, offset


def _dropout(probability: float, query: Tensor) -> dict[str, Any]:
    if not probability:
        return {}
    return {"dropout_p": probability, "seed": torch.randint(2**31, (), device=query.device)}


def _attend(call: Call, state: ForwardState) -> tuple[Tensor, None]:
    """One softmax over neighbours and local keys; (B, N, H, E)."""
    length, keys = call.query.shape[2], call.key.shape[2]
    if call.mask is None and keys > length > 1:
        keys = length  # a static cache that is being filled: transformers' own functions look at its first N
    retrieved, offset = _retrieved(call, state)
    window = call.arguments.get("sliding_window")
    mask = state.once(  # most layers have the same, and the key keeps it from being another tensor's by then
        ("mask", call.mask, window, keys, call.query.shape, call.query.device),
        lambda: _local_mask(call.mask, call.query, keys, window),
    )
    key, value = call.key[:, :, :keys], call.value[:, :, :keys]
    local = {"query": call.query, "key": key, "value": value, **mask, **_sink(call)}
    # training decides by its mode: a checkpoint's first pass has no gradients, and must round as its second one
    learns = call.module.training or (torch.is_grad_enabled() and retrieved["query"].requires_grad)
    if call.saying_behind(state) is not None or (retrieved["query"] is not call.query and learns):
        out, lse = _in_parts(call, state, retrieved, local, offset)
    else:  # the scores are what the memory was asked for; the query is that of the local keys
        out, lse = memory_attention(memory_offset=offset, **{**retrieved, **local})
    if state.watched is not None:
        table, dense, local_length = (mask.get(name) for name in ("bias_table", "bias_dense", "local_length"))
        keys_seen = LocalKeys(key, value, table, dense, local_length, soft_cap=retrieved.get("soft_cap"))
        tell(state, call.layer, {**retrieved, "query": call.query}, lse, offset=offset, local=keys_seen)
    return out.transpose(1, 2).contiguous(), None


def _in_parts(
    call: Call, state: ForwardState, retrieved: dict[str, Any], local: dict[str, Any], offset: Tensor
) -> tuple[Tensor, Tensor]:
    """The same softmax, from one over the neighbours and one over the local keys, each with a query of its own."""
    again = {name: retrieved[name] for name in ("dropout_p", "seed", "soft_cap") if name in retrieved}
    to_local, of_local = local_attention(scale=retrieved["scale"], **local, **again)
    to_memory, of_memory = _attend_to_retrieved(call, state, retrieved)
    lses = torch.stack((of_memory + offset[:, None], of_local))
    return merge_attention(torch.stack((to_memory, to_local)), lses)


def _sink(call: Call) -> dict[str, Tensor]:
    """The learned logit of each head that has no value (gpt-oss), in the operator's words."""
    sinks = call.arguments.get("s_aux")
    return {} if sinks is None else {"sink": sinks}


def _soft_cap(call: Call) -> dict[str, float]:
    """The cap of a product of query and key (Gemma 2), in the operator's words."""
    cap = call.arguments.get("softcap")
    return {} if cap is None else {"soft_cap": float(cap)}


def _attend_by_gate(call: Call, state: ForwardState) -> tuple[Tensor, Tensor | None]:
    """The model's own attention and one over the neighbours, mixed; (B, N, H, E). Found nothing: the local part."""
    to_local, weights = call.base()
    retrieved, offset = _retrieved(call, state)
    to_memory, lse = _attend_to_retrieved(call, state, retrieved)
    share = memory_share(retrieved["slots"], offset)  # (B, H, N)
    if state.watched is not None:
        tell(state, call.layer, retrieved, lse, share=share)
    gate = share.transpose(1, 2)[..., None]
    return (gate * to_memory.transpose(1, 2) + (1.0 - gate) * to_local).to(to_local.dtype), weights


def _local_mask(mask: Any, query: Tensor, keys: int, window: int | None) -> dict[str, Any]:
    """The model's mask in the operator's words, which is causal by itself.

    mask: None, (B, L) of flash attention, which knows of windows by itself, or dense, bool or added to logits.
    """
    if mask is not None and not isinstance(mask, Tensor):
        raise TypeError(
            f"attention_mask must be a tensor in a layer with a memory, got {type(mask).__name__}: choose another "
            f"attn_implementation than flex_attention"
        )
    if mask is not None and mask.dim() == 4:
        dense = mask[..., -query.shape[2] :, :keys]
        if dense.dtype == torch.bool:
            dense = dense.log()  # 0 for what is seen, -inf for what is not
        return {"bias_dense": dense.expand(dense.shape[0], query.shape[1], *dense.shape[2:])}
    said: dict[str, Tensor] = {}
    if mask is not None:
        said["local_length"] = keys - (mask.cumsum(-1) == 0).sum(-1)
    if window is not None and keys > window:
        table = query.new_zeros(query.shape[1], window + 1, dtype=torch.float32)
        said["bias_table"] = table.index_fill(1, torch.tensor([window], device=query.device), -torch.inf)
    return said


# here, and not where a memory is added: a model that was saved whole asks for it in a process that adds none
ALL_ATTENTION_FUNCTIONS.register(NAME, memory_attention_forward)
