"""The two ends of a model: token ids to embeddings, and the last layer's result to logits; or neither.

Both layers are called, whatever they were replaced by or wrapped in. Shapes: B documents, N tokens of the segment, V
tokens of the vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memtrans.checks import IGNORED, check_labels
from memtrans.cross_entropy import fits, in_chunks, linear_cross_entropy
from memtrans.layers import bare_weight, device_of, is_bare
from memtrans_kernels import checks

REDUCTIONS = ("mean", "sum", "none")  # of the losses of tokens, as PyTorch calls them


class Vocabulary(nn.Module):
    """What a model does with its `token_emb` and `to_logits`.

    Attributes:
        num_tokens: V; None of a model without a vocabulary.
        token_emb: ids (B, N) to (B, N, dim); None without a vocabulary.
        to_logits: a norm and a linear layer; the norm alone without a vocabulary.
    """

    config: dict[str, Any]
    dim: int
    pad_id: int
    validate: bool
    num_tokens: int | None
    token_emb: nn.Module | None
    to_logits: nn.Module
    clear_memories_on_sos_token_id: int | None
    clear_memories_on_eos_token_id: int | None

    @property
    def vocabulary(self) -> int:
        """`num_tokens`, for what reads or writes tokens. Raises ValueError of a model without a vocabulary."""
        if self.num_tokens is None:
            raise ValueError("num_tokens must be given to a model that reads tokens, got None: it takes inputs_embeds")
        return self.num_tokens

    def head(
        self,
        hidden: Tensor,
        labels: Tensor | None = None,
        return_embeddings: bool = False,
        num_items_in_batch: Tensor | int | None = None,
        reduction: str = "mean",
    ) -> Any:
        """What `forward` returns for the last layer's result (B, N, dim)."""
        if return_embeddings:
            norm = self._own_norm()
            assert norm is not None
            return norm(hidden)
        if labels is not None and num_items_in_batch is None:
            return self._loss(hidden, labels, reduction)
        logits = self.to_logits(hidden)  # (B, N, V)
        if num_items_in_batch is None:
            return logits
        loss = {} if labels is None else {"loss": self._loss_of(logits, labels, "sum") / num_items_in_batch}
        return {**loss, "logits": logits}

    def check_head(
        self,
        shape: tuple[int, int],
        labels: Tensor | None,
        return_embeddings: bool,
        device: torch.device,
        reduction: str = "mean",
    ) -> None:
        """Raises unless labels fit a segment (B, N) = `shape`, and embeddings can be returned where they are asked."""
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
        own = self._own_norm()
        if return_embeddings and own is None:
            raise ValueError(
                "return_embeddings must be False beside a to_logits that is not the model's own (a norm and a linear "
                f"layer, without a wrapper or hooks), got {type(self.to_logits).__name__}"
            )
        if labels is None:
            return
        if self.num_tokens is None and own is not None:
            raise ValueError("labels must be None in a model without a vocabulary (num_tokens=None)")
        classes = None if own is None else self.num_tokens
        check_labels(labels, shape, classes, self.pad_id, device, self.validate)

    def _loss(self, hidden: Tensor, labels: Tensor, reduction: str) -> Tensor:
        """() over the labels (B, N) that are scored, all but pad_id and IGNORED; of each of them (B, N) for "none"."""
        if not in_chunks(labels.numel(), self.num_tokens) or (reduction == "none" and torch.is_grad_enabled()):
            return self._loss_of(self.to_logits(hidden), labels, reduction)
        norm, linear = self._own_norm(), self.get_output_embeddings()
        weight = bare_weight(linear, nn.Linear)
        if norm is None or linear is None or weight is None:
            return self._loss_of(self.to_logits(hidden), labels, reduction)
        normed, bias = norm(hidden), linear._parameters["bias"]
        if not fits(normed, weight, bias):
            return self._loss_of(linear(normed), labels, reduction)
        loss = linear_cross_entropy(
            normed.flatten(0, 1), weight, bias, self._targets(labels), ignore_index=self.pad_id, reduction=reduction
        )
        return loss.view_as(labels) if reduction == "none" else loss

    def _loss_of(self, logits: Tensor, labels: Tensor, reduction: str) -> Tensor:
        """The same of logits (B, N, V)."""
        targets = self._targets(labels)
        loss = F.cross_entropy(logits.flatten(0, 1), targets, ignore_index=self.pad_id, reduction=reduction)
        return loss.view_as(labels) if reduction == "none" else loss

    def _targets(self, labels: Tensor) -> Tensor:
        """(B·N,), pad_id where a label is not scored."""
        return labels.long().masked_fill(labels == IGNORED, self.pad_id).flatten()

    def _own_norm(self) -> nn.Module | None:
        """The norm in `to_logits`, while that is the Sequential that the constructor made; None of any other."""
        head = self.to_logits
        if not isinstance(head, nn.Sequential) or type(head) is not nn.Sequential or not is_bare(head):
            return None
        own = len(head) == (1 if self.num_tokens is None else 2) and isinstance(head[0], nn.LayerNorm)
        return head[0] if own else None

    def sample(self) -> Tensor | None:
        """A weight of the ends that may be looked at, for the device and dtype of embeddings; None where none may."""
        if self.token_emb is not None:
            return bare_weight(self.token_emb, nn.Embedding)
        return bare_weight(self._own_norm(), nn.LayerNorm)

    @torch.no_grad()
    def of_embeddings(self) -> tuple[torch.device, torch.dtype]:
        """Where embeddings of tokens are, and the dtype of matrix products with them.

        Where `token_emb` does not show its weight, one token tells.
        """
        sample = self.sample()
        if sample is None and self.token_emb is not None:
            sample = self.token_emb(torch.zeros(1, 1, dtype=torch.int64, device=device_of(self)))
        assert sample is not None
        kind = sample.device.type
        autocast = torch.is_autocast_enabled(kind)
        return sample.device, torch.get_autocast_dtype(kind) if autocast else sample.dtype

    # ------------------------------------------------------------------------------------------ another vocabulary

    def get_input_embeddings(self) -> nn.Module | None:
        """`token_emb`."""
        return self.token_emb

    def get_output_embeddings(self) -> nn.Module | None:
        """The linear layer of `to_logits`; None where that was replaced, or there is no vocabulary."""
        head = self.to_logits
        return None if self.num_tokens is None or self._own_norm() is None else head[1]  # type: ignore[index]

    @torch.no_grad()
    def resize_token_embeddings(self, new_num_tokens: int | None = None) -> nn.Module | None:
        """Gives the model a vocabulary of another size; call it before an optimiser, a wrapper or a compiler sees it.

        Known tokens keep their weights, and new ones begin as the mean of those. Tied weights stay tied.

        Args:
            new_num_tokens: V. Default: as many as there are.

        Returns:
            `token_emb`.

        Raises:
            ValueError, TypeError: a size that is no integer, below 1, or without a token that clears memories; layers
                that were replaced or wrapped; a model without a vocabulary.

        >>> from memtrans import MemorizingTransformer
        >>> model = MemorizingTransformer(num_tokens=9, dim=16, depth=2, dim_head=8, heads=2, memorizing_layers=())
        >>> model.resize_token_embeddings(12), model(torch.tensor([[11]])).shape
        (Embedding(12, 16), torch.Size([1, 1, 12]))
        """
        if new_num_tokens is None:
            return self.token_emb
        size = checks.integer("new_num_tokens", new_num_tokens, low=1)
        table, linear = self.token_emb, self.get_output_embeddings()
        if bare_weight(table, nn.Embedding) is None or bare_weight(linear, nn.Linear) is None:
            raise ValueError(
                "new_num_tokens must be given to a model whose token_emb and to_logits are its own, got "
                f"{type(table).__name__} and {type(self.to_logits).__name__}: resize before wrapping"
            )
        assert isinstance(table, nn.Embedding) and isinstance(linear, nn.Linear)
        for token in (self.clear_memories_on_sos_token_id, self.clear_memories_on_eos_token_id):
            if token is not None and token >= size:
                raise ValueError(f"new_num_tokens must leave token {token}, which clears memories, got {size}")
        tied = linear.weight is table.weight
        table.weight = _with_rows(table.weight, size)
        linear.weight = table.weight if tied else _with_rows(linear.weight, size)
        linear.bias = _with_rows(linear.bias, size)
        self.num_tokens = table.num_embeddings = linear.out_features = size
        self.config["num_tokens"] = size
        return table


def _with_rows(weight: Tensor, size: int) -> nn.Parameter:
    """The first `size` rows of a weight; rows that it lacks are the mean of its own."""
    mean = weight.float().mean(dim=0, keepdim=True).to(weight.dtype)
    rows = torch.cat((weight[:size], mean.expand(max(0, size - len(weight)), *weight.shape[1:])))
    return nn.Parameter(rows, requires_grad=weight.requires_grad)
