"""The options of every command. Nothing here imports PyTorch: `--help` and a wrong option are answered at once."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from memtrans import __version__
from memtrans.annotations import kind_of
from memtrans.presets import PRESETS
from memtrans.training.settings import Settings, hints

SEGMENT = 512  # of `generate`, where the checkpoint does not say what the model was trained with
DTYPES = ("auto", "float32", "bfloat16", "float16")  # of a pretrained model from the hub
OVERRIDDEN_BY_EVAL = (
    *("data", "text_field", "join_by", "batch", "segment", "memory", "keep_memory", "neighbours", "device"),
    "eval_bytes",
)


class Parser(argparse.ArgumentParser):
    """One line for what is wrong, instead of a page of usage above it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; `{self.prog} --help` lists what there is\n")


def build_parser() -> argparse.ArgumentParser:
    """Of `python -m memtrans`. What it parses has `verb`, the module of `memtrans.cli` that runs the command, and
    `name`, the command's."""
    parser = Parser(prog="memtrans", description="Memorizing Transformers on real text.")
    parser.add_argument("--version", action="version", version=f"memtrans {__version__}")
    commands = parser.add_subparsers(
        required=True, metavar="{train,eval,generate,tokenize,hf,inspect,presets,info,completion}"
    )
    _add_train(commands)
    _add_eval(commands)
    _add_generate(commands)
    _add_tokenize(commands)
    _add_hf(commands)
    _add_inspect(commands)
    presets = commands.add_parser("presets", help="what `train --preset` takes, and what each would cost")
    presets.set_defaults(verb="presets", name="presets")
    presets.add_argument(
        "preset", nargs="?", choices=sorted(PRESETS), metavar="NAME", help="print all of its settings, for --config"
    )
    presets.description = (
        "A line for each preset: parameters, bytes of a batch's memories, and the time of a step on one H100 as a "
        "simple model of its arithmetic predicts it (too low for small models, which wait for launches)."
    )
    info = commands.add_parser("info", help="versions, devices, and which backend of each operator is live")
    info.set_defaults(verb="info", name="info")
    info.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    completion = commands.add_parser("completion", help="a script that completes this command in a shell")
    completion.set_defaults(verb="completion", name="completion")
    completion.add_argument("shell", choices=("bash", "zsh"), help="the script goes to standard output")
    return parser


def _path(text: str) -> Path:
    """A path; an empty one, of a variable that is not set, would be the current directory."""
    if not text:
        raise argparse.ArgumentTypeError("must name a file or directory, got ''")
    return Path(text)


def _add_train(commands: Any) -> None:
    train = commands.add_parser("train", help="train a model", formatter_class=argparse.RawDescriptionHelpFormatter)
    train.set_defaults(verb="train", name="train")
    train.usage = "memtrans train [option ...]"  # all of them take a page, and are listed below
    train.description = "Trains a model on documents read from beginning to end, with a memory of each."
    train.epilog = (
        "A preset sets every option, --config overrides it, and options that are given override both. The values in\n"
        "brackets are those of the preset demo; `memtrans presets NAME` prints those of another, for --config."
    )
    names = ", ".join(sorted(PRESETS))
    train.add_argument(
        "--preset",
        choices=sorted(PRESETS),
        metavar="NAME",
        help=f"values to begin with (default: what --config names as its preset, or demo): {names}",
    )
    train.add_argument("--config", type=_path, help="file of settings, TOML or JSON")
    train.add_argument(
        "--out", type=_path, help="directory of the run (default: the first free of runs/PRESET, -2, ...)"
    )
    train.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    train.add_argument("--plain", action="store_true", help="lines instead of a progress bar")
    _add_settings(train, [field.name for field in dataclasses.fields(Settings)], PRESETS["demo"])


def _add_eval(commands: Any) -> None:
    evaluate = commands.add_parser("eval", help="evaluate a run's checkpoint, with its memory and without")
    evaluate.set_defaults(verb="evaluate", name="eval")
    evaluate.add_argument("--out", type=_path, required=True, help="directory of the run")
    evaluate.add_argument(
        "--split",
        choices=("validation", "test"),
        help="held-out documents (default: validation of the run's own data, all of other data)",
    )
    _add_settings(evaluate, OVERRIDDEN_BY_EVAL)


def _add_tokenize(commands: Any) -> None:
    tokenize = commands.add_parser("tokenize", help="make a store of tokens of texts, for train and eval to read")
    tokenize.set_defaults(verb="tokenize", name="tokenize")
    tokenize.description = (
        "Writes tokens, an index of documents and the tokenizer to a directory. What was interrupted goes on where it "
        "was when the same command is given again."
    )
    add = tokenize.add_argument
    add("data", help="stdlib, or a file or directory: text, archives, .jsonl, .parquet, a saved dataset")
    add("--out", type=_path, required=True, help="directory of the store; it must not exist, or be empty")
    add("--tokenizer", metavar="FILE", help="bytes, or a tokenizer.json or a directory with one (default: bytes)")
    add(
        "--train-vocabulary",
        type=int,
        metavar="V",
        help="learn a byte-level vocabulary of V tokens from the texts that are not held out",
    )
    add("--text-field", default=Settings.text_field, help="field of a record that holds its text (text)")
    add("--join-by", metavar="FIELD", help="records side by side with the same value of this field are one document")


