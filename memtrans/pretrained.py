"""A model in a directory, in the form that people expect: `config.json` and `model.safetensors`.

`config.json` holds the arguments of the constructor, `memories.safetensors`, where there is one, what a memory held.
Nothing in the directory executes when read.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import nn

from memtrans.annotations import allows, described
from memtrans.distributed.dtensors import gathered, holders_of
from memtrans.files import MOST_JSON, parse_json, parse_tensors, read_file
from memtrans.layers import device_of
from memtrans.memory.checks import widths_named
from memtrans.memory.knn_memory import KNNMemory
from memtrans.memory.memory_list import KNNMemoryList
from memtrans.model_card import model_card
from memtrans.shapes import shapes_alone
from memtrans.storage import write_atomically

CONFIG, WEIGHTS, MEMORIES, CARD = "config.json", "model.safetensors", "memories.safetensors", "README.md"
MODEL_TYPE = "memorizing-transformer"

ModelType = TypeVar("ModelType", bound="Pretrained")


def configuration_of(arguments: Mapping[str, Any], without: Sequence[str] = ()) -> dict[str, Any]:
    """The `locals()` with which a constructor begins; `without` names the arguments that mean nothing.

    A number that is an array, as NumPy's are, becomes one of Python, which JSON holds.
    """
    left_out = {"self", "__class__", *without}
    return {
        name: value.item() if getattr(value, "ndim", None) == 0 else value
        for name, value in arguments.items()
        if name not in left_out
    }


class Pretrained(nn.Module):
    """Saving to a directory and loading from it, for models whose constructor sets `config`.

    Attributes:
        config: the constructor's arguments, as JSON holds them.
    """

    config: dict[str, Any]
    memorizing_layers: tuple[int, ...]
    kv_heads: int
    dim_head: int
    value_dim_head: int

    def save_pretrained(self, directory: str | Path, memories: KNNMemoryList | None = None) -> None:
        """Writes config.json, model.safetensors and, if memories are given, memories.safetensors; and a model card.

        directory: made if missing; each file takes the place of an older one at once and whole, but for a README.md
        that is there: someone may have written it.

        Of a model that FSDP2 (`fully_shard`) has spread over ranks every rank has to call it: the weights are gathered,
        and the first rank writes them, and its memories.

        A vocabulary that was grown is saved as it is now; weights that are tied, or of a layer in two places, are saved
        for each place.

        Raises OSError when the disk is full, or the like; ValueError, before anything is written, when the memories are
        not this model's, or `from_pretrained` could not load it: a PEFT that is not merged, a parametrised weight, a
        parameter or buffer of one's own; TypeError, then too, when the memories are a view that `expand` made.

        >>> import tempfile
        >>> from memtrans import MemorizingTransformer
        >>> model = MemorizingTransformer(num_tokens=9, dim=16, depth=2, dim_head=8, heads=2, memorizing_layers=2)
        >>> memories = model.create_knn_memories(batch_size=1)
        >>> logits = model(torch.arange(9)[None], memories)
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     model.save_pretrained(directory, memories)
        ...     again = MemorizingTransformer.from_pretrained(directory)
        ...     filled = again.load_memories(directory)
        >>> filled[0].lengths.tolist()
        [9]
        """
        if memories is not None:
            self._check_memories(memories, "memories")
        state = {
            name.replace("_orig_mod.", ""): tensor for name, tensor in self.state_dict().items()
        }  # compiled blocks
        arguments = {**self.config, **_vocabulary_of(state)}
        config = {"model_type": MODEL_TYPE, "architectures": [type(self).__name__], **arguments}
        described = (json.dumps(config, indent=2) + "\n").encode()  # fails, if it does, before anything is written
        _check_loads(type(self), arguments, state)
        card = model_card(type(self).__name__, arguments, memories[0].num_indices if memories else None)
        ranks = holders_of(state.values())
        weights = _whole_weights(state, kept=ranks.first)

        def write() -> None:
            place = Path(directory)
            place.mkdir(parents=True, exist_ok=True)
            if memories is not None:
                memories.save(place / MEMORIES)  # first: it refuses a view
            write_atomically(place / WEIGHTS, save(weights, metadata={"format": "pt"}))
            write_atomically(place / CONFIG, described)
            if not (place / CARD).exists():
                write_atomically(place / CARD, card)

        ranks.together(lambda: write() if ranks.first else None)

    def push_to_hub(self, repo_id: str, memories: KNNMemoryList | None = None, **options: Any) -> str:
        """Uploads what `save_pretrained` writes to a repository of huggingface.co, made if missing.

        Args:
            repo_id: `user/name`. memories: uploaded too, if given.
            options: of `huggingface_hub.HfApi.upload_folder`, such as `commit_message`, `revision` or `token`; with
                `private=True` a repository that is made is private.

        Returns:
            The address of the commit.

        Raises ImportError, which names the extra to install, without `huggingface_hub`.
        """
        try:
            from huggingface_hub import HfApi
        except ImportError as error:
            raise ImportError("push_to_hub needs huggingface_hub: pip install 'memtrans[hub]'") from error
        api = HfApi(token=options.pop("token", None))
        with tempfile.TemporaryDirectory() as directory:
            self.save_pretrained(directory, memories)
            api.create_repo(repo_id, private=options.pop("private", None), exist_ok=True)
            return str(api.upload_folder(repo_id=repo_id, folder_path=directory, **options))

    @classmethod
    def from_pretrained(
        cls: type[ModelType], directory: str | Path, *, device: torch.device | str | None = None, **overrides: Any
    ) -> ModelType:
        """A model that `save_pretrained` wrote, in `eval()` mode, its weights in the dtype that they were saved in.

        Args:
            directory: holds config.json and model.safetensors. device: Default: the CPU.
            overrides: arguments of the constructor that differ from config.json, such as a larger `max_knn_memories`.

        Raises:
            FileNotFoundError: a file is missing. ValueError: one is damaged, or of another kind, version or shape.
        """
        directory = Path(directory)
        config = _read_config(directory / CONFIG)
        _check_types(cls, config, directory / CONFIG)
        config |= overrides
        weights = _read_weights(directory / WEIGHTS)
        if isinstance(config.get("depth"), int) and config["depth"] > len(weights):
            raise ValueError(
                f"{WEIGHTS} must hold weights of the model in {CONFIG}, got {len(weights)} for {config['depth']} layers"
            )
        try:
            with shapes_alone():
                model = cls(**config)
        except (TypeError, RuntimeError) as error:
            raise ValueError(f"{CONFIG} must hold arguments of {cls.__name__}, got others: {error}") from error
        try:
            model.load_state_dict(weights, assign=True)
        except RuntimeError as error:
            detail = " ".join(str(error).split())
            raise ValueError(f"{WEIGHTS} must hold weights of the model in {CONFIG}, got others: {detail}") from error
        return model.to("cpu" if device is None else device).eval()

    def load_memories(
        self, path: str | Path, *, device: torch.device | str | None = None, **overrides: Any
    ) -> KNNMemoryList:
        """Memories that `save_pretrained` or `KNNMemoryList.save` wrote.

        Args:
            path: the file, or the directory that holds memories.safetensors.
            device: Default: the model's. overrides: arguments of `KNNMemory`, such as a larger `max_memories`.

        Raises:
            FileNotFoundError: there is none. ValueError: it is damaged, or of another number of layers, width or heads.
        """
        path = Path(path) / MEMORIES if Path(path).is_dir() else Path(path)
        memories = KNNMemoryList.load(path, device=device_of(self) if device is None else device, **overrides)
        self._check_memories(memories, str(path))
        return memories

    def _check_memories(self, memories: Sequence[KNNMemory], name: str) -> None:
        """Refuses memories of another number of layers, width or number of heads."""
        if len(memories) != len(self.memorizing_layers):
            raise ValueError(
                f"{name} must hold one memory for each of the layers {self.memorizing_layers}, got {len(memories)}"
            )
        for memory in memories:
            widths = self.dim_head, self.value_dim_head
            if (memory.dim, memory.value_dim, memory.kv_heads) != (*widths, self.kv_heads):
                raise ValueError(
                    f"{name} must hold memories of {widths_named(*widths)} and kv_heads={self.kv_heads}, "
                    f"got {widths_named(memory.dim, memory.value_dim)} and kv_heads={memory.kv_heads}"
                )


def _whole_weights(state: Mapping[str, torch.Tensor], kept: bool) -> dict[str, torch.Tensor]:
    """A model's weights on the CPU; kept: False takes part in gathering them, one at a time, and keeps none."""
    weights: dict[str, torch.Tensor] = {}
    places: set[int] = set()
    for name, tensor in state.items():
        weight = gathered(tensor.detach())
        if kept:
            whole = weight.cpu().contiguous()
            place = whole.untyped_storage().data_ptr()
            weights[name] = whole.clone() if place in places else whole  # the file has no two names for one tensor
            places.add(place)
    return weights


