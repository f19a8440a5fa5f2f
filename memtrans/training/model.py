"""The model of a run, as its settings say."""

from __future__ import annotations

from memtrans.training.settings import Settings
from memtrans.transformer import MemorizingTransformer


def build_model(settings: Settings) -> MemorizingTransformer:
    """The model of a run; draws its weights from torch's generator.

    >>> model = build_model(Settings(layers=2, width=16, heads=2, head_width=8))
    >>> model.memorizing_layers
    (1,)
    """
    layers: tuple[int, ...] | None = settings.memory_layers
    model = MemorizingTransformer(
        num_tokens=settings.vocabulary,
        dim=settings.width,
        depth=settings.layers,
        dim_head=settings.head_width,
        heads=settings.heads,
        knn_attn_heads=settings.memory_heads,
        attn_dropout=settings.dropout,
        ff_dropout=settings.dropout,
        memorizing_layers=(layers or max(1, settings.layers // 2)) if settings.memory else (),
        max_knn_memories=max(1, settings.memory),
        num_retrieved_memories=settings.neighbours,
        pad_id=-1,
        xl_max_memories=settings.xl,
        xl_memory_layers=settings.xl_layers,
        kv_heads=settings.kv_heads,
        attn_scale_init=settings.temperature if settings.similarity == "cosine" else None,
        similarity=settings.similarity,
        bias_out=settings.similarity == settings.plain_similarity,
        plain_similarity=settings.plain_similarity,
        memory_offset=settings.memory_offset,
        combine=settings.combine,
        memory_query=settings.memory_query,
    )
    if settings.position_start is not None:
        _look_back(model, settings.position_start)
    return model


def _look_back(model: MemorizingTransformer, strength: float) -> None:
    """Starts local head h at distance h + 1, and memory layers at no preference.

    The default start, N(0, 1) times the root of the head's width, points heads at random distances; none may point at
    the one that a task needs, and so strong a preference is slow to move.
    """
    local, with_memory = model.rel_pos_bias, model.knn_rel_pos_bias
    for bias in (local, with_memory):
        bias.relative_attention_bias.weight.data.mul_(0.1 / bias.scale)
    table = local.relative_attention_bias.weight.data  # (buckets, H); a bucket for each small distance
    for head in range(table.shape[1]):
        table[(head + 1) % table.shape[0], head] += strength / local.scale
