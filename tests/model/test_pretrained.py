"""A model saved to a directory comes back the same, with its memory; what does not fit is refused by name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers.processes import Processes
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from memtrans import KNNMemoryList, MemorizingTransformer, generate

OPTIONS = {
    "num_tokens": 20,
    "dim": 16,
    "depth": 3,
    "dim_head": 8,
    "heads": 4,
    "kv_heads": 2,
    "memorizing_layers": (2, 3),
    "max_knn_memories": 30,
    "xl_max_memories": 5,
    "xl_memory_layers": [3],
    "memory_offset": -1.0,
}
TOKENS = torch.arange(20)[None]


def build(**options) -> MemorizingTransformer:
    torch.manual_seed(0)
    return MemorizingTransformer(**{**OPTIONS, **options})


@torch.no_grad()
def logits_of(model: MemorizingTransformer) -> torch.Tensor:
    return model(TOKENS, model.create_knn_memories(batch_size=1))[0]


def test_a_model_comes_back_with_its_arguments_and_weights(tmp_path):
    model = build()
    model.save_pretrained(tmp_path / "a" / "model")
    loaded = MemorizingTransformer.from_pretrained(tmp_path / "a" / "model")
    assert loaded.config == model.config
    assert torch.equal(logits_of(loaded), logits_of(model))
    assert not loaded.training
    files = {path.name for path in (tmp_path / "a" / "model").iterdir()}
    assert files == {
        "README.md",
        "config.json",
        "model.safetensors",
    }


NOT_CAUSAL = {"causal": False, "xl_max_memories": 0}


@pytest.mark.parametrize("options", [{}, {"num_tokens": None}, {"clear_memories_on_sos_token_id": 7}, NOT_CAUSAL])
@pytest.mark.parametrize("documents", [None, 1, 3])
def test_22_9_the_model_card_says_what_it_is_and_its_code_runs(options, documents, tmp_path, monkeypatch):
    model = build(**options)
    memories = None if documents is None else model.create_knn_memories(batch_size=documents, device="cpu")
    model.save_pretrained(tmp_path, memories)
    card = (tmp_path / "README.md").read_text()
    assert "\n| kv_heads | 2 |\n" in card and "layers 2, 3 of 3" in card
    assert card.startswith("---\nlibrary_name: memtrans")
    monkeypatch.chdir(tmp_path)
    (snippet,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    exec(snippet, {})


def test_views_of_memories_are_refused_before_anything_is_written(tmp_path):
    model = build()
    with pytest.raises(TypeError, match="must be called on the memory itself, got a view"):
        model.save_pretrained(tmp_path, model.create_knn_memories(batch_size=1, device="cpu").expand(2))
    assert not list(tmp_path.iterdir())


def test_the_first_device_is_no_word_for_none(tmp_path, monkeypatch):
    asked = []
    build().save_pretrained(tmp_path)
    monkeypatch.setattr(MemorizingTransformer, "to", lambda model, device: asked.append(device) or model)
    MemorizingTransformer.from_pretrained(tmp_path, device=0)
    MemorizingTransformer.from_pretrained(tmp_path)
    assert asked == [0, "cpu"]


def test_22_9_a_card_that_someone_wrote_stays(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    build().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_the_config_is_readable_and_names_the_constructors_arguments(tmp_path):
    with pytest.warns(DeprecationWarning, match="knn_memories_directory"):
        build(knn_memories_directory=tmp_path).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "memorizing-transformer"
    assert (config["memorizing_layers"], config["kv_heads"], config["memory_offset"]) == ([2, 3], 2, -1.0)
    assert "knn_memories_directory" not in config


def test_layers_may_have_been_given_in_any_form(tmp_path):
    build(memorizing_layers=iter((3, 2)), xl_memory_layers=range(1, 3)).save_pretrained(tmp_path)
    loaded = MemorizingTransformer.from_pretrained(tmp_path)
    assert (loaded.memorizing_layers, loaded.xl_memory_layers) == ((2, 3), (1, 2))


def test_weights_keep_their_dtype_and_their_gradients(tmp_path):
    build().bfloat16().save_pretrained(tmp_path)
    loaded = MemorizingTransformer.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_arguments_may_be_overridden_where_the_weights_still_fit(tmp_path):
    build().save_pretrained(tmp_path)
    larger = MemorizingTransformer.from_pretrained(tmp_path, max_knn_memories=500, num_retrieved_memories=8)
    assert larger.create_knn_memories(batch_size=1)[0].max_memories == 500


def test_a_memory_that_was_filled_once_is_reloaded_and_queried(tmp_path):
    model = build()
    memories = model.create_knn_memories(batch_size=1)
    generate(model, list(range(20)) * 3, 1, segment=8, memories=memories)
    model.save_pretrained(tmp_path, memories)
    expected = generate(model, [3, 4], 10, segment=8, memories=memories, seed=1)

    loaded = MemorizingTransformer.from_pretrained(tmp_path)
    again = loaded.load_memories(tmp_path)
    assert [memory.lengths.tolist() for memory in again] == [[30], [30]]
    assert torch.equal(generate(loaded, [3, 4], 10, segment=8, memories=again, seed=1), expected)
    assert not torch.equal(generate(loaded, [3, 4], 10, segment=8, seed=1), expected), "without it it says other things"
    assert loaded.load_memories(tmp_path / "memories.safetensors", max_memories=90)[0].max_memories == 90


def test_a_smaller_memory_keeps_the_newest_and_a_larger_one_all(tmp_path):
    model = build()
    memories = model.create_knn_memories(batch_size=2)
    for _ in range(3):
        model(TOKENS.expand(2, -1), memories)
    memories.save(tmp_path / "memories")
    state = memories.state_dict()
    for size, kept in ((10, 10), (30, 30), (80, 30)):
        loaded = KNNMemoryList.load(tmp_path / "memories", max_memories=size)
        assert loaded[1].lengths.tolist() == [kept, kept]
        for name in ("keys", "values"):
            assert torch.equal(loaded.state_dict()[f"1.{name}"], state[f"1.{name}"][:, -kept:])


NUMPY = {
    "num_tokens": np.int64(20),
    "kv_heads": np.int32(2),
    "memorizing_layers": np.array([2, 3]),
    "memory_offset": np.float32(-1.0),
    "clear_memories_on_eos_token_id": np.int64(3),
    "legacy": np.bool_(True),
}


def test_numbers_may_be_those_of_numpy(tmp_path):
    model = build(**NUMPY)
    model.save_pretrained(tmp_path, model.create_knn_memories(batch_size=1, device="cpu"))
    loaded = MemorizingTransformer.from_pretrained(tmp_path)
    assert torch.equal(logits_of(loaded), logits_of(model))
    assert loaded.config == build(**{**OPTIONS, "legacy": True, "clear_memories_on_eos_token_id": 3}).config


@pytest.mark.parametrize("factor", [np.float32(0.7), torch.tensor(0.7)])
def test_a_width_is_that_of_the_factor_that_is_saved(tmp_path, factor):
    """In float32 10 * 0.7 is 7, and what is saved of it times 10 is less."""
    model = build(dim=10, ff_mult=factor)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(MemorizingTransformer.from_pretrained(tmp_path)), logits_of(model))


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_of_a_model_that_fully_shard_has_spread_the_whole_is_saved_and_generates(tmp_path):
    model, expected = build(), build()
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(ValueError, match=r"model must have all of its weights on this rank, .*: call its save_"):
        generate(model, [3, 4], 5)
    assert not list(tmp_path.iterdir())
    model.save_pretrained(tmp_path)
    loaded = MemorizingTransformer.from_pretrained(tmp_path)
    assert torch.equal(generate(loaded, [3, 4], 5), generate(expected, [3, 4], 5))


@pytest.fixture(scope="module")
def two() -> Iterator[Processes]:
    processes = Processes(2)
    yield processes
    processes.close()


def save_spread(rank: int, directory: str, refused: str) -> str:
    """Whether what the ranks saved is the whole model; and what each says when the first one cannot write."""
    model, expected = build(), build()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    model.save_pretrained(directory)
    loaded = MemorizingTransformer.from_pretrained(directory)
    for name, weight in expected.state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name])
    try:
        model.save_pretrained(refused)
    except OSError as error:
        return str(error)
    return "saved"


def test_the_first_of_several_ranks_writes_and_none_goes_on_before(two: Processes, tmp_path):
    (tmp_path / "file").touch()
    first, second = two.run(save_spread, str(tmp_path / "model"), str(tmp_path / "file"))
    assert "File exists" in first and "(on rank 0)" in first
    assert first == second


# ---------------------------------------------------------------------------------------------------------- bad input


def test_an_argument_that_json_does_not_hold_is_refused_before_anything_is_written(tmp_path):
    model = build()
    model.config["memory_offset"] = torch.float32
    with pytest.raises(TypeError, match="not JSON serializable"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_directory_without_a_model_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"directory must hold config.json, got '.*nothing', which does not"):
        MemorizingTransformer.from_pretrained(tmp_path / "nothing")
    build().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"directory must hold model.safetensors"):
        MemorizingTransformer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: "no json", "config.json must be JSON"),
        (lambda config: "[]", "must be of model_type 'memorizing-transformer'"),
        (lambda config: json.dumps({**config, "model_type": "bert"}), "must be of model_type"),
        (lambda config: json.dumps({**config, "colour": 3}), "must hold arguments of MemorizingTransformer.*colour"),
        (lambda config: json.dumps({**config, "dim": 24}), "must hold weights of the model in config.json.*size mism"),
        (lambda config: json.dumps({**config, "depth": 4}), "must hold weights of the model in config.json.*Missing"),
        (
            lambda config: json.dumps({**config, "memorizing_layers": []}),
            "must hold weights of the model in config.json",
        ),
    ],
)
def test_a_config_that_is_damaged_or_of_another_model_is_refused(tmp_path, change, message):
    build().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(change(json.loads(path.read_text())))
    with pytest.raises(ValueError, match=message):
        MemorizingTransformer.from_pretrained(tmp_path)


def test_damaged_weights_are_refused(tmp_path):
    build().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match="must be a whole safetensors file"):
        MemorizingTransformer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"dim_head": 4}, "must hold memories of dim=8 and kv_heads=2, got dim=4 and kv_heads=2"),
        ({"kv_heads": 4}, "must hold memories of dim=8 and kv_heads=2, got dim=8 and kv_heads=4"),
        ({"memorizing_layers": (2,)}, r"must hold one memory for each of the layers \(2, 3\), got 1"),
    ],
)
def test_memories_of_another_model_are_refused(tmp_path, other, message):
    foreign = build(**other).create_knn_memories(batch_size=1, device="cpu")
    foreign.save(tmp_path / "memories.safetensors")
    with pytest.raises(ValueError, match=message):
        build().load_memories(tmp_path)
    with pytest.raises(ValueError, match=message):
        build().save_pretrained(tmp_path / "model", foreign)
    assert not (tmp_path / "model").exists()


def test_no_memories_and_a_file_of_something_else_are_refused(tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"memories.safetensors', which does not exist"):
        model.load_memories(tmp_path)
    with pytest.raises(ValueError, match=r"written as memtrans.KNNMemoryList, got .* of None"):
        model.load_memories(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="must hold memories of one configuration to be saved"):
        KNNMemoryList().save(tmp_path / "none")


def grown(model):
    size = model.num_tokens + 5
    token_emb, to_logits = torch.nn.Embedding(size, model.dim), torch.nn.Linear(model.dim, size)
    model.token_emb, model.to_logits[1], model.num_tokens = token_emb, to_logits, size


def tied(model):
    model.to_logits[1].weight = model.token_emb.weight


def shared(model):
    model.layers[0][1] = model.layers[1][1]


def compiled(model):
    model.layers[0][1] = torch.compile(model.layers[0][1], backend="eager")


@pytest.mark.parametrize("change", [grown, tied, shared, compiled])
def test_21_15_a_changed_model_is_saved_so_that_it_loads(tmp_path, change):
    model = build().eval()
    change(model)
    model.save_pretrained(tmp_path)
    loaded = MemorizingTransformer.from_pretrained(tmp_path)
    assert loaded.num_tokens == model.num_tokens
    assert torch.equal(logits_of(loaded), logits_of(model))


def half_grown(model):
    model.token_emb = torch.nn.Embedding(model.num_tokens + 5, model.dim)


def adapted(model):
    """As an adapter that is not merged wraps a layer."""
    attention = model.layers[0][0].fn
    attention.to_q = torch.nn.Sequential(attention.to_q, torch.nn.Identity())


def parametrised(model):
    torch.nn.utils.parametrizations.weight_norm(model.to_logits[1])


def with_a_buffer(model):
    model.register_buffer("mean", torch.zeros(3))


@pytest.mark.parametrize(
    ("change", "named"),
    [(half_grown, "token_emb.weight"), (adapted, "to_q"), (parametrised, "parametrizations"), (with_a_buffer, "mean")],
)
def test_21_15_a_changed_model_that_would_not_load_is_refused_before_anything_is_written(tmp_path, change, named):
    model = build()
    change(model)
    with pytest.raises(ValueError, match=f"a model must have the weights of its arguments .* got others: .*{named}"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
