"""Sets of values that have a name, and the figures of each.

`paper()` is the model of Wu et al., "Memorizing Transformers" (ICLR 2022, arXiv 2203.08913), for any context, memory
and XL cache; its table 4 compares ten of them. What is known from where:

- Section 4.2, as others quote it: 12 layers, width 1024, 8 heads of 128, a feed-forward layer of 4096, K = 32, the
  memory at layer 9, Adafactor; a vocabulary of 32,000 (github.com/lucidrains/memorizing-transformers-pytorch/issues/4).
- The authors' code (github.com/google-research/meliad, `lr_rsqrt_decay_std`, "as used in the memorizing and
  block-recurrent transformer papers"): a linear warm-up of 1,000 steps, then 1 / sqrt(step), times 1. Queries and keys
  are normalised in every layer, "more stable with Transformer XL" (`base_memory.gin`).
- The same issue shows the table's rows (512, 8192, 512), the fourth from its end, and (512, none, none), its first.
  The other rows, 2^17 tokens a step, 500,000 steps and K = 128 in the first version are from memory, not looked up.

What differs from it: documents are read as bytes unless there is a tokenizer, and bytes use 256 of the 32,000 tokens
(`vocabulary=256` leaves the rest out); the search is exact; a key enters the memory when it leaves the XL cache; the
learned factors on cosines start at 20 in the memory's layer and at sqrt(128) in the others, the authors' at 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from memtrans.training.settings import Settings

TABLE_4 = (  # context, memory, XL cache
    (512, 0, 0),
    (2048, 0, 0),
    (512, 0, 512),
    (2048, 0, 2048),
    (512, 1536, 0),
    (512, 8192, 0),
    (512, 8192, 512),
    (512, 65536, 512),
    (2048, 8192, 2048),
    (2048, 65536, 2048),
)
TOKENS_AT_ONCE = 2**14  # of a backward pass of the paper's presets; eight of them make a step of 2^17


def paper(
    context: int = 512,
    memory: int = 8192,
    xl_cache: int = 512,
    *,
    memory_layers: tuple[int, ...] = (9,),
    neighbours: int = 32,
    combine: Literal["softmax", "gate"] = "gate",
    kv_heads: int = 8,
) -> Settings:
    """The paper's model and optimiser, for a row of its table 4 or any other; see the module.

    Args:
        context: N, tokens of a segment. memory: M, 0 for none. xl_cache: X, of every layer, 0 for none.
        memory_layers: from 1. neighbours: K. combine: "gate", or "softmax" as in the first version.
        kv_heads: G; 8 is a memory of its own for each head, 1 a shared one, as upstream's.

    Raises ValueError when a size is out of range or a layer does not exist.

    >>> settings = paper(context=512, memory=8192, xl_cache=512)
    >>> settings.batch, settings.accumulate, settings.memory_layers
    (32, 8, (9,))
    >>> paper(memory_layers=(13,))
    Traceback (most recent call last):
    ValueError: memory_layers must name layers from 1 to 12, got 13
    """
    return Settings(
        steps=500_000,
        batch=max(1, TOKENS_AT_ONCE // max(1, context)),
        segment=context,
        accumulate=8,
        vocabulary=32_000,
        layers=12,
        width=1024,
        heads=8,
        head_width=128,
        kv_heads=kv_heads,
        memory=memory,
        memory_layers=memory_layers,
        neighbours=neighbours,
        combine=combine,
        plain_similarity="cosine",
        xl=xl_cache,
        optimizer="adafactor",
        learning_rate=1.0,
        schedule="inverse-sqrt",
        warmup=1000,
        weight_decay=0.0,
        clip=None,
        eval_bytes=1_000_000,
        eval_every=5000,
        checkpoint_every=1000,
        log_every=20,
    )


def paper_name(context: int, memory: int, xl_cache: int) -> str:
    """Of a row of table 4, with 0 for none.

    >>> paper_name(512, 8192, 512)
    'paper-512-8192-512'
    """
    return f"paper-{context}-{memory}-{xl_cache}"


PRESETS: dict[str, Settings] = {
    # Minutes on two CPU cores, on text that every machine has.
    "demo": Settings(
        steps=800,
        batch=4,
        segment=256,
        layers=4,
        width=128,
        heads=4,
        head_width=32,
        memory=2048,
        neighbours=16,
        memory_offset=-4.0,
        position_start=8.0,
        learning_rate=2e-3,
        eval_bytes=16384,
        eval_every=100,
        sample=4,
    ),
    # Minutes on one GPU: what docs/results.md trains, on documents of 64 KB and more.
    "code": Settings(
        steps=18_310,  # 300 MB
        batch=32,
        segment=512,
        layers=6,
        width=384,
        heads=6,
        head_width=64,
        memory=65536,
        memory_layers=(4,),
        neighbours=32,
        memory_offset=-4.0,
        plain_similarity="cosine",
        position_start=8.0,
        xl=512,
        learning_rate=1e-3,
        warmup=1000,
        eval_bytes=1_000_000,
        eval_every=2000,
        sample=4,
        checkpoint_every=1000,
        log_every=20,
    ),
    # Two layers, one memory head: the first gathers a name's letters, the second finds where they stood. See recall.py.
    "recall": Settings(
        data="recall",
        steps=1000,
        batch=16,
        segment=128,
        layers=2,
        width=64,
        heads=4,
        head_width=32,
        memory=4096,
        memory_layers=(2,),
        memory_heads=1,
        neighbours=16,
        memory_offset=-2.0,
        temperature=6.0,
        position_start=8.0,
        learning_rate=4e-3,
        final_rate=0.05,
        weight_decay=0.0,
        near_steps=350,
        eval_bytes=65536,
        eval_every=200,
        sample=4,
    ),
    # The set-up of memorizing-transformers-pytorch's own train.py: 16 random windows of 5 segments of 512 tokens,
    # a fresh memory each, a constant learning rate, no weight decay (AdamW is then its Adam, but for beta2 = 0.95).
    "enwik8": Settings(
        data="enwik8",
        windows=True,
        steps=100_000,
        batch=16,
        segment=512,
        accumulate=5,
        layers=8,
        width=512,
        heads=8,
        head_width=64,
        memory=512 * 15,
        memory_layers=(4,),
        neighbours=32,
        xl=512,
        xl_layers=(7, 8),
        learning_rate=2e-4,
        warmup=0,
        final_rate=1.0,
        weight_decay=0.0,
        clip=0.5,
        eval_bytes=1_000_000,
        eval_every=5000,
        checkpoint_every=1000,
        log_every=20,
    ),
    **{paper_name(*row): paper(*row) for row in TABLE_4},
    # One softmax over retrieved and local keys, and more neighbours, as in the paper's first version.
    "paper-v1": paper(combine="softmax", neighbours=128),
}


# ------------------------------------------------------------------------------------------------------------ figures

MATRIX_RATE = 330e12  # FLOP/s of training at a width of 1024, in proportion below: a third of an H100's in bfloat16
SEARCH_RATE = 600e12  # FLOP/s of scoring keys of D = 128
SEARCH_START = 6e-9  # seconds a query takes beside that


@dataclass(frozen=True)
class Figures:
    """What a run of some settings is, without running it.

    Attributes:
        parameters: numbers that the model learns. memory_bytes: of all KNN memories of a batch, in float16.
        step_seconds: of an optimiser step on one H100 in bfloat16: a prediction, see `figures`.
        step_tokens: that such a step reads.
    """

    parameters: int
    memory_bytes: int
    step_seconds: float
    step_tokens: int

    def __str__(self) -> str:
        return (
            f"{self.parameters / 1e6:6.1f} M parameters  {self.memory_bytes / 1e9:6.2f} GB memory  "
            f"{self.step_seconds * 1e3:6.1f} ms predicted for a step of {self.step_tokens} tokens"
        )


def figures(settings: Settings) -> Figures:
    """Counts parameters and bytes, and predicts a step's time as that of its matrix products and searches.

    A step does the products that `training.peak.flop_per_token` counts, at MATRIX_RATE; a search 2 D M for each query,
    at SEARCH_RATE, and SEARCH_START. Tests hold it against measured steps.

    >>> print(figures(PRESETS["paper-512-8192-512"]).parameters)
    216688488
    """
    import torch  # here, because `--help` lists the presets and need not wait for it

    from memtrans.shapes import shapes_alone
    from memtrans.training.model import build_model
    from memtrans.training.peak import flop_per_token

    with shapes_alone():
        model = build_model(settings)
    tokens = settings.batch * settings.segment * settings.segments * settings.accumulate
    matrix_seconds = tokens * flop_per_token(model, settings) / (MATRIX_RATE * min(1.0, settings.width / 1024))
    queries = tokens * (settings.memory_heads or settings.heads) * model.num_memory_layers
    search_seconds = queries * (SEARCH_START + 2 * settings.head_width * settings.memory / SEARCH_RATE)
    slots = settings.batch * settings.kv_heads * (settings.memory + settings.segment * settings.segments)
    return Figures(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        memory_bytes=model.num_memory_layers * slots * settings.head_width * 2 * torch.float16.itemsize,
        step_seconds=matrix_seconds + search_seconds,
        step_tokens=tokens,
    )
