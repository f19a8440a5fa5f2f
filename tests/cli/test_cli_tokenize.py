"""`tokenize`, and runs over tokens: what they report, resume, carry and refuse."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from memtrans import MemorizingTransformer
from memtrans.cli.main import main
from memtrans.data import sources, tokenize
from memtrans.locks import Lock
from memtrans.training.checkpoint import load_checkpoint, save_checkpoint
from memtrans.training.data import fitted
from memtrans.training.settings import Settings
from tests.helpers.tiny_runs import checkpoint_files, last_line, train, uneven_documents, without_times, written_text
from tests.helpers.vocabularies import learned, losing, without_lines


def ended(capsys, *arguments: str) -> tuple[int, str]:
    """The status of a command and its one line on standard error."""
    status = main(list(arguments))
    return status, capsys.readouterr().err


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A directory with a text, a store of its tokens, and a run over them."""
    directory = tmp_path_factory.mktemp("made")
    text = written_text(directory)
    assert main(["tokenize", text, "--out", str(directory / "store"), "--train-vocabulary", "300"]) == 0
    assert train(directory / "run", "--data", str(directory / "store"), "--steps", "4", "--log-every", "1") == 0
    return directory


def test_tokenize_says_what_the_store_holds(tmp_path, capsys):
    text = written_text(tmp_path)
    assert main(["tokenize", text, "--out", str(tmp_path / "store"), "--train-vocabulary", "280"]) == 0
    report = last_line(capsys)
    assert (report["documents"], report["bytes"], report["vocabulary"]) == (1, Path(text).stat().st_size, 280)
    assert report["bytes_per_token"] == round(report["bytes"] / report["tokens"], 3)


def test_tokenize_says_how_far_it_is(tmp_path, capsys):
    text = written_text(tmp_path)
    assert main(["tokenize", text, "--out", str(tmp_path / "store")]) == 0
    assert capsys.readouterr().err == f"{Path(text).stat().st_size:,} bytes of text are tokens\n"


