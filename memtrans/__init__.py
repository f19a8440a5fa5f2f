"""The Memorizing Transformer as building blocks: a drop-in replacement of `memorizing-transformers-pytorch`.

What is exported is imported when it is first asked for, so that `python -m memtrans --help` need not wait for PyTorch,
and Ctrl-C meanwhile ends the command line quietly.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from memtrans.compatibility import find_former_modules

if TYPE_CHECKING:
    from memtrans.attention import Attention
    from memtrans.generation.generate import generate
    from memtrans.knn_attention import KNNAttention
    from memtrans.memory import KNNMemory, KNNMemoryList, join_shards
    from memtrans.position import T5RelativePositionBias
    from memtrans.transformer import MemorizingTransformer

__version__ = "0.1.0"

find_former_modules()

__all__ = [
    "Attention",
    "KNNAttention",
    "KNNMemory",
    "KNNMemoryList",
    "MemorizingTransformer",
    "T5RelativePositionBias",
    "generate",
    "join_shards",
]

_HOMES = {
    "Attention": "attention",
    "KNNAttention": "knn_attention",
    "KNNMemory": "memory",
    "KNNMemoryList": "memory",
    "MemorizingTransformer": "transformer",
    "T5RelativePositionBias": "position",
    "generate": "generation.generate",
    "join_shards": "memory",
}


def __getattr__(name: str) -> Any:
    """A name of `__all__`, or a module of the package, which `import memtrans` alone makes usable too."""
    if name in _HOMES:
        value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    try:
        return import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{name}":
            raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
