"""Adafactor, with every number on the device.

For a matrix W (n, m) with gradient G, at step t, with beta = 1 - t^-0.8:

    R <- beta R + (1 - beta) mean over columns of G²          (n, 1)
    C <- beta C + (1 - beta) mean over rows of G²             (1, m)
    U  = G / sqrt(R C / mean(R)),  U <- U / max(1, RMS(U) / d)
    W <- W - rate · max(eps2, RMS(W)) · U

Vectors keep the mean of G² whole. So a matrix's second moments take n + m numbers, and the rate is relative to the
size of the weights. Source: Shazeer and Stern 2018 (arXiv 1804.04235), algorithms 4 to 6, without their cap of the rate
at 1 / sqrt(t), which is the schedule's.

`torch.optim.Adafactor` is the same formula, but reads two numbers per weight from the device in every step: a GPU would
wait, and its step cannot be captured as a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

Change = tuple[Tensor, Tensor]  # a tensor of the model or of the state, and what takes its place


class Adafactor(torch.optim.Optimizer):
    """Moves weights by steps relative to their size; see the module.

    Args:
        params: tensors, or groups with options of their own. lr: the relative rate, a number or a tensor on the
            device, which a captured step reads anew in each replay.
        beta2_decay: the power of t. eps: eps1 bounds the second moments below, eps2 the size of the weights.
        d: largest root mean square of an update. weight_decay: decoupled, times lr.

    Attributes:
        found_inf: () float32 on the device or None; where it is 1 a step changes nothing, as fused optimisers do.

    Raises:
        ValueError: an option out of range.

    >>> weight = torch.nn.Parameter(torch.ones(3, 2))
    >>> optimizer = Adafactor([weight], lr=0.1)
    >>> weight.sum().backward()
    >>> optimizer.step()
    >>> weight[0].tolist()
    [0.899..., 0.899...]
    """

    found_inf: Tensor | None = None

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float | Tensor = 1e-2,
        beta2_decay: float = -0.8,
        eps: tuple[float, float] = (1e-30, 1e-3),
        d: float = 1.0,
        weight_decay: float = 0.0,
    ) -> None:
        if float(lr) < 0 or weight_decay < 0:
            raise ValueError(f"lr and weight_decay must be at least 0, got {float(lr)} and {weight_decay}")
        if beta2_decay > 0 or min(eps) < 0 or d < 1:
            raise ValueError(
                f"beta2_decay must be at most 0, eps at least 0 and d at least 1, got {beta2_decay}, {eps} and {d}"
            )
        options = {"lr": lr, "beta2_decay": beta2_decay, "eps": eps, "d": d, "weight_decay": weight_decay}
        super().__init__(params, {**options, "capturable": True})  # a loaded state's `step` goes to the device too

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every weight that has a gradient; nothing waits for the device."""
        if closure is not None:
            raise ValueError("closure must be None: the gradients are there already")
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._take(self._changes(weight, weight.grad, group))

    def _take(self, changes: list[Change]) -> None:
        for old, new in changes:
            old.copy_(new if self.found_inf is None else torch.where(self.found_inf == 0, new, old))

    def _changes(self, weight: Tensor, gradient: Tensor, group: dict[str, Any]) -> list[Change]:
        state, (smallest, least) = self.state[weight], group["eps"]
        if not state:
            state.update(initial_state(weight))
        step = state["step"] + 1
        share = step ** group["beta2_decay"]
        squared = gradient.square()
        changes = [(state["step"], step)]
        if weight.dim() > 1:
            row = torch.lerp(state["row_var"], squared.mean(dim=-1, keepdim=True), share)
            column = torch.lerp(state["col_var"], squared.mean(dim=-2, keepdim=True), share)
            changes += [(state["row_var"], row), (state["col_var"], column)]
            squared = row * column / row.mean(dim=-2, keepdim=True).clamp(min=smallest)
        else:
            squared = torch.lerp(state["variance"], squared, share)
            changes += [(state["variance"], squared)]
        update = gradient * squared.clamp(min=smallest).rsqrt()
        update = update / (_root_mean_square(update) / group["d"]).clamp(min=1.0)
        rate = group["lr"] * _root_mean_square(weight).clamp(min=least)
        return [*changes, (weight, weight * (1 - group["lr"] * group["weight_decay"]) - rate * update)]


def _root_mean_square(tensor: Tensor) -> Tensor:
    return tensor.square().mean().sqrt()


def initial_state(weight: Tensor) -> dict[str, Tensor]:
    """What the optimiser keeps for a weight before its first step: zeros, on the weight's device."""
    step = torch.zeros((), dtype=torch.float32, device=weight.device)
    if weight.dim() < 2:
        return {"step": step, "variance": torch.zeros_like(weight)}
    row, column = (*weight.shape[:-1], 1), (*weight.shape[:-2], 1, weight.shape[-1])
    return {"step": step, "row_var": weight.new_zeros(row), "col_var": weight.new_zeros(column)}