def _vocabulary_of(state: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """The number of tokens that embedding and logits have now, where both have the same."""
    found = {len(state[name]) for name in ("token_emb.weight", "to_logits.1.weight") if name in state}
    return {"num_tokens": found.pop()} if len(found) == 1 else {}


def _check_loads(kind: type[Pretrained], arguments: Mapping[str, Any], state: Mapping[str, torch.Tensor]) -> None:
    """Raises ValueError unless a model made of these arguments takes the weights up."""
    try:
        with shapes_alone():
            expected = kind(**arguments).state_dict()
    except TypeError as error:
        raise ValueError(f"config must hold arguments of {kind.__name__}, got others: {error}") from error
    elsewhere = [name for name, weight in state.items() if isinstance(weight, torch.Tensor) and weight.is_meta]
    if elsewhere:
        raise ValueError(
            f"a model must hold its weights to be saved, got {', '.join(elsewhere[:3])} and others offloaded: remove "
            "the hooks (accelerate.hooks.remove_hook_from_module)"
        )
    wrong = sorted(set(expected) ^ set(state))
    wrong += [
        f"{name} of shape {tuple(state[name].shape)}"
        for name, weight in expected.items()
        if name in state and (state[name].shape != weight.shape or not state[name].is_floating_point())
    ]
    if wrong:
        raise ValueError(
            f"a model must have the weights of its arguments to be saved so that it loads, got others: "
            f"{', '.join(wrong[:6])}: merge adapters, remove parametrisations, or save its state_dict yourself"
        )


def _check_types(kind: type[Pretrained], config: Mapping[str, Any], path: Path) -> None:
    """Raises ValueError for an argument of another type than the constructor's: a string would count as true."""
    hints = get_type_hints(kind.__init__)
    for name, value in config.items():
        if name in hints and not allows(hints[name], value):
            raise ValueError(f"{name} must be of type {described(hints[name])}, got {value!r} in {str(path)!r}")


def _read_config(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(f"directory must hold {CONFIG}, got {str(path.parent)!r}, which does not")
    content = read_file(CONFIG, path, MOST_JSON)
    try:
        config = parse_json(content)
    except ValueError as error:
        raise ValueError(f"{CONFIG} must be JSON, got {str(path)!r}: {error}") from error
    if not isinstance(config, dict) or config.pop("model_type", None) != MODEL_TYPE:
        raise ValueError(f"{CONFIG} must be of model_type {MODEL_TYPE!r}, got {str(path)!r} of another")
    config.pop("architectures", None)
    return config


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    if not path.exists():
        raise FileNotFoundError(f"directory must hold {WEIGHTS}, got {str(path.parent)!r}, which does not")
    try:
        return parse_tensors(read_file(WEIGHTS, path))
    except SafetensorError as error:
        raise ValueError(f"{WEIGHTS} must be a whole safetensors file, got {str(path)!r}: {error}") from error
