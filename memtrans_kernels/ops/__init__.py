"""The operators of the namespace `memtrans`: schemas, fakes and gradients.

Each function here goes straight to its implementation where nothing else is asked for (`eager.is_plain`), and through
a registered operator where something compiles, transforms or watches. Either way `backends` is asked for the
implementation when the operator runs, not when it is traced: a compiled graph follows `MEMTRANS_BACKEND` and never
bakes in what happened to be installed. Arguments are checked in `api`; kernels check nothing and know nothing of
autograd.
"""

from memtrans_kernels.ops.attention import memory_attention
from memtrans_kernels.ops.cosine import cosine
from memtrans_kernels.ops.gather_logits import gather_logits
from memtrans_kernels.ops.gather_pairs import gather_pairs
from memtrans_kernels.ops.memory import knn_add_, knn_merge, knn_search
from memtrans_kernels.ops.whole_attention import whole_attention

__all__ = [
    "cosine",
    "gather_logits",
    "gather_pairs",
    "knn_add_",
    "knn_merge",
    "knn_search",
    "memory_attention",
    "whole_attention",
]
