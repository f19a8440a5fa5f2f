"""What other people's trainers and wrappers expect of a model: Hugging Face's Trainer and PEFT, accelerate, Lightning.

Nothing of them is imported. Shapes: B documents, N tokens of the segment.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from memtrans.layers import device_of, dtype_of
from memtrans_kernels import checks
from memtrans_kernels.checks import may_look


class Configuration(dict[str, Any]):
    """The arguments of a model's constructor, as JSON holds them, that can be read as attributes too.

    An attribute that is set (Trainer sets `use_cache`) is no argument, and is not saved.

    >>> config = Configuration(dim=8)
    >>> config.use_cache = False
    >>> config.dim, config.use_cache, config
    (8, False, {'dim': 8})
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"config has no {name!r}") from None

    def to_dict(self) -> dict[str, Any]:
        """The arguments alone."""
        return dict(self)

    def to_json_string(self, *_: Any, **__: Any) -> str:
        """The arguments alone, as JSON; transformers' own arguments mean nothing here."""
        return json.dumps(self, indent=2) + "\n"


class ForTrainers(nn.Module):
    """What Trainer, PEFT and accelerate call, for a model with `activation_checkpointing`."""

    activation_checkpointing: bool
    validate: bool
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # Trainer then says in `num_items_in_batch` how many labels a step scores
    _asked_labels = False

    @property
    def device(self) -> torch.device:
        """Where the model's first parameter is that is anywhere: offloaded ones are not."""
        return device_of(self)

    @property
    def dtype(self) -> torch.dtype:
        """Of the model's first floating-point parameter."""
        return dtype_of(self)

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Sets `activation_checkpointing`, as the newer Trainer does it.

        Raises ValueError for what differs from PyTorch's checkpoints without `use_reentrant`, of each layer, kept where
        they are.
        """
        given = {"every_n_layers": every_n_layers, "offload": offload, **(activation_checkpointing_kwargs or {})}
        for name, value in given.items():
            known = {"every_n_layers": 1, "offload": False, "use_reentrant": False}.get(name)
            if value != known:
                raise ValueError(f"{name} must be {known} in activation checkpointing, got {value!r}")
        self.activation_checkpointing = True

    def activation_checkpointing_disable(self) -> None:
        """Resets `activation_checkpointing`."""
        self.activation_checkpointing = False

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        """`activation_checkpointing_enable` by its older name."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **options)

    def gradient_checkpointing_disable(self) -> None:
        """`activation_checkpointing_disable` by its older name."""
        self.activation_checkpointing_disable()

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether layers are recomputed in the backward pass."""
        return self.activation_checkpointing

    def as_segment(
        self,
        x: Tensor | None,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        mask: Tensor | None,
        labels: Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """`x` and `mask`, of arguments by the names that tokenizers and collators give them; see `forward`."""
        if input_ids is not None:
            if x is not None:
                raise ValueError("x must be None beside input_ids, which is another name for it")
            x = input_ids
            self._ask_labels(input_ids, labels)
        if attention_mask is not None:
            if mask is not None:
                raise ValueError("mask must be None beside attention_mask, which is another name for it")
            checks.tensors(attention_mask=attention_mask)
            checks.within("attention_mask", attention_mask, 0, 1)
            mask = attention_mask.bool()
        return x, mask

    def _ask_labels(self, input_ids: Any, labels: Any) -> None:
        """Warns where labels are the ids themselves, as for models that shift them; on a GPU of the first pass alone.

        There a look waits for the device.
        """
        if torch.compiler.is_compiling() or not isinstance(labels, Tensor) or not isinstance(input_ids, Tensor):
            return
        if labels.shape != input_ids.shape:
            return
        if labels.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        if not may_look(labels, self.validate or not self._asked_labels):
            return
        self._asked_labels = True
        scored = labels >= 0
        if labels.shape[1] > 1 and bool(scored.any() & (labels == input_ids)[scored].all()):
            warnings.warn(
                "labels must hold what comes after each token, got input_ids themselves: this model does not shift "
                "them, so it learns to repeat its input; give input_ids[:, :-1] and labels[:, 1:]",
                stacklevel=4,
            )


def without_memories(knn_memories: Sequence[Any], layers: Sequence[int]) -> bool:
    """Whether a pass that a Trainer makes was given no memories for the layers that have some; says so in a warning."""
    if len(layers) == 0 or knn_memories != ():
        return False
    warnings.warn(
        "knn_memories were not given: each row is a document of its own that begins here, so layers with a memory find "
        "nothing; give Trainer a compute_loss that passes memories (docs/migrating.md)",
        stacklevel=3,
    )
    return True
