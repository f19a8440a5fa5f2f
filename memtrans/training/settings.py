"""What a training run is made of.

`Settings` is the one owner of every option: the command line makes its options from these fields, their annotations and
their help, a checkpoint keeps them as JSON, and the model, the data and the loop are built from them. Sets of values
that have a name stand in `presets.py`. Nothing here imports PyTorch, which `--help` need not wait for.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

from memtrans.annotations import allows, described, kind_of

if TYPE_CHECKING:
    import torch

BYTES = 256  # tokens of the text that is read: every byte value
# Beyond these a step would take hours on any machine, and its first batch alone minutes to draw.
NEXT_TO_NONE = 32  # entries: what a memory layer needs to learn to use more later
MOST_ROWS, MOST_TOKENS, MOST_LAYERS, MOST_WIDTH = 2**16, 2**30, 10_000, 2**20


def _option(default: Any, text: str, **limits: Any) -> Any:
    """A field with its help text; limits: `at_least`, `at_most`, `above`, `below`."""
    return dataclasses.field(default=default, metadata={"help": text, **limits})


@dataclass(frozen=True)
class Settings:
    """Every option of a run; the help texts say what each is. Letters as in the kernels: B, N, M, K, X, H, G, D.

    Raises:
        ValueError: a value out of range or of another type; names the field, the value and what was expected.

    >>> Settings(steps=10).steps
    10
    >>> Settings(batch=0)
    Traceback (most recent call last):
    ValueError: batch must be at least 1, got 0
    """

    data: str = _option(
        "stdlib", "stdlib (the sources of Python's standard library), recall, a store of tokens, or a file or directory"
    )
    tokenizer: str | None = _option(
        None, "bytes, or a tokenizer.json or a directory with one (default: bytes, or the tokenizer of a store)"
    )
    text_field: str = _option("text", "field of a record (.jsonl, .parquet, a saved dataset) that holds its text")
    join_by: str | None = _option(None, "records side by side with the same value of this field are one document")
    windows: bool = _option(False, "read random windows, each with a fresh memory, instead of whole documents")
    window_segments: int = _option(5, "segments of a window, with --windows", at_least=1)
    steps: int = _option(1000, "optimiser steps", at_least=1)
    batch: int = _option(8, "B: documents read side by side", at_least=1, at_most=MOST_ROWS)
    segment: int = _option(256, "N: tokens of a segment", at_least=1, at_most=MOST_TOKENS)
    segments: int = _option(1, "segments before one backward pass", at_least=1, at_most=MOST_ROWS)
    accumulate: int = _option(1, "backward passes before one optimiser step", at_least=1, at_most=MOST_ROWS)
    vocabulary: int = _option(
        BYTES, "V: tokens of the model, at least the tokenizer's, and those if not given", at_least=BYTES
    )
    layers: int = _option(4, "layers of the model", at_least=1, at_most=MOST_LAYERS)
    width: int = _option(128, "width of the model", at_least=1, at_most=MOST_WIDTH)
    heads: int = _option(4, "H: query heads", at_least=1, at_most=MOST_WIDTH)
    head_width: int = _option(32, "D: width of a head", at_least=1, at_most=MOST_WIDTH)
    kv_heads: int = _option(1, "G: key and value heads", at_least=1, at_most=MOST_WIDTH)
    memory: int = _option(4096, "M: entries of a document's memory; 0 for no memory layer", at_least=0)
    memory_layers: tuple[int, ...] | None = _option(None, "layers with a memory, from 1 (default: the middle one)")
    memory_heads: int | None = _option(
        None, "query heads of memory layers (default: --heads)", at_least=1, at_most=MOST_WIDTH
    )
    memory_late: float = _option(
        0.0, f"share of the steps, the last, with all of a memory; {NEXT_TO_NONE} entries before", at_least=0, below=1
    )
    neighbours: int = _option(32, "K: entries that a query retrieves", at_least=1)
    memory_offset: float | None = _option(None, "start of a learned offset on retrieved logits (default: none)")
    combine: Literal["softmax", "gate"] = _option(
        "softmax", "one softmax over retrieved and local keys, or one each and a learned gate"
    )
    memory_query: Literal["shared", "own"] = _option(
        "shared", "ask the memory as the local keys, or with a query of its own, which is learned at ten times the rate"
    )
    similarity: Literal["cosine", "product"] = _option(
        "cosine", "of queries and keys in memory layers; that of plain layers makes them plain layers with a memory"
    )
    plain_similarity: Literal["cosine", "product"] = _option(
        "product", "of queries and keys in plain layers; cosine is steadier with an XL cache"
    )
    temperature: float = _option(20.0, "start of the learned factor on the cosine of memory layers", above=0)
    position_start: float | None = _option(
        None, "start the local heads at looking 1, 2, 3, ... tokens back, this strongly (default: random, strong)"
    )
    xl: int = _option(0, "X: tokens of an XL cache; 0 for none", at_least=0)
    xl_layers: tuple[int, ...] | None = _option(None, "layers with an XL cache, from 1 (default: all)")
    dropout: float = _option(0.0, "dropout of attention weights and feed-forward layers", at_least=0, below=1)
    keep_memory: bool = _option(False, "keep a row's memory when its document ends, instead of clearing it")
    optimizer: Literal["adamw", "adafactor", "muon"] = _option(
        "adamw",
        "what moves the weights; muon moves the matrices of the layers by orthogonal steps, at AdamW's rates, and "
        "leaves the rest to AdamW",
    )
    learning_rate: float = _option(
        1e-3, "highest learning rate, relative to each weight's size for adafactor; a factor with inverse-sqrt", above=0
    )
    schedule: Literal["cosine", "inverse-sqrt"] = _option(
        "cosine", "decay after the warm-up: a cosine, or 1 / sqrt(step), which has no end"
    )
    warmup: int = _option(100, "steps of the linear warm-up", at_least=0)
    final_rate: float = _option(0.1, "the cosine's end, as a part of the highest learning rate", at_least=0)
    weight_decay: float = _option(0.01, "weight decay of matrices", at_least=0)
    clip: float | None = _option(1.0, "largest norm of the gradient (presets may have none)", above=0)
    device: str = _option("auto", "cpu, cuda, cuda:1, ...; auto takes a GPU where there is one")
    dtype: Literal["float32", "bfloat16"] | None = _option(
        None, "what matrix products compute in (default: bfloat16 on a GPU, float32 elsewhere)"
    )
    compile: bool | None = _option(None, "compile the model (default: on a GPU)")
    capture: bool | None = _option(
        None, "replay each step as a CUDA graph, compiled or not (default: on a GPU; of several, what is compiled)"
    )
    fsdp: bool = _option(False, "with several processes: spread weights and optimiser state over them (FSDP2)")
    skip_nonfinite: bool = _option(
        False, "go on after a step whose loss or gradient is not finite, which then leaves the model as it is"
    )
    seed: int = _option(0, "seed of weights, dropout and the order of the data", at_least=0, below=2**63)
    near_steps: int = _option(
        0, "recall: steps for which documents ask near questions only, before far ones", at_least=0
    )
    eval_bytes: int = _option(65536, "held-out bytes to evaluate on, with and without the memory", at_least=1)
    eval_every: int = _option(0, "steps between evaluations; 0 for one at the end", at_least=0)
    checkpoint_every: int = _option(250, "steps between checkpoints", at_least=1)
    log_every: int = _option(10, "steps between reports (the losses stay on the device until then)", at_least=1)
    log: Literal["tensorboard"] | None = _option(
        None, "also write tensorboard's files to OUT/tensorboard, with the memory's fill and its share of attention"
    )
    sample: int = _option(
        0, "tokens for which to say, at the end, what the memory retrieved; OUT/retrieved.html shows all", at_least=0
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check_kind(field.name, getattr(self, field.name))
            _check_limits(field.name, getattr(self, field.name), field.metadata)
        self._check_step()
        for name in ("compile", "capture"):
            if self.fsdp and getattr(self, name):
                raise ValueError(f"{name} must be off with fsdp, whose parameters come and go, got True")
        if self.fsdp and self.optimizer != "adamw":
            raise ValueError(f"optimizer must be adamw with fsdp, got {self.optimizer!r}")
        if self.memory_late and self.memory <= NEXT_TO_NONE:
            raise ValueError(f"memory must be above {NEXT_TO_NONE} with memory_late, got {self.memory}")
        for name in ("memory_layers", "xl_layers"):
            wrong = [layer for layer in getattr(self, name) or () if not 1 <= layer <= self.layers]
            if wrong:
                raise ValueError(f"{name} must name layers from 1 to {self.layers}, got {wrong[0]}")
        for name in ("heads", "memory_heads"):
            if (getattr(self, name) or self.heads) % self.kv_heads:
                raise ValueError(f"{name} must be a multiple of kv_heads={self.kv_heads}, got {getattr(self, name)}")

    def _check_step(self) -> None:
        """Refuses steps of so many rows or tokens that no machine would end one."""
        rows = self.batch * self.segments * self.accumulate
        if rows > MOST_ROWS:
            raise ValueError(f"batch, segments and accumulate must make at most {MOST_ROWS} rows a step, got {rows}")
        if rows * self.segment > MOST_TOKENS:
            raise ValueError(f"segment must make at most {MOST_TOKENS} tokens a step, got {rows * self.segment}")

    def memory_at(self, step: int) -> int:
        """How many entries the memories have room for in the step after so many.

        >>> settings = Settings(memory=1000, memory_late=0.1, steps=50)
        >>> [settings.memory_at(step) for step in (0, 44, 45, 50)]
        [32, 32, 1000, 1000]
        """
        late = self.memory_late > 0 and step < round((1.0 - self.memory_late) * self.steps)
        return NEXT_TO_NONE if late else self.memory

    def compute_dtype(self, device: torch.device) -> torch.dtype:
        """What matrix products compute in on a device; weights stay float32.

        >>> import torch
        >>> Settings().compute_dtype(torch.device("cpu")), Settings().compute_dtype(torch.device("cuda"))
        (torch.float32, torch.bfloat16)
        """
        import torch

        default = "bfloat16" if device.type == "cuda" else "float32"
        return getattr(torch, self.dtype or default)

    def to_json(self) -> dict[str, Any]:
        """The values as JSON holds them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Settings:
        """Settings of what `to_json` returned. Raises ValueError for names that do not exist."""
        if not isinstance(values, Mapping):
            raise ValueError(f"settings must be names with values, got {values!r}")
        unknown = set(values) - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise ValueError(f"settings must be those of this version, got {sorted(unknown)}")
        fields: dict[str, Any] = {n: tuple(value) if isinstance(value, list) else value for n, value in values.items()}
        return cls(**fields)


@cache
def hints() -> dict[str, Any]:
    """The annotation of each setting, by name: the one table that checks and command line read."""
    return get_type_hints(Settings)


def _check_kind(name: str, value: Any) -> None:
    annotation = hints()[name]
    if isinstance(value, list) or not allows(annotation, value):
        choices = kind_of(annotation).choices
        expected = f"one of {', '.join(choices)}" if choices else f"of type {described(annotation)}"
        raise ValueError(f"{name} must be {expected}, got {value!r}")


def _check_limits(name: str, value: Any, limits: Mapping[str, Any]) -> None:
    if value is None:
        return
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ValueError(f"{name} must be below {2**63}, got {value}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    if "below" in limits and not value < limits["below"]:
        raise ValueError(f"{name} must be below {limits['below']}, got {value}")
    if "at_least" in limits and not value >= limits["at_least"]:
        raise ValueError(f"{name} must be at least {limits['at_least']}, got {value}")
    if "at_most" in limits and not value <= limits["at_most"]:
        raise ValueError(f"{name} must be at most {limits['at_most']}, got {value}")
    if "above" in limits and not value > limits["above"]:
        raise ValueError(f"{name} must be above {limits['above']}, got {value}")
