"""Muon for the matrices of a model's layers and AdamW for everything else, with every number on the device.

For a matrix W (n, m) with gradient G:

    M <- mu M + (1 - mu) G,  U = mu M + (1 - mu) G
    X  = U / |U|, then five times  X <- a X + (b A + c A²) X  with A = X Xᵀ
    W <- W (1 - rate · decay) - rate · 0.2 sqrt(max(n, m)) · X

The five rounds bring every singular value of X near 1 without finding one, so that a step moves W equally far in all
directions. Its root mean square is then 0.2 of the rate, about that of AdamW's steps: both take one rate and one decay.
Weights of one shape go through the rounds together, in one chain of products.

Sources: Jordan et al. 2024 (kellerjordan.github.io/posts/muon) for the step and a, b, c; Liu et al. 2025 (arXiv
2502.16982), section 2.2, for its size.

`torch.optim.Muon` is the same formula, one weight at a time, but it reads a rate that is on the device in every step: a
GPU would wait, and its step cannot be captured as a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from memtrans.distributed.dtensors import is_sharded

ROUNDS, (A, B, C) = 5, (3.4445, -4.7750, 2.0315)
LIKE_ADAMW = 0.2  # root mean square of an update
SMALLEST = 1e-7  # norm to divide by


class Muon(torch.optim.Optimizer):
    """Moves matrices by steps that are nearly orthogonal, and the weights of some groups as AdamW does; see the module.

    Args:
        params: tensors, or groups with options of their own.
        lr: the rate, a number or a tensor on the device, which a captured step reads anew in each replay.
        orthogonal: True for matrices that move by orthogonal steps, False for weights that AdamW moves.
        momentum: mu. betas, eps: AdamW's. weight_decay: decoupled, times lr.
        dtype: of the products that make a step orthogonal. Default: bfloat16 on a GPU, float32 elsewhere.

    Attributes:
        found_inf: () float32 on the device or None; where it is 1 a step changes nothing, as fused optimisers do.

    Raises:
        ValueError: an option out of range; an orthogonal step for what is no matrix, or is spread over ranks.

    >>> weight, bias = torch.nn.Parameter(torch.eye(2)), torch.nn.Parameter(torch.ones(2))
    >>> optimizer = Muon([{"params": [weight]}, {"params": [bias], "orthogonal": False}], lr=0.1)
    >>> (weight.sum() + bias.sum()).backward()
    >>> optimizer.step()
    >>> bias.tolist()
    [0.89..., 0.89...]
    """

    found_inf: Tensor | None = None

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float | Tensor = 1e-3,
        orthogonal: bool = True,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not (float(lr) >= 0 and weight_decay >= 0 and eps >= 0):  # nor NaN
            raise ValueError(f"lr, weight_decay and eps must be at least 0, got {float(lr)}, {weight_decay} and {eps}")
        if not all(0 <= share < 1 for share in (momentum, *betas)):
            raise ValueError(f"momentum and betas must be in [0, 1), got {momentum} and {betas}")
        options = {"lr": lr, "orthogonal": orthogonal, "momentum": momentum, "betas": betas, "eps": eps, "dtype": dtype}
        # a loaded state's `step` goes to the device too
        super().__init__(params, {**options, "weight_decay": weight_decay, "capturable": True})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds weights with options of their own; see the class."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for weight in group["params"]:
            if is_sharded(weight):
                raise ValueError(
                    "params must have all of their numbers on this rank, got a weight that fully_shard has spread: "
                    "an orthogonal step needs the whole matrix"
                )
            if group["orthogonal"] and weight.dim() != 2:
                raise ValueError(f"params must be matrices where steps are orthogonal, got {tuple(weight.shape)}")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every weight that has a gradient; nothing waits for the device."""
        if closure is not None:
            raise ValueError("closure must be None: the gradients are there already")
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            for weight in weights:
                if not self.state[weight]:
                    self.state[weight].update(initial_state(weight, group["orthogonal"]))
            if weights:
                (self._move_matrices if group["orthogonal"] else self._move_others)(weights, group)

    def _move_matrices(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        gradients, rate, mu = [_gradient(weight) for weight in weights], group["lr"], group["momentum"]
        held = [self.state[weight]["momentum_buffer"] for weight in weights]
        momenta = torch._foreach_lerp(held, gradients, 1 - mu)
        steps = steps_like_adamw(torch._foreach_lerp(gradients, momenta, mu), group["dtype"])
        kept = torch._foreach_mul(weights, 1 - rate * group["weight_decay"])
        moved = torch._foreach_sub(kept, torch._foreach_mul(steps, rate))
        self._take([*held, *weights], [*momenta, *moved])

    def _take(self, places: list[Tensor], found: Sequence[Tensor]) -> None:
        if self.found_inf is not None:
            good = self.found_inf == 0
            found = [torch.where(good, new, old) for new, old in zip(found, places, strict=True)]
        torch._foreach_copy_(places, list(found))

    def _move_others(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        states = [self.state[weight] for weight in weights]
        beta1, beta2 = group["betas"]
        adamw(
            weights,
            [_gradient(weight) for weight in weights],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            capturable=weights[0].is_cuda,
            found_inf=self.found_inf,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def moves_orthogonally(self, weight: Tensor) -> bool:
        """Whether the steps of a weight are orthogonal; AdamW moves it otherwise."""
        return any(weight is one for group in self.param_groups if group["orthogonal"] for one in group["params"])


def _gradient(weight: Tensor) -> Tensor:
    assert weight.grad is not None
    return weight.grad


def initial_state(weight: Tensor, orthogonal: bool) -> dict[str, Tensor]:
    """What the optimiser keeps for a weight before its first step: zeros, on the weight's device."""
    if orthogonal:
        return {"momentum_buffer": torch.zeros_like(weight)}
    step = torch.zeros((), dtype=torch.float32, device=weight.device)
    return {"step": step, "exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}


def steps_like_adamw(updates: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Matrices made nearly orthogonal, in their own dtype, each with the root mean square of a step of AdamW.

    updates: (n, m) each. dtype: of the products. Default: bfloat16 on a GPU, float32 elsewhere.

    >>> [step.shape for step in steps_like_adamw([torch.rand(2, 3), torch.rand(3, 2), torch.rand(2, 3)])]
    [torch.Size([2, 3]), torch.Size([3, 2]), torch.Size([2, 3])]
    """
    alike: dict[tuple[torch.Size, torch.dtype], list[int]] = {}
    for place, update in enumerate(updates):
        alike.setdefault((update.shape, update.dtype), []).append(place)
    steps = list(updates)
    for (shape, own), places in alike.items():
        stack = torch.stack([updates[place] for place in places])  # (weights, n, m)
        together = nearly_orthogonal(stack, dtype).to(own) * (LIKE_ADAMW * max(shape) ** 0.5)
        for place, step in zip(places, together.unbind(), strict=True):
            steps[place] = step
    return steps


def nearly_orthogonal(matrices: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Matrices (weights, n, m) with all their singular values brought near 1, in `dtype`; see the module.

    >>> found = nearly_orthogonal(torch.diag(torch.tensor([3.0, 1.0, 0.1]))[None])
    >>> [0.6 < value < 1.3 for value in torch.linalg.svdvals(found)[0].tolist()]
    [True, True, True]
    """
    if dtype is None:
        dtype = torch.bfloat16 if matrices.is_cuda else torch.float32
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = (matrices / torch.linalg.matrix_norm(matrices, keepdim=True).clamp(min=SMALLEST)).to(dtype)
    for _ in range(ROUNDS):
        gram = torch.bmm(x, x.mT) if wide else torch.bmm(x.mT, x)  # of the shorter side
        gram = torch.baddbmm(gram, gram, gram, beta=B, alpha=C)
        x = torch.baddbmm(x, gram, x, beta=A) if wide else torch.baddbmm(x, x, gram, beta=A)
    return x
