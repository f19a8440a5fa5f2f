"""What a memorizing attention module of a pretrained model learns: how its heads ask the memory, and trust it.

Shapes: the letters of `memtrans_kernels`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

FROM = 1024  # entries up to which an untrained memory needs no offset
TRUSTING = ("memory_offset", "memory_slope")
ASKING = ("memory_sharpness", "memory_gain", "memory_mix", "memory_across")
OF_HEADS = (*TRUSTING, "memory_sharpness")  # a number a head each
FORMS = {"offset": 0, "gain": 2, "mix": 3, "across": 4}  # how many of these are learned beside the offsets


class Asking(NamedTuple):
    """How a memory of a given size is asked.

    Attributes:
        offset: (H,), added to the logits of what is found. factor: what a query is multiplied by: (H, 1, D), or
            (H, D, D), a matrix product, or (H·D, H·D), one with the queries of all heads; None for the query as it is.
    """

    offset: Tensor
    factor: Tensor | None

    def asked(self, query: Tensor) -> Tensor:
        """What query (B, H, N, D) asks the memory with: (B, H, N, D)."""
        if self.factor is None:
            return query
        factor = self.factor.to(query.dtype)
        if factor.dim() == 2:
            heads, width = query.shape[1], query.shape[3]
            together = query.transpose(1, 2).flatten(2) @ factor  # (B, N, H·D)
            return together.unflatten(2, (heads, width)).transpose(1, 2)
        return query * factor if self.factor.shape[1] == 1 else query @ factor


class LayerMemory(nn.Module):
    """What a head adds to the logits of retrieved keys (or, with a gate, to the gate's), and the query it asks with.

    With n entries in the memory and beyond = log(max(1, n / 1024)), the offset is

        memory_offset[h] + memory_slope[h] · beyond

    and, once `learn_to_ask` was called, which a calibration does, the memory is asked with

        q + q · memory_mix[h],  q = query · exp(memory_gain[h] + memory_sharpness[h] · beyond)

    instead of the query (form "mix"; with "gain" it is q): among more entries more are near a query by chance, and
    other components of it tell them apart than among a segment's. With "across" the queries q of all heads, side by
    side, times memory_across are added: a head may ask for what only another one's query knows.

    Attributes:
        memory_offset, memory_slope: (H,) float32.
        memory_sharpness: (H,), memory_gain: (H, D), memory_mix: (H, D, D), memory_across: (H·D, H·D), float32; None
            before `learn_to_ask`, and where the form has none.
    """

    memory_sharpness: nn.Parameter | None
    memory_gain: nn.Parameter | None
    memory_mix: nn.Parameter | None
    memory_across: nn.Parameter | None

    @torch.inference_mode(False)  # else what is made there has no gradient later
    def __init__(self, heads: int, width: int, offset: float | str, device: torch.device) -> None:
        super().__init__()
        start, slope = (0.0, -1.0) if isinstance(offset, str) else (offset, 0.0)
        self.width = width
        self.memory_offset = nn.Parameter(torch.full((heads,), start, device=device, dtype=torch.float32))
        self.memory_slope = nn.Parameter(torch.full((heads,), slope, device=device, dtype=torch.float32))
        for name in ASKING:
            self.register_parameter(name, None)

    @property
    def itself(self) -> LayerMemory:
        """This one; asked of a wrapper that hands attributes on (PEFT's, for `modules_to_save`), its active copy."""
        return self

    @torch.inference_mode(False)
    def learn_to_ask(self, form: str = "mix") -> None:
        """Gives it the parameters that make the query another one; they change nothing yet.

        form: "offset" for none of them, "gain" for a factor of each component, "mix" for a matrix too, "across" for
            one of all heads together besides; what it has already stays.
        """
        shapes = self._shapes()
        for name in ASKING[: FORMS[form]]:
            if getattr(self, name) is None:
                setattr(self, name, nn.Parameter(self.memory_offset.new_zeros(shapes[name])))

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Of each parameter that a form may have."""
        heads, width = len(self.memory_offset), self.width
        of_asking = ((heads,), (heads, width), (heads, width, width), (heads * width, heads * width))
        return {**dict.fromkeys(TRUSTING, (heads,)), **dict(zip(ASKING, of_asking, strict=True))}

    def forward(self, entries: Tensor) -> Asking:
        """How a memory of entries () int64 is asked.

        >>> layer = LayerMemory(2, 8, "auto", torch.device("cpu"))
        >>> layer(torch.tensor(1000)).offset.tolist(), layer(torch.tensor(2048)).offset.neg().exp().tolist()
        ([0.0, 0.0], [2.0, 2.0])
        """
        return asking_of({0: self}, entries)[0]

    def check_state(self, state: Mapping[str, Tensor]) -> None:
        """Raises ValueError, with the name of what is wrong, unless `take` can take the state up."""
        learned, shapes = sum(name in state for name in ASKING), self._shapes()
        if learned not in FORMS.values() or set(state) != {*TRUSTING, *ASKING[:learned]}:
            raise ValueError(
                f"state must hold {' and '.join(TRUSTING)}, and of {', '.join(ASKING)} none, the first two, three or "
                f"all, got {', '.join(sorted(state))}"
            )
        for name, tensor in state.items():
            if tuple(tensor.shape) != shapes[name] or not tensor.is_floating_point():
                raise ValueError(
                    f"{name} must hold floating-point numbers of shape {shapes[name]}, got {tensor.dtype} of shape "
                    f"{tuple(tensor.shape)}"
                )

    def take(self, state: Mapping[str, Tensor]) -> None:
        """Takes up what another one learned, in its form: what that one does not have is gone. See `check_state`."""
        for name in ASKING:
            if name not in state:
                setattr(self, name, None)
        learned = sum(name in state for name in ASKING)
        self.learn_to_ask(next(form for form, count in FORMS.items() if count == learned))
        self.load_state_dict(dict(state))


def states_of(learned: Mapping[str, Tensor], layers: Mapping[int, LayerMemory]) -> dict[int, dict[str, Tensor]]:
    """What each layer's memory learned, of tensors by the layer's number and their name: `3.memory_offset`.

    Raises ValueError for a layer that is none of these, and where one cannot take up what is its.
    """
    states: dict[int, dict[str, Tensor]] = {number: {} for number in layers}
    numbers = {str(number): number for number in layers}
    for name, tensor in learned.items():
        which, _, own = name.partition(".")
        if which not in numbers:
            raise ValueError(f"what was learned must be of layers {list(layers)}, got {name}")
        states[numbers[which]][own] = tensor
    for number, layer in layers.items():
        try:
            layer.check_state(states[number])
        except ValueError as error:
            raise ValueError(f"what layer {number} learned does not fit: {error}") from error
    return states


def asking_of(
    layers: Mapping[int, LayerMemory],
    entries: Tensor,
    dtype: torch.dtype = torch.float32,
    shut: Tensor | None = None,
) -> dict[int, Asking]:
    """How the memory of entries () int64 of each layer is asked; layers of one shape in a few kernels for all.

    dtype: of the factors, that of the queries where they all are of one.
    shut: (1, 1) bool, whether nothing that is found counts: the offset is -inf then.
    """
    alike: dict[Any, list[int]] = {}
    for number, layer in layers.items():
        kinds = tuple((name, tensor.shape, tensor.device) for name, tensor in layer.named_parameters())
        alike.setdefault(kinds, []).append(number)
    found: dict[int, Asking] = {}
    for numbers in alike.values():
        some = [layers[number] for number in numbers]
        offset, slope, *sharpness = _of_heads(some)
        beyond = (entries.to(offset.device).float() / FROM).clamp(min=1.0).log()
        offsets = torch.addcmul(offset, slope, beyond)
        if shut is not None:
            offsets.masked_fill_(shut.to(offset.device), -torch.inf)
        factors = _factors(some, sharpness[0], beyond, dtype) if sharpness else [None] * len(some)
        found.update(zip(numbers, map(Asking, offsets.unbind(), factors), strict=True))
    return {number: found[number] for number in layers}


def _factors(layers: Sequence[LayerMemory], sharpness: Tensor, beyond: Tensor, dtype: torch.dtype) -> Sequence[Tensor]:
    """What layers that ask with another query multiply it by; sharpness: (layers, H). beyond: ()."""
    factor = torch.addcmul(_together(layers, "memory_gain"), sharpness[..., None], beyond).exp()  # (layers, H, D)
    if layers[0].memory_mix is None:
        return factor[..., None, :].to(dtype).unbind()
    if layers[0].memory_across is None:
        matrix = factor[..., None] * _together(layers, "memory_mix")
        matrix.diagonal(dim1=-2, dim2=-1).add_(factor)  # the query itself: three kernels fewer than with a unit matrix
        return matrix.to(dtype).unbind()
    across, (heads, width) = _together(layers, "memory_across"), factor.shape[1:]
    blocks = across.view(len(layers), heads, width, heads, width).diagonal(dim1=1, dim2=3)  # (layers, D, D, H)
    blocks.add_(_together(layers, "memory_mix").permute(0, 2, 3, 1))
    across.diagonal(dim1=-2, dim2=-1).add_(1.0)
    return (factor.flatten(1)[..., None] * across).to(dtype).unbind()


def _of_heads(layers: Sequence[LayerMemory]) -> tuple[Tensor, ...]:
    """Those parameters that they have of OF_HEADS, (layers, H) each, put together in one kernel."""
    names = [name for name in OF_HEADS if getattr(layers[0], name) is not None]
    together = torch.stack([getattr(layer, name) for name in names for layer in layers])
    return together.view(len(names), len(layers), -1).unbind()


def _together(layers: Sequence[LayerMemory], name: str) -> Tensor:
    """A parameter of each of them, (layers, H, ...)."""
    return torch.stack([getattr(layer, name) for layer in layers])
