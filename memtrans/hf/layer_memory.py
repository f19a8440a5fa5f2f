"""What a memorizing attention module of a pretrained model learns: how its heads ask the memory, and what it says.

Shapes: the letters of `memtrans_kernels`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

FROM = 1024  # entries up to which an untrained memory needs no offset
TRUSTING = ("memory_offset", "memory_slope")
ASKING = ("memory_sharpness", "memory_gain", "memory_mix", "memory_across")
SAYING = ("memory_value", "memory_next")
OF_HEADS = (*TRUSTING, "memory_sharpness")  # a number a head each
FORMS: dict[str, tuple[str, ...]] = {  # what is learned beside the offsets
    "offset": (),
    "gain": ASKING[:2],
    "mix": ASKING[:3],
    "across": ASKING,
    "value": (*ASKING[:3], "memory_value"),
    "next": (*ASKING[:3], *SAYING),
}


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


def spoken(values: Tensor, saying: Tensor) -> Tensor:
    """What values (B, H, N, E), or (B, H, N, 2E) with those of the tokens behind them, say: (B, H, N, E).

    saying: (G, E or 2E, E); each of the G serves H/G heads.

    >>> spoken(torch.tensor([[[[1.0, 5.0]]]]), torch.tensor([[[0.0], [2.0]]])).tolist()   # 1 + 0 · 1 + 2 · 5
    [[[[11.0]]]]
    """
    groups, _, width = saying.shape
    of_groups = values.unflatten(1, (groups, -1)).flatten(2, 3)  # (B, G, H/G · N, E or 2E)
    more = of_groups @ saying.to(values.dtype)
    return (of_groups[..., :width] + more).reshape(*values.shape[:3], width)


class LayerMemory(nn.Module):
    """What a head adds to the logits of retrieved keys (or, with a gate, to the gate's), the query it asks with, and
    what it is told.

    With n entries in the memory and beyond = log(max(1, n / 1024)), the offset is

        memory_offset[h] + memory_slope[h] · beyond

    and, once `learn_to_ask` was called, which a calibration does, the memory is asked with

        q + q · memory_mix[h],  q = query · exp(memory_gain[h] + memory_sharpness[h] · beyond)

    instead of the query (form "mix"; with "gain" it is q): among more entries more are near a query by chance, and
    other components of it tell them apart than among a segment's. With "across" the queries q of all heads, side by
    side, times memory_across are added: a head may ask for what only another one's query knows.

    With "value" and "next", which are "mix" and more, a token's value v is stored as

        v + v · memory_value[g] + v' · memory_next[g]

    where v' is the value of the token behind it, 0 for the last of a segment; with "value" without v'. Whoever finds a
    word finds then what followed it. It is linear in what is retrieved, so a calibration, which alone learns these two,
    stores values as they are and does it behind attention.

    Attributes:
        memory_offset, memory_slope: (H,) float32.
        memory_sharpness: (H,), memory_gain: (H, D), memory_mix: (H, D, D), memory_across: (H·D, H·D), memory_value and
            memory_next: (G, E, E), float32; None before `learn_to_ask`, and where the form has none.

    >>> layer = LayerMemory(2, 8, "auto", torch.device("cpu"))
    >>> layer.learn_to_ask("value")
    >>> [name for name, _ in layer.named_parameters()][2:]
    ['memory_sharpness', 'memory_gain', 'memory_mix', 'memory_value']
    """

    memory_sharpness: nn.Parameter | None
    memory_gain: nn.Parameter | None
    memory_mix: nn.Parameter | None
    memory_across: nn.Parameter | None
    memory_value: nn.Parameter | None
    memory_next: nn.Parameter | None
    kv_heads: int | None
    value_width: int | None

    @torch.inference_mode(False)  # else what is made there has no gradient later
    def __init__(
        self,
        heads: int,
        width: int,
        offset: float | str,
        device: torch.device,
        kv_heads: int | None = None,
        value_width: int | None = None,
    ) -> None:
        """heads: H. width: D. kv_heads: G. Default: H. value_width: E. Default: D."""
        super().__init__()
        start, slope = (0.0, -1.0) if isinstance(offset, str) else (offset, 0.0)
        self.width, self.kv_heads, self.value_width = width, kv_heads or heads, value_width or width
        self.memory_offset = nn.Parameter(torch.full((heads,), start, device=device, dtype=torch.float32))
        self.memory_slope = nn.Parameter(torch.full((heads,), slope, device=device, dtype=torch.float32))
        for name in (*ASKING, *SAYING):
            self.register_parameter(name, None)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a model that an earlier version saved whole, too; `Layer.learned` tells it the sizes of values."""
        super().__setstate__({"kv_heads": None, "value_width": None, **state})
        for name in SAYING:
            self._parameters.setdefault(name, None)

    @property
    def itself(self) -> LayerMemory:
        """This one; asked of a wrapper that hands attributes on (PEFT's, for `modules_to_save`), its active copy."""
        return self

    def learn_to_ask(self, form: str = "mix") -> None:
        """Gives it the parameters of a form; they change nothing yet.

        form: "offset" for none, "gain" for a factor of each component of the query, "mix" for a matrix too, "across"
            for one of all heads together besides, "value" for "mix" and a matrix on what is stored, "next" for another
            on what followed it besides; what it has already stays.
        """
        self._learn(FORMS[form])

    @torch.inference_mode(False)
    def _learn(self, names: Iterable[str]) -> None:
        shapes = self._shapes()
        for name in names:
            if getattr(self, name) is None:
                # what is stored has no gradient: a trainer would wait for one in vain, so `calibrate` asks for it
                wanted = name not in SAYING
                setattr(self, name, nn.Parameter(self.memory_offset.new_zeros(shapes[name]), requires_grad=wanted))

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Of each parameter that a form may have."""
        heads, width = len(self.memory_offset), self.width
        of_asking = ((heads,), (heads, width), (heads, width, width), (heads * width, heads * width))
        assert self.kv_heads is not None and self.value_width is not None
        of_saying = dict.fromkeys(SAYING, (self.kv_heads, self.value_width, self.value_width))
        return {**dict.fromkeys(TRUSTING, (heads,)), **dict(zip(ASKING, of_asking, strict=True)), **of_saying}

    @property
    def parts(self) -> int:
        """Of how many values each that is stored is made: its own, and with "next" that of the token behind it."""
        return 1 if self.memory_next is None else 2

    def saying(self) -> Tensor | None:
        """What makes of values what is stored, for `spoken`; None for values as they are."""
        return saying_of({0: self})[0]

    def forward(self, entries: Tensor) -> Asking:
        """How a memory of entries () int64 is asked.

        >>> layer = LayerMemory(2, 8, "auto", torch.device("cpu"))
        >>> layer(torch.tensor(1000)).offset.tolist(), layer(torch.tensor(2048)).offset.neg().exp().tolist()
        ([0.0, 0.0], [2.0, 2.0])
        """
        return asking_of({0: self}, entries)[0]

    def check_state(self, state: Mapping[str, Tensor]) -> None:
        """Raises ValueError, with the name of what is wrong, unless `take` can take the state up."""
        shapes = self._shapes()
        known = {name for names in FORMS.values() if {*names} <= {*state} for name in names}  # forms may be together
        if set(state) != {*TRUSTING, *known}:
            raise ValueError(
                f"state must hold {' and '.join(TRUSTING)}, and beside them all that one of the forms "
                f"{', '.join(FORMS)} has, got {', '.join(sorted(state))}"
            )
        for name, tensor in state.items():
            if tuple(tensor.shape) != shapes[name] or not tensor.is_floating_point():
                raise ValueError(
                    f"{name} must hold floating-point numbers of shape {shapes[name]}, got {tensor.dtype} of shape "
                    f"{tuple(tensor.shape)}"
                )

    def take(self, state: Mapping[str, Tensor]) -> None:
        """Takes up what another one learned, in its form: what that one does not have is gone. See `check_state`."""
        for name in (*ASKING, *SAYING):
            if name not in state:
                setattr(self, name, None)
        self._learn(name for name in state if name not in TRUSTING)
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
    found: dict[int, Asking] = {}
    for numbers in _alike(layers):
        some = [layers[number] for number in numbers]
        offset, slope, *sharpness = _of_heads(some)
        beyond = (entries.to(offset.device).float() / FROM).clamp(min=1.0).log()
        offsets = torch.addcmul(offset, slope, beyond)
        if shut is not None:
            offsets.masked_fill_(shut.to(offset.device), -torch.inf)
        factors = _factors(some, sharpness[0], beyond, dtype) if sharpness else [None] * len(some)
        found.update(zip(numbers, map(Asking, offsets.unbind(), factors), strict=True))
    return {number: found[number] for number in layers}


def saying_of(layers: Mapping[int, LayerMemory], dtype: torch.dtype = torch.float32) -> dict[int, Tensor | None]:
    """What makes of the values of each layer what is stored (G, E or 2E, E); layers of one shape in a few kernels."""
    found: dict[int, Tensor | None] = dict.fromkeys(layers)
    for numbers in _alike(layers):
        some = [layers[number] for number in numbers]
        if some[0].memory_value is not None:
            parts = [_together(some, name) for name in SAYING if getattr(some[0], name) is not None]
            found.update(zip(numbers, torch.cat(parts, 2).to(dtype).unbind(), strict=True))
    return found


def _alike(layers: Mapping[int, LayerMemory]) -> list[list[int]]:
    """The numbers of layers that have parameters of the same shapes on the same device, together."""
    alike: dict[Any, list[int]] = {}
    for number, layer in layers.items():
        kinds = tuple((name, tensor.shape, tensor.device) for name, tensor in layer.named_parameters())
        alike.setdefault(kinds, []).append(number)
    return list(alike.values())


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
