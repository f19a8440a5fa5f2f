"""Training a model with a memory in transformers' Trainer: rows that go on, and what would silently break them.

A row of a batch continues the document of the same row of the batch before; the memory follows it.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, RandomSampler
from transformers import Trainer, TrainerCallback
from transformers.trainer_pt_utils import DistributedLengthGroupedSampler, LengthGroupedSampler

from memtrans.hf.model_memory import ModelMemory
from memtrans_kernels import checks

DIRECTORY = "memory"  # of a checkpoint: what `ModelMemory.save` writes
TRAIN = inspect.unwrap(Trainer.train).__code__
SHUFFLING = (RandomSampler, LengthGroupedSampler, DistributedLengthGroupedSampler)


def document_rows(documents: Iterable[Sequence[int]], batch: int, segment: int) -> IterableDataset:
    """Documents as rows of a Trainer's dataset: row i of each batch goes on where row i of the last one stopped.

    A row whose document ended takes the next one, with `new_document` True; the dataset ends when there is none left
    for a row. A document's last segment is padded, and its padding has no label.

    Args:
        documents: ids of their tokens. batch: B, rows that the Trainer takes at a time, over all its processes.
        segment: N, tokens of a row.

    Returns:
        A dataset of input_ids, attention_mask, labels (N,) int64 and new_document () bool.

    Raises:
        ValueError: fewer documents than rows, found when it is read. TypeError: a size that is no integer.

    >>> rows = document_rows([[1, 2, 3], [4, 5, 6, 7], [8]], batch=2, segment=2)
    >>> [(row["input_ids"].tolist(), bool(row["new_document"])) for row in rows]
    [([1, 2], True), ([4, 5], True), ([3, 0], False), ([6, 7], False)]
    """
    return _DocumentRows(documents, checks.integer("batch", batch, low=1), checks.integer("segment", segment, low=1))


class _DocumentRows(IterableDataset):
    def __init__(self, documents: Iterable[Sequence[int]], batch: int, segment: int) -> None:
        super().__init__()
        self.documents, self.batch, self.segment = documents, batch, segment

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        waiting = iter(self.documents)
        rows: list[list[Tensor]] = [[] for _ in range(self.batch)]
        begun = 0
        while True:
            fresh = [not row for row in rows]
            for row in rows:
                if not row:
                    document = next((d for d in waiting if len(d)), None)
                    if document is None:
                        if begun < self.batch:
                            raise ValueError(f"documents must be at least batch={self.batch} with tokens, got {begun}")
                        return
                    row.extend(torch.as_tensor(document, dtype=torch.int64).split(self.segment))
                    begun += 1
            yield from (self._row(row.pop(0), new) for row, new in zip(rows, fresh, strict=True))

    def _row(self, ids: Tensor, new: bool) -> dict[str, Tensor]:
        missing = self.segment - len(ids)
        return {
            "input_ids": torch.nn.functional.pad(ids, (0, missing)),
            "attention_mask": torch.nn.functional.pad(torch.ones_like(ids), (0, missing)),
            "labels": torch.nn.functional.pad(ids, (0, missing), value=-100),
            "new_document": torch.tensor(new),
        }


def _shuffles(loader: Any) -> bool:
    """Whether a DataLoader draws or sorts its rows; what Trainer makes of one keeps that sampler in that of batches."""
    while loader is not None and not isinstance(loader, SHUFFLING):
        inner = getattr(loader, "batch_sampler", None)
        loader = getattr(loader, "sampler", None) if inner is None else inner
    return loader is not None


def _check_rows(name: str, loader: Any, batch: int) -> None:
    """Raises ValueError for data of which row i of a batch does not go on where row i of the batch before stopped.

    name: of the Trainer's argument. batch: rows that the Trainer takes at a time, over all its processes.
    """
    if _shuffles(loader):
        raise ValueError(
            f"{name} must come in its own order with a memory, got one that is shuffled or grouped by length: give a "
            f"Trainer document_rows(...)"
        )
    dataset = getattr(loader, "dataset", None)
    documents = getattr(dataset, "dataset", dataset)  # accelerate's share of a rank holds the whole
    if isinstance(documents, _DocumentRows) and documents.batch != batch:
        raise ValueError(
            f"{name} must have the batch of its Trainer, which takes {batch} rows at a time, got "
            f"document_rows(batch={documents.batch})"
        )


def _trains() -> bool:
    """Whether a Trainer's `train` is what runs here: no callback is told of one that an exception ended."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not TRAIN:
        frame = frame.f_back
    return frame is not None


