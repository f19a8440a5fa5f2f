"""`python -m memtrans generate` from the outside: what it prints, and what it does not take."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from memtrans import MemorizingTransformer, generate
from memtrans.cli.generate import open_model
from memtrans.cli.main import main
from memtrans.training.checkpoint import load_checkpoint, save_checkpoint

SMALL = {"num_tokens": 256, "dim": 16, "depth": 2, "dim_head": 8, "heads": 2, "memorizing_layers": 2}


def build(**options) -> MemorizingTransformer:
    torch.manual_seed(0)
    return MemorizingTransformer(**{**SMALL, "max_knn_memories": 50, **options}).eval()


@pytest.fixture
def saved(tmp_path) -> Path:
    build().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A training run of two steps with a segment of 32."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "text").write_bytes(b"some text to learn from, " * 200)
    options = ["--batch", "2", "--segment", "32", "--layers", "2", "--width", "16", "--heads", "2", "--head-width", "8"]
    rest = ["--memory", "64", "--neighbours", "4", "--eval-bytes", "300", "--steps", "2", "--plain"]
    assert main(["train", "--data", str(folder / "text"), "--out", str(folder / "out"), *options, *rest]) == 0
    return folder / "out"


def written(capsys, checkpoint: Path, *options: str) -> str:
    capsys.readouterr()
    assert main(["generate", "--checkpoint", str(checkpoint), "--tokens", "40", *options]) == 0
    text = capsys.readouterr().out
    assert text.endswith("\n")
    return text[:-1]


def as_text(tokens: torch.Tensor) -> str:
    return bytes(tokens[0].tolist()).decode(errors="replace")


def test_it_writes_what_generate_returns(saved, capsys):
    expected = generate(build(), "a prompt", 40, seed=3, top_k=9, top_p=0.9, temperature=0.7)
    options = ["--seed", "3", "--top-k", "9", "--top-p", "0.9", "--temperature", "0.7"]
    assert written(capsys, saved, "--prompt", "a prompt", *options) == as_text(expected)


def test_a_prompt_from_a_file_may_be_any_bytes_of_any_length(saved, tmp_path, capsys):
    content = bytes(range(256)) * 5
    (tmp_path / "prompt").write_bytes(content)
    expected = generate(build(), content, 40, segment=100)
    assert written(capsys, saved, "--prompt-file", str(tmp_path / "prompt"), "--segment", "100") == as_text(expected)


def test_a_prompt_on_the_command_line_may_be_any_bytes_too(saved, capsys):
    content = b"n\xff\xfe"
    assert written(capsys, saved, "--prompt", os.fsdecode(content)) == as_text(generate(build(), content, 40))


def test_no_prompt_stands_for_a_lines_end_or_the_models_start_token(saved, tmp_path, capsys):
    assert written(capsys, saved) == as_text(generate(build(), "\n", 40))
    build(clear_memories_on_sos_token_id=7).save_pretrained(tmp_path / "other")
    assert written(capsys, tmp_path / "other") == as_text(generate(build(), [7], 40))


def test_a_runs_directory_and_its_checkpoint_bring_their_own_segment(run, capsys):
    model, segment, _ = open_model(run)
    assert segment == 32
    prompt = "some text " * 10
    expected = as_text(generate(model, prompt, 40, segment=32, temperature=0))
    for path in (run, run / "checkpoint"):
        assert written(capsys, path, "--prompt", prompt, "--temperature", "0") == expected


def test_a_run_with_a_vocabulary_beyond_bytes_writes_bytes(run, tmp_path, capsys):
    held = load_checkpoint(run / "checkpoint")
    model = dict(held.parts["model"])
    for name in ("token_emb.weight", "to_logits.1.weight", "to_logits.1.bias"):
        model[name] = torch.cat((model[name], 9 * torch.ones(44, *model[name].shape[1:])))
    settings = {**held.values["settings"], "vocabulary": 300}
    save_checkpoint(tmp_path / "large", {**held.parts, "model": model}, {**held.values, "settings": settings})
    assert written(capsys, tmp_path / "large", "--prompt", "some") == written(capsys, run, "--prompt", "some")


def test_memories_are_saved_and_taken_up_again(run, tmp_path, capsys):
    file = tmp_path / "memories"
    written(capsys, run, "--prompt", "xyz" * 40, "--save-memories", str(file), "--memory", "100")
    model, *_ = open_model(run)
    assert model.load_memories(file)[0].lengths.tolist() == [100]
    options = ["--prompt", "and", "--temperature", "0.1"]
    assert written(capsys, run, *options, "--memories", str(file)) != written(capsys, run, *options)


def test_characters_are_written_whole_and_bytes_that_are_none_replaced(saved, capsys, monkeypatch):
    from memtrans.cli import generate as cli_generate

    tokens = [torch.tensor([byte]) for byte in [*"né€".encode(), 0xFF, *"€".encode()[:2]]]
    monkeypatch.setattr(cli_generate, "stream", lambda *arguments: iter(tokens))
    assert written(capsys, saved) == "né€\ufffd\ufffd"


def test_the_weights_may_be_narrowed(saved, capsys):
    assert written(capsys, saved, "--dtype", "bfloat16")


def test_speed_goes_to_standard_error(saved, capsys):
    assert main(["generate", "--checkpoint", str(saved), "--prompt", "abc", "--tokens", "5"]) == 0
    assert "read 3 tokens in " in capsys.readouterr().err


def test_it_runs_as_a_program_whose_reader_may_leave(saved):
    command = [sys.executable, "-m", "memtrans", "generate", "--checkpoint", str(saved), "--tokens", "3000"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(10)
    process.stdout.close()
    assert process.wait(timeout=60) == 1
    assert b"Traceback" not in process.stderr.read()
    process.stderr.close()


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--top-p", "0"], "top_p must be in (0, 1], got 0.0"),
        (["--top-p", "1.01"], "top_p must be in (0, 1], got 1.01"),
        (["--top-k", "0"], "top_k must be at least 1, got 0"),
        (["--tokens", "0"], "tokens must be at least 1, got 0"),
        (["--seed", "-1"], "seed must be in [0, 2**63), got -1"),
        (["--segment", "0"], "segment must be at least 1, got 0"),
        (["--memory", "0"], "max_memories must be at least 1, got 0"),
        (["--prompt-file", "/no/such/file"], "No such file or directory: '/no/such/file'"),
        (["--memories", "/no/such/file"], "got '/no/such/file', which does not exist"),
        (
            ["--save-memories", "/no/such/file"],
            "must name a file in a directory that exists, got '/no/such/file'",
        ),
        (["--save-memories", "/"], "must name a file in a directory that exists, got '/'"),
        (["--device", "abacus"], "device must be one that this torch can use"),
    ],
)
def test_bad_input_ends_with_one_line_and_status_2(saved, capsys, options, message):
    assert main(["generate", "--checkpoint", str(saved), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def refused(capsys, checkpoint: Path, *options: str) -> str:
    assert main(["generate", "--checkpoint", str(checkpoint), *options]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    return error


def test_ids_outside_a_small_vocabulary_and_models_over_words_are_refused(tmp_path, capsys):
    build(num_tokens=100).save_pretrained(tmp_path / "small")
    error = refused(capsys, tmp_path / "small", "--prompt", "xx")
    assert "prompt must be token ids in [0, 100), got 120" in error
    build(num_tokens=300).save_pretrained(tmp_path / "large")
    assert "must be of a model over bytes, got one of 300 tokens" in refused(capsys, tmp_path / "large")


def test_a_checkpoint_that_is_missing_or_of_another_shape_is_refused(run, saved, tmp_path, capsys):
    assert "hold checkpoint.json or config.json, got" in refused(capsys, tmp_path / "none")
    held = load_checkpoint(run / "checkpoint")
    wrong = {**held.values, "settings": {**held.values["settings"], "width": 24}}
    save_checkpoint(tmp_path / "wrong", held.parts, wrong)
    assert "checkpoint must hold weights of this model, got others" in refused(capsys, tmp_path / "wrong")
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, "dim": 24}))
    assert "must hold weights of the model in config.json, got others" in refused(capsys, saved)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"dim_head": 4}, "must hold memories of dim=8 and kv_heads=1, got dim=4"),
        ({"memorizing_layers": (1, 2)}, "must hold one memory for each of the layers (2,), got 2"),
    ],
)
def test_memories_of_another_width_or_number_of_layers_are_refused(saved, tmp_path, capsys, other, message):
    build(**other).create_knn_memories(batch_size=1, device="cpu").save(tmp_path / "memories")
    assert message in refused(capsys, saved, "--memories", str(tmp_path / "memories"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--memory", "9"], "memory must not be given with a model that has no memory, got '9'"),
        (["--save-memories", "file"], "save_memories must not be given with a model that has no memory, got 'file'"),
    ],
)
def test_options_of_a_memory_are_refused_where_there_is_none(tmp_path, capsys, options, message):
    build(memorizing_layers=()).save_pretrained(tmp_path / "model")
    assert message in refused(capsys, tmp_path / "model", *options)


def test_memories_of_several_documents_are_refused(saved, tmp_path, capsys):
    build().create_knn_memories(batch_size=2, device="cpu").save(tmp_path / "memories")
    assert "1 documents in scope" in refused(capsys, saved, "--memories", str(tmp_path / "memories"))
