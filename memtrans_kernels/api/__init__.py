"""The public operators: each checks its arguments, once, and calls the operator.

Shapes in the letters of `memtrans_kernels`; R memory rows hold a ring of M + S slots each, at most 2^30, of which the
newest M entries are visible. Entry i lives in slot i mod (M + S).
"""

from memtrans_kernels.api.attention import local_attention, memory_attention, merge_attention
from memtrans_kernels.api.cosine import cosine
from memtrans_kernels.api.memory import knn_add_, knn_merge, knn_search

__all__ = ["cosine", "knn_add_", "knn_merge", "knn_search", "local_attention", "memory_attention", "merge_attention"]
