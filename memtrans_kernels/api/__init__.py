"""The public operators: each checks its arguments, once, and calls the operator.

Shapes in the letters of `memtrans_kernels`; R memory rows hold a ring of M + S slots each, at most 2^30, of which the
newest M entries are visible. Entry i lives in slot i mod (M + S).
"""

from memtrans_kernels.api.attention import local_attention, memory_attention, merge_attention
from memtrans_kernels.api.cosine import cosine
from memtrans_kernels.api.gather_logits import gather_logits
from memtrans_kernels.api.gather_pairs import gather_pairs
from memtrans_kernels.api.memory import knn_add_, knn_merge, knn_search
from memtrans_kernels.api.whole_attention import whole_attention

__all__ = [
    "cosine",
    "gather_logits",
    "gather_pairs",
    "knn_add_",
    "knn_merge",
    "knn_search",
    "local_attention",
    "memory_attention",
    "merge_attention",
    "whole_attention",
]
