"""The arguments of a `MemorizingTransformer`, checked once, and what they come to: sizes, and which layer is what.

Layers are counted from 1.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from memtrans.checks import check_number, sizes, whole_number
from memtrans_kernels import checks

# Arguments of the model that go to the attention of memorizing layers as they are, and are checked there.
OF_MEMORY = (
    *("num_retrieved_memories", "attn_scale_init", "memory_offset", "combine"),
    *("similarity", "learn_scale", "bias_out", "attend_to", "memory_query"),
)
# Those that go to the attention of the other layers, by the names that they have there.
OF_PLAIN = {"similarity": "plain_similarity"}
# Those that go to the attention of all layers so.
OF_ALL = ("causal", "soft_cap", "sink", "value_dim_head")


class Architecture(NamedTuple):
    """What the arguments of a model come to.

    Attributes:
        num_tokens: V; None without a vocabulary.
        dim: model width.
        depth: layers.
        dim_head: D.
        heads: H of plain layers.
        knn_attn_heads: H of memorizing layers.
        max_knn_memories: M.
        xl_max_memories: X of caching layers.
        pad_id: labels equal to it are not scored.
        start_token, end_token: clear a row's memory before and after its segment; None for none.
        shift_knn, shift_xl: how many memorizing, or caching, layers above a layer reads.
        memorizing: layers with a memory, ascending.
        caching: layers that have an XL cache where X > 0, ascending.
    """

    num_tokens: int | None
    dim: int
    depth: int
    dim_head: int
    heads: int
    knn_attn_heads: int
    max_knn_memories: int
    xl_max_memories: int
    pad_id: int
    start_token: int | None
    end_token: int | None
    shift_knn: int
    shift_xl: int
    memorizing: tuple[int, ...]
    caching: tuple[int, ...]


def architecture_of(arguments: Mapping[str, Any]) -> Architecture:
    """Checks the arguments of a `MemorizingTransformer`, but for those that its layers check, and fills in defaults.

    Raises:
        ValueError, TypeError: a size that is no integer or too small, a rate outside [0, 1), a token that is not in
            the vocabulary.
    """
    of_memory = arguments["heads"] if arguments["knn_attn_heads"] is None else arguments["knn_attn_heads"]
    num_tokens, (dim, depth) = arguments["num_tokens"], sizes(1, dim=arguments["dim"], depth=arguments["depth"])
    if num_tokens is not None:
        num_tokens = checks.integer("num_tokens", num_tokens, low=1)
    dim_head, heads, knn_attn_heads, max_knn_memories = sizes(
        1,
        dim_head=arguments["dim_head"],
        heads=arguments["heads"],
        knn_attn_heads=of_memory,
        max_knn_memories=arguments["max_knn_memories"],
    )
    xl_max_memories = whole_number("xl_max_memories", arguments["xl_max_memories"], low=0)
    checks.probability("attn_dropout", arguments["attn_dropout"])
    checks.probability("ff_dropout", arguments["ff_dropout"])
    check_number("ff_mult", arguments["ff_mult"], above=0)
    check_causal(arguments)
    middle = (depth // 2,) if depth > 1 else ()
    return Architecture(
        num_tokens=num_tokens,
        dim=dim,
        depth=depth,
        dim_head=dim_head,
        heads=heads,
        knn_attn_heads=knn_attn_heads,
        max_knn_memories=max_knn_memories,
        xl_max_memories=xl_max_memories,
        pad_id=checks.integer("pad_id", arguments["pad_id"]),
        start_token=clearing_token("sos", arguments["clear_memories_on_sos_token_id"], num_tokens),
        end_token=clearing_token("eos", arguments["clear_memories_on_eos_token_id"], num_tokens),
        shift_knn=whole_number("shift_knn_memories_down", arguments["shift_knn_memories_down"]),
        shift_xl=whole_number("shift_xl_memories_down", arguments["shift_xl_memories_down"]),
        memorizing=layer_numbers("memorizing_layers", arguments["memorizing_layers"], middle, depth),
        caching=layer_numbers("xl_memory_layers", arguments["xl_memory_layers"], range(1, depth + 1), depth),
    )


def check_causal(arguments: Mapping[str, Any]) -> None:
    """Raises ValueError where a model that is not causal is given what has a meaning in a causal one alone."""
    names = ("clear_memories_on_sos_token_id", "clear_memories_on_eos_token_id")
    given = [name for name in names if arguments[name] is not None] + ["legacy"] * bool(arguments["legacy"])
    if not arguments["causal"] and given:
        raise ValueError(f"causal must be True with {', '.join(given)}, got {arguments['causal']!r}")


def layer_numbers(name: str, layers: int | Sequence[int] | None, default: Sequence[int], depth: int) -> tuple[int, ...]:
    """The numbers that are of layers, in ascending order, each once; raises TypeError where one is no integer.

    Numbers of no layer are left out, with a warning: upstream passes over them in silence.
    """
    given = default if layers is None else layers if isinstance(layers, Iterable) else (layers,)
    chosen = [checks.integer(name, layer) for layer in given]
    unknown = [layer for layer in chosen if not 1 <= layer <= depth]
    if unknown:
        warnings.warn(f"{name} must name layers from 1 to depth={depth}, got {unknown}: left out", stacklevel=4)
    return tuple(sorted(set(chosen) - set(unknown)))


def clearing_token(which: str, token_id: int | None, vocabulary: int | None) -> int | None:
    """The token that clears memories, None for none; raises ValueError unless it is in [0, V), where there is one.

    which: `sos` or `eos`.
    """
    name = f"clear_memories_on_{which}_token_id"
    if token_id is None:
        return None
    if vocabulary is None:
        raise ValueError(f"{name} must be None without a vocabulary (num_tokens=None), got {token_id}")
    if not 0 <= checks.integer(name, token_id) < vocabulary:
        raise ValueError(f"{name} must be a token id in [0, {vocabulary}), got {token_id}")
    return token_id


def attention_arguments(arguments: Mapping[str, Any], number: int, layers: Architecture) -> dict[str, Any]:
    """What the attention of layer `number` is made with, of the model's arguments; a memorizing layer's has more."""
    of_layer: dict[str, Any] = {
        "dim": layers.dim,
        "dim_head": layers.dim_head,
        "kv_heads": arguments["kv_heads"],
        "dropout": arguments["attn_dropout"],
        "xl_max_memories": layers.xl_max_memories if number in layers.caching else 0,
        **{name: arguments[name] for name in OF_ALL},
    }
    if number not in layers.memorizing:
        return {**of_layer, "heads": layers.heads, **{own: arguments[name] for own, name in OF_PLAIN.items()}}
    return {**of_layer, "heads": layers.knn_attn_heads, **{name: arguments[name] for name in OF_MEMORY}}
