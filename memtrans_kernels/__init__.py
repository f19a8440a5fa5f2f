"""Operators of a Memorizing Transformer: ring write, exact nearest-neighbour search, cosine, fused attention.

The shape letters of every docstring: B documents in the batch, H query heads, G key/value heads, N tokens of the
segment, X cached XL tokens, L = X + N local keys, D head width, E width of the values (D unless they have one of their
own), R memory rows (row = b * G + g), M slots visible in a row, S spare slots, K retrieved neighbours.
"""

from memtrans_kernels.api import (
    cosine,
    gather_logits,
    gather_pairs,
    knn_add_,
    knn_merge,
    knn_search,
    local_attention,
    memory_attention,
    merge_attention,
    whole_attention,
)
from memtrans_kernels.backends import backends_info
from memtrans_kernels.ledger import Ledger, StaleMemoryError, ledger_advance_, ledger_ticket, read_cursors

__all__ = [
    "Ledger",
    "StaleMemoryError",
    "backends_info",
    "cosine",
    "gather_logits",
    "gather_pairs",
    "knn_add_",
    "knn_merge",
    "knn_search",
    "ledger_advance_",
    "ledger_ticket",
    "local_attention",
    "memory_attention",
    "merge_attention",
    "read_cursors",
    "whole_attention",
]