def _add_generate(commands: Any) -> None:
    generate = commands.add_parser("generate", help="continue a prompt of any length with a trained model")
    generate.set_defaults(verb="generate", name="generate")
    add = generate.add_argument
    add("--checkpoint", type=_path, required=True, help="a run's directory, or one that save_pretrained wrote")
    prompt = generate.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", default="", help="text to continue (default: none, which stands for a line's end)")
    prompt.add_argument("--prompt-file", type=_path, help="file to continue, read as bytes, of any length")
    add("--tokens", type=int, default=256, help="tokens to write: bytes, of a run without a tokenizer (256)")
    add("--temperature", type=float, default=1.0, help="divides the logits; 0 or less is greedy (1)")
    add("--top-k", type=int, help="draw among so many likeliest tokens")
    add("--top-p", type=float, help="draw among the fewest likeliest tokens that together have this probability")
    add("--seed", type=int, default=0, help="of the draws (0)")
    add("--segment", type=int, help=f"N: tokens of a segment (default: the run's, or {SEGMENT})")
    add("--memory", type=int, help="M: entries of the memory (default: the model's)")
    add("--memories", type=_path, help="begin with memories that were saved")
    add("--save-memories", type=_path, help="save the memories at the end, which hold whole segments")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto takes a GPU where there is one")
    add("--dtype", choices=kind_of(hints()["dtype"]).choices, help="of the weights (default: as they were saved)")


def _add_hf(commands: Any) -> None:
    pretrained = commands.add_parser("hf", help="give a pretrained model a memory of a document, and ask it")
    pretrained.set_defaults(verb="hf", name="hf")
    add = pretrained.add_argument
    add("--model", type=_path, required=True, help="directory of a pretrained causal language model and its tokenizer")
    add("--document", type=_path, help="text to read into the memory, of any length (default: what --load holds)")
    add("--prompt", default=None, help="text to continue (default: none; the document is read, and saved if asked)")
    add("--tokens", type=int, default=64, help="tokens to write at most (64)")
    add("--temperature", type=float, default=0.0, help="of the draws; 0 is greedy (0)")
    add("--seed", type=int, default=0, help="of the draws (0)")
    add("--layers", type=int, nargs="+", metavar="LAYER", help="layers with a memory (default: all)")
    add("--memory", type=int, default=65536, help="M: entries of the memory (65536)")
    add("--neighbours", type=int, default=32, help="K: neighbours of a query (32)")
    add("--segment", type=int, default=512, help="N: tokens read at a time (512)")
    add("--offset", type=float, help="added to the logits of neighbours (default: by the size of the memory)")
    add("--calibrate", action="store_true", help="first learn from the document how heads use the memory")
    add("--calibration-steps", type=int, default=120, help="of --calibrate (120)")
    add("--save", type=_path, help="directory to write the memory to: what it learned and what it holds")
    add("--load", type=_path, help="directory that --save wrote; the options of the memory are those saved")
    add("--dtype", choices=DTYPES, default="auto", help="of the model; auto is that of its weights (auto)")
    add("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")


def _add_inspect(commands: Any) -> None:
    inspect = commands.add_parser("inspect", help="a page that shows what was remembered for each word")
    inspect.set_defaults(verb="inspect", name="inspect")
    inspect.description = "Reads a document into the memory, continues a prompt, and shows what each word came from."
    add = inspect.add_argument
    model = inspect.add_mutually_exclusive_group(required=True)
    model.add_argument("--checkpoint", type=_path, help="a run's directory, or one that save_pretrained wrote")
    model.add_argument("--model", type=_path, help="directory of a pretrained causal language model and its tokenizer")
    add("--document", type=_path, required=True, help="text to read into the memory, of any length")
    add("--prompt", required=True, help="text to continue")
    add("--tokens", type=int, default=64, help="tokens to write at most (64)")
    add("--out", type=_path, required=True, help="the page, one HTML file")
    add("--json", type=_path, help="file for all entries of all layers and heads (default: none)")
    add("--temperature", type=float, default=0.0, help="of the draws; 0 is greedy (0)")
    add("--seed", type=int, default=0, help="of the draws (0)")
    add(
        "--memory",
        type=int,
        help="M: entries (default: the model's; with --model the document's tokens, at most 65536)",
    )
    add("--segment", type=int, help="N: tokens read at a time (default: what it was trained with; with --model 512)")
    add("--load", type=_path, help="with --model, directory that `hf --save` wrote: settings and what was learned")
    add("--dtype", choices=DTYPES, default="auto", help="of --model; auto is that of its weights (auto)")
    add("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")


def _add_settings(parser: argparse.ArgumentParser, names: Sequence[str], preset: Settings | None = None) -> None:
    """One option for each setting; what is not given does not appear among the parsed options.

    preset: whose values the help shows; None where they are the run's.
    """
    fields = {field.name: field for field in dataclasses.fields(Settings)}

    def default(name: str) -> str:
        value = getattr(preset, name, None)
        return "" if value is None or isinstance(value, bool) else f" ({value})"

    for name in names:
        keywords: dict[str, Any] = {"default": argparse.SUPPRESS, "help": fields[name].metadata["help"] + default(name)}
        kind = kind_of(hints()[name])
        if kind.base is bool:
            keywords["action"] = argparse.BooleanOptionalAction
        elif kind.several:
            keywords |= {"type": kind.base, "nargs": "+", "metavar": "LAYER"}
        else:
            choices = "{" + ",".join(kind.choices) + "}"  # shown only: what is none of them is refused by `Settings`
            keywords |= {"type": kind.base, "metavar": choices if kind.choices else kind.base.__name__.upper()}
        parser.add_argument("--" + name.replace("_", "-"), **keywords)


def given_settings(options: argparse.Namespace) -> dict[str, Any]:
    """The settings that stand on the command line."""
    names = {field.name for field in dataclasses.fields(Settings)}
    given = {name: value for name, value in vars(options).items() if name in names}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