class MemoryCallback(TrainerCallback):
    """Lets a Trainer's passes write into a memory, and refuses what would mix its documents up.

    The memory is empty when training begins and when it ends; where an exception ended it, when the next pass begins.
    Evaluations during training have a memory of their own, which each one begins anew; `trainer.evaluate()` by itself
    needs `with memory.training():` around it. Beside each checkpoint a directory `memory` holds what `ModelMemory.save`
    writes; a training of one process that goes on from a checkpoint of its `output_dir` begins with that.

    Args:
        memory: of the model that is trained.

    Raises:
        ValueError: when training begins, with remove_unused_columns=True, which drops `new_document` without a word,
            more than one worker that loads data, or several GPUs for one process; when training or an evaluation
            begins, with data that is shuffled or grouped by length, `document_rows` of another batch than the
            Trainer's, and rows without `new_document`.

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments
    >>> sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    >>> from memtrans.hf import add_memory
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=50, max_position_embeddings=64, **sizes))
    >>> callback = MemoryCallback(add_memory(model, max_memories=100, segment=16))
    >>> # Trainer(model, ..., callbacks=[callback])
    >>> callback.on_train_begin(TrainingArguments(report_to=[]), None, None)
    Traceback (most recent call last):
        ...
    ValueError: remove_unused_columns must be False with a memory, got True: it drops new_document
    """

    def __init__(self, memory: ModelMemory) -> None:
        self.memory = memory
        self._handles: list[Any] = []  # while a training runs
        self._is_seen = False  # whether it is seen to run
        self._pass: Any = None
        self._evaluated: Any = None  # what was checked

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Checks how the data comes, and lets passes write from now on."""
        if args.remove_unused_columns:
            raise ValueError("remove_unused_columns must be False with a memory, got True: it drops new_document")
        if args.dataloader_num_workers > 1:
            raise ValueError(
                f"dataloader_num_workers must be 0 or 1 with a memory, got {args.dataloader_num_workers}: rows would "
                f"not go on where they stopped"
            )
        if args.n_gpu > 1:
            raise ValueError(
                f"a process must have one GPU with a memory, got {args.n_gpu} for DataParallel: start one for each "
                f"with torchrun, or choose one by CUDA_VISIBLE_DEVICES"
            )
        _check_rows("train_dataset", kwargs.get("train_dataloader"), args.train_batch_size * args.world_size)
        self._end()
        self._go_on(args, state)
        self._is_seen, decoder = _trains(), self.memory.decoder
        self._handles = [
            decoder.register_forward_pre_hook(self._begin_pass, prepend=True, with_kwargs=True),
            decoder.register_forward_hook(self._end_pass, always_call=True),
        ]

    def _go_on(self, args: Any, state: Any) -> None:
        """Takes up the memory of the checkpoint that a training goes on from, whose documents go on as well."""
        saved = Path(args.output_dir) / f"checkpoint-{state.global_step}" / DIRECTORY
        if state.global_step and args.world_size == 1 and saved.is_dir():  # other processes' are not in it
            self.memory.load(saved)

    def _begin_pass(self, decoder: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Lets a pass of the training write; one behind a training that an exception ended is any other."""
        if self._is_seen and not _trains():
            self._end()
            return
        if self.memory.is_off:
            return
        if "new_document" not in kwargs:
            self._end()
            raise ValueError(
                "datasets must say new_document in each row with a memory, got a batch that does not: give a Trainer "
                "document_rows(...)"
            )
        self._pass = self.memory.training()
        self._pass.__enter__()

    def _end_pass(self, *_: Any) -> None:
        if self._pass is not None:
            self._pass.__exit__(None, None, None)
        self._pass = None

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Passes write no more, and what training read is forgotten."""
        if self._handles:
            self._end()

    def _end(self) -> None:
        self._end_pass()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.memory.forget_evaluation()
        self.memory.reset()

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Checks how the data of an evaluation comes, at its first batch: before it no callback is told of it."""
        loader = kwargs.get("eval_dataloader")
        if not (self._handles or self.memory.is_writing) or loader is self._evaluated:
            return
        self._evaluated = loader
        try:
            _check_rows("eval_dataset", loader, args.eval_batch_size * args.world_size)
        except ValueError:
            self._end()
            raise

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The next evaluation begins with an empty memory."""
        self._evaluated = None
        self.memory.forget_evaluation()

    def on_predict(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """As `on_evaluate`."""
        self.on_evaluate(args, state, control)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Saves the memory beside the checkpoint."""
        if state.is_world_process_zero:
            self.memory.save(Path(args.output_dir) / f"checkpoint-{state.global_step}" / DIRECTORY)