def test_without_the_library_nothing_is_begun(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    out = tmp_path / "store"
    assert main(["tokenize", written_text(tmp_path), "--out", str(out), "--train-vocabulary", "300"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("memtrans tokenize: ") and "pip install 'memtrans[text]'" in line
    assert not out.exists()


@pytest.mark.parametrize("size", ["-1", "255", "16777217", "18446744073709551616"])
def test_a_vocabulary_of_no_size_is_refused_before_it_is_learned(tmp_path, capsys, size):
    options = ["--out", str(tmp_path / "store"), "--train-vocabulary", size]
    status, error = ended(capsys, "tokenize", written_text(tmp_path), *options)
    (line,) = error.splitlines()
    assert status == 2 and line.startswith("memtrans tokenize: train_vocabulary must be at ")


@pytest.mark.parametrize("options", [[], ["--train-vocabulary", "280"]])
def test_a_second_command_is_refused_while_the_first_one_writes(options, tmp_path, capsys):
    text, out = written_text(tmp_path), tmp_path / "store"
    writing = Lock(out, "command", "makes tokens")
    (out / "progress.json").write_text('{"kind": "memtrans.tokens"}')
    expected = f"must be a directory that no other command writes to, got '{out}', where process {os.getpid()}"
    assert ended(capsys, "tokenize", text, "--out", str(out), *options) == (
        2,
        f"memtrans tokenize: out {expected} makes tokens\n",
    )
    assert {path.name for path in out.iterdir()} == {".lock", "progress.json"}
    (out / "progress.json").unlink()
    writing.release()
    assert main(["tokenize", text, "--out", str(out)]) == 0


def test_records_are_documents_and_may_be_joined(tmp_path, capsys):
    records = [{"body": f"text {number} " * 9, "book": number // 2} for number in range(8)]
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    options = ["--text-field", "body", "--join-by", "book"]
    assert main(["tokenize", str(tmp_path / "some.jsonl"), "--out", str(tmp_path / "store"), *options]) == 0
    assert last_line(capsys)["documents"] == 4
    run, store = tmp_path / "run", str(tmp_path / "store")
    assert train(run, "--data", str(tmp_path / "some.jsonl"), "--steps", "1", *options) == 0
    assert main(["train", "--resume", "--out", str(run), "--data", store, "--steps", "2"]) == 0
    capsys.readouterr()
    assert train(tmp_path / "other", "--data", store, "--join-by", "book", "--steps", "1") == 2
    assert f"join_by must be given to tokenize, not with the store '{store}' that it" in capsys.readouterr().err


def test_a_run_reports_bits_per_byte_nats_per_token_and_perplexity(made):
    lines = without_times(made / "run")
    for line in lines:
        if "bits_per_byte" in line:
            assert line["perplexity"] == pytest.approx(math.exp(line["nats_per_token"]))
            assert line["bits_per_byte"] < line["nats_per_token"] / math.log(2), "a token has more than one byte"
    evaluated = lines[-1]
    bits = evaluated["eval_nats_per_token"] * evaluated["eval_scored_tokens"] / math.log(2)
    assert evaluated["eval_bits_per_byte"] == pytest.approx(bits / evaluated["eval_scored_bytes"])
    assert evaluated["eval_scored_bytes"] > evaluated["eval_scored_tokens"]


def test_raw_text_with_the_tokenizer_trains_as_the_store_does(made, tmp_path):
    options = ["--data", str(made / "text.txt"), "--tokenizer", str(made / "store"), "--steps", "4", "--log-every", "1"]
    assert train(tmp_path / "run", *options) == 0
    assert without_times(tmp_path / "run") == without_times(made / "run")


def test_bytes_by_name_train_as_bytes_without_one(tmp_path):
    text = written_text(tmp_path)
    for name, options in (("plain", []), ("named", ["--tokenizer", "bytes"])):
        assert train(tmp_path / name, "--data", text, "--steps", "2", "--log-every", "1", *options) == 0
    assert without_times(tmp_path / "plain") == without_times(tmp_path / "named")
    assert "tokenizer" not in load_checkpoint(tmp_path / "named" / "checkpoint").parts


def test_a_run_over_tokens_resumes_to_the_bit_without_its_tokenizers_file(tmp_path):
    data = uneven_documents(tmp_path / "texts")
    (tmp_path / "tokenizer.json").write_bytes(learned().content)
    options = ["--data", data, "--tokenizer", str(tmp_path / "tokenizer.json"), "--warmup", "2", "--log-every", "1"]
    assert train(tmp_path / "whole", *options, "--steps", "8") == 0
    assert train(tmp_path / "cut", *options, "--steps", "8", "--checkpoint-every", "3") == 0
    whole = checkpoint_files(tmp_path / "whole")
    shutil.rmtree(tmp_path / "cut")
    assert train(tmp_path / "cut", *options, "--steps", "3", "--schedule", "inverse-sqrt") == 0
    assert train(tmp_path / "straight", *options, "--steps", "8", "--schedule", "inverse-sqrt") == 0
    (tmp_path / "tokenizer.json").unlink()
    assert main(["train", "--resume", "--out", str(tmp_path / "cut"), "--steps", "8", "--plain"]) == 0
    assert any(name.startswith("tokenizer-") for name in whole)
    left, right = (load_checkpoint(tmp_path / name / "checkpoint") for name in ("cut", "straight"))
    assert left.values["stream"] == right.values["stream"]
    for name, tensor in left.parts["model"].items():
        assert tensor.equal(right.parts["model"][name]), name


def test_eval_and_generate_take_the_tokenizer_of_the_checkpoint(made, tmp_path, capsys):
    capsys.readouterr()
    assert main(["eval", "--out", str(made / "run"), "--data", str(made / "text.txt")]) == 0
    raw = last_line(capsys)
    assert main(["eval", "--out", str(made / "run")]) == 0
    own = last_line(capsys)
    assert raw["split"] == own["split"] == "validation"
    assert raw["eval_bits_per_byte"] == own["eval_bits_per_byte"]
    (tmp_path / "other.txt").write_bytes("d\u00e9j\u00e0 vu, a text of another kind. ".encode() * 30 + b"\xe2\x82")
    assert main(["eval", "--out", str(made / "run"), "--data", str(tmp_path / "other.txt")]) == 0
    report = last_line(capsys)
    size = (tmp_path / "other.txt").stat().st_size
    assert report["split"] == "all" and size - 10 < report["eval_scored_bytes"] < size, "all but the first token"
    assert main(["generate", "--checkpoint", str(made / "run"), "--prompt", "line", "--tokens", "30"]) == 0
    printed = capsys.readouterr()
    assert printed.out.strip() and "read 1 tokens" in printed.err


def test_a_store_in_the_users_directory_brings_its_vocabulary(made, monkeypatch):
    monkeypatch.setenv("HOME", str(made))
    assert fitted(Settings(data="~/store")).vocabulary == 300


def test_a_larger_vocabulary_than_the_tokenizers_generates_its_tokens_alone(made, tmp_path, capsys):
    options = ["--data", str(made / "store"), "--steps", "1", "--vocabulary", "1000"]
    assert train(tmp_path / "run", *options) == 0
    capsys.readouterr()
    assert main(["generate", "--checkpoint", str(tmp_path / "run"), "--tokens", "200", "--temperature", "9"]) == 0
    assert capsys.readouterr().out


def test_a_saved_model_may_have_a_tokenizer_beside_it(tmp_path, capsys):
    sizes = {"dim": 16, "depth": 1, "heads": 2, "dim_head": 8, "memorizing_layers": (1,), "max_knn_memories": 64}
    for name, vocabulary in (("fits", 280), ("small", 279)):
        MemorizingTransformer(num_tokens=vocabulary, **sizes).save_pretrained(tmp_path / name)
        (tmp_path / name / "tokenizer.json").write_bytes(learned().content)
    assert main(["generate", "--checkpoint", str(tmp_path / "fits"), "--prompt", "the fox", "--tokens", "5"]) == 0
    assert "read 2 tokens" in capsys.readouterr().err
    status, error = ended(capsys, "generate", "--checkpoint", str(tmp_path / "small"), "--tokens", "5")
    assert status == 2 and "a model over the 280 tokens of its tokenizer, got one of 279" in error


def test_a_prompt_needs_no_token_for_a_lines_end(tmp_path, capsys):
    sizes = {"num_tokens": 256, "dim": 16, "depth": 2, "dim_head": 8, "heads": 2, "memorizing_layers": 2}
    MemorizingTransformer(**sizes, max_knn_memories=20).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(without_lines().content)
    generate = ["generate", "--checkpoint", str(tmp_path), "--tokens", "2"]
    assert main([*generate, "--prompt", "the fox"]) == 0
    capsys.readouterr()
    status, error = ended(capsys, *generate)
    assert status == 2 and "prompt must hold text where the tokenizer has no token for a line's end" in error


def test_what_does_not_belong_together_ends_with_one_line(made, tmp_path, capsys):
    run, text, store = str(made / "run"), str(made / "text.txt"), str(made / "store")
    (tmp_path / "tokenizer.json").write_bytes(learned().content)
    assert main(["tokenize", text, "--out", str(tmp_path / "other"), "--tokenizer", str(tmp_path)]) == 0
    capsys.readouterr()
    cases = {
        ("eval", "--out", run, "--data", str(tmp_path / "other")): "data must hold tokens of a vocabulary of 300",
        (
            "train",
            "--resume",
            "--out",
            run,
            "--tokenizer",
            str(tmp_path),
        ): "tokenizer must be the checkpoint's, ",
        ("train", "--data", store, "--tokenizer", "bytes"): "data must hold tokens of bytes, got",
        (
            "train",
            "--data",
            store,
            "--vocabulary",
            "299",
        ): "vocabulary must be at least 300, as many as the tokenizer has",
        ("train", "--data", "recall", "--tokenizer", str(tmp_path)): "tokenizer must be bytes for recall",
        (
            "train",
            "--data",
            text,
            "--tokenizer",
            "/no/such",
        ): "tokenizer must be bytes, a tokenizer.json or a directory",
        (
            *("tokenize", text, "--out", str(tmp_path / "new"), "--tokenizer", "~nobody/x"),
        ): "tokenizer must be bytes, a tokenizer.json or a directory with one, got '~nobody/x'\n",
        ("tokenize", "~nobody/x", "--out", str(tmp_path / "new")): "no such file",
        ("train", "--data", "~nobody/x"): "no such file",
        ("tokenize", text, "--out", store): "out must hold no store",
        ("tokenize", store, "--out", str(tmp_path / "new")): f"data must be texts, got '{store}', a store of tokens",
        ("tokenize", "/no/such", "--out", str(tmp_path / "new")): "no such file",
        ("tokenize", text, "--out", text): "out must be a directory or not exist",
        (
            *("tokenize", text, "--out", str(tmp_path / "new"), "--tokenizer", "bytes", "--train-vocabulary", "300"),
        ): "tokenizer must not be given with train_vocabulary",
    }
    for command, message in cases.items():
        status, error = ended(capsys, *command)
        assert status == 2 and error.startswith(f"memtrans {command[0]}: ") and message in error, (command, error)
        assert error.count("\n") == 1


def test_a_resumed_run_takes_its_tokenizer_by_what_it_says_wherever_it_is(made, tmp_path, capsys):
    shutil.copytree(made / "run", tmp_path / "run")
    tokenizer = shutil.copy(made / "store" / "tokenizer.json", tmp_path)
    resume = ["train", "--resume", "--out", str(tmp_path / "run"), "--plain", "--tokenizer", tokenizer]
    assert main([*resume, "--steps", "5"]) == 0
    Path(tokenizer).write_bytes(learned().content)
    status, error = ended(capsys, *resume, "--steps", "6")
    assert status == 2 and "tokenizer must be the checkpoint's, " in error and error.count("\n") == 1
    assert f"got {learned().digest} as {tokenizer!r}" in error


@pytest.mark.parametrize("begun", [["--train-vocabulary", "280"], ["--tokenizer", "tokenizer.json"]])
def test_another_vocabulary_than_was_begun_with_is_refused(begun, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("tokenizer.json").write_bytes(learned().content)
    with monkeypatch.context() as patch:
        patch.setattr(tokenize._Writer, "end", fill_up)
        assert main(["tokenize", written_text(tmp_path), "--out", "store", *begun]) == 1
    capsys.readouterr()
    status, error = ended(capsys, "tokenize", "text.txt", "--out", "store", "--train-vocabulary", "290")
    assert status == 2 and "out must be unfinished by the same data and tokenizer, got 'store'" in error
    assert main(["tokenize", "text.txt", "--out", "store", *begun]) == 0


@pytest.mark.parametrize("wrong", [["--text-field", "body"], ["--tokenizer", "few.json"]])
def test_what_is_refused_at_once_leaves_nothing_behind(wrong, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("few.json").write_bytes(losing().content)
    Path("some.jsonl").write_text('{"text": "some text"}\n' * 9)
    tokenize = ["tokenize", "some.jsonl", "--out", "store"]
    assert main([*tokenize, *wrong]) == 2
    assert list(Path("store").iterdir()) == []
    assert main(tokenize) == 0
    assert last_line(capsys)["vocabulary"] == 256


def fill_up(writer) -> None:
    raise OSError(28, "No space left on device")


def test_a_text_that_the_tokenizer_loses_ends_with_one_line(tmp_path, capsys):
    (tmp_path / "tokenizer.json").write_bytes(losing().content)
    text = written_text(tmp_path)
    status, error = ended(capsys, "tokenize", text, "--out", str(tmp_path / "store"), "--tokenizer", str(tmp_path))
    assert status == 2 and "tokenizer must give every text back" in error and error.count("\n") == 1


def test_a_text_that_a_runs_tokenizer_loses_is_refused_by_name(tmp_path, capsys):
    (tmp_path / "tokenizer.json").write_bytes(without_lines().content)
    (tmp_path / "text.txt").write_bytes(b"words and words " * 40)
    (tmp_path / "other.txt").write_bytes(b"words\n" * 40)
    run, tokenizer = tmp_path / "run", str(tmp_path)
    assert train(run, "--data", str(tmp_path / "text.txt"), "--tokenizer", tokenizer, "--steps", "1") == 0
    capsys.readouterr()
    status, error = ended(capsys, "eval", "--out", str(run), "--data", str(tmp_path / "other.txt"))
    assert status == 2 and r"got 'tokenizer.json of the checkpoint', which loses '\n'" in error


def test_a_checkpoint_whose_tokenizer_was_exchanged_is_refused(made, tmp_path, capsys):
    checkpoint = load_checkpoint(made / "run" / "checkpoint")
    parts = {part: tensors for part, tensors in checkpoint.parts.items() if part != "tokenizer"}
    save_checkpoint(tmp_path / "checkpoint", parts, checkpoint.values)
    for command in (["eval", "--out"], ["generate", "--checkpoint"], ["train", "--resume", "--out"]):
        status, error = ended(capsys, *command, str(tmp_path))
        assert status == 2 and "checkpoint must carry the tokenizer that it names" in error


def test_a_full_disk_keeps_what_is_done_and_the_same_command_goes_on(tmp_path):
    """A limit on the size of files stands for a full disk."""
    text = tmp_path / "long.txt"
    text.write_bytes(b"a line of a long text, of which there are many\n" * 20_000)
    command = [sys.executable, "-m", "memtrans", "tokenize", str(text), "--out", str(tmp_path / "store")]
    program = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000)); "
        "from memtrans.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    limited = subprocess.run(
        [sys.executable, "-c", program, *command[3:]], capture_output=True, text=True, env=environment
    )
    assert limited.returncode == 1 and limited.stderr.count("\n") == 1, limited.stderr
    assert "failed: [Errno 27]" in limited.stderr and "the same command goes on" in limited.stderr
    assert main(command[3:]) == 0
    assert sources.load_corpus(str(tmp_path / "store")).documents[0].text() == text.read_bytes()
