"""The files of a saved memory: one of what it learned, with its settings, and one of what it holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from memtrans.hf.entries import Entries, read_entries
from memtrans.hf.layer_memory import states_of
from memtrans.hf.probe import Layer, learned_of
from memtrans.hf.settings import MemorySettings
from memtrans.storage import load_tensors, save_tensors

WEIGHTS, ENTRIES = "memtrans.safetensors", "memories.safetensors"
KIND = "memtrans.hf.ModelMemory"


class Saved(NamedTuple):
    """What the files of a memory say.

    Attributes:
        learned: by layer, the state of its `LayerMemory`. entries: None where nothing was held.
    """

    learned: dict[int, dict[str, Tensor]]
    entries: Entries | None


def write_memory(place: Path, layers: Mapping[int, Layer], settings: MemorySettings, entries: Entries | None) -> None:
    """Writes what layers learned, and entries, into a directory that is made if missing, each file at once and whole.

    Without entries their file is not there afterwards: `read_memory` would take an earlier one for this save's.
    """
    place.mkdir(parents=True, exist_ok=True)
    learned = {
        f"{number}.{name}": tensor
        for number, layer in learned_of(layers).items()
        for name, tensor in layer.state_dict().items()
    }
    configuration = {**settings.to_json(), "layers": list(layers)}
    save_tensors(place / WEIGHTS, learned, KIND, configuration)
    if entries is None:
        (place / ENTRIES).unlink(missing_ok=True)
    else:
        entries.save(place / ENTRIES)


def read_memory(place: Path, layers: Mapping[int, Layer], settings: MemorySettings) -> Saved:
    """What `write_memory` wrote of the same layers; they are not touched.

    Raises FileNotFoundError, or ValueError for a file that is damaged or of other layers.
    """
    learned, configuration = load_tensors(place / WEIGHTS, KIND)
    numbers, of_file = list(layers), configuration.get("layers")
    if of_file != numbers:
        raise ValueError(f"directory must hold a memory of layers {numbers}, got {of_file}")
    states = states_of(learned, learned_of(layers))
    if not (place / ENTRIES).exists():
        return Saved(states, None)
    state, documents = read_entries(place / ENTRIES)
    entries = Entries(layers, settings, documents)
    entries.load(state)
    return Saved(states, entries)


def saved_arguments(place: Path) -> dict[str, Any]:
    """The arguments of `add_memory` for the memory that `write_memory` wrote. Raises as `read_memory` does."""
    _, configuration = load_tensors(place / WEIGHTS, KIND)
    return MemorySettings.from_json(configuration)
