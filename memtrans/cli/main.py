"""`python -m memtrans train | eval | generate | hf | presets | info`.

Bad input ends with one line on standard error and exit status 2; Ctrl-C with 130 and SIGTERM with 143, `train` after
a checkpoint; a loss that is not finite, a disk that is full, too little memory or a rank that is lost with 1, and the
last good checkpoint is kept. The last line of `train` and `eval` on standard output is one JSON object. Of several
ranks the first one speaks.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, get_type_hints

import torch

from memtrans.cli import generate as cli_generate
from memtrans.cli import hf as cli_hf
from memtrans.distributed.ranks import ALONE, LaunchError, LostRankError, Ranks, end_process, joined
from memtrans.presets import PRESETS, figures
from memtrans.training.checkpoint import load_checkpoint, require
from memtrans.training.evaluate import evaluate_both
from memtrans.training.run import Run, check_memory, checkpoint_of, resumed_settings, start
from memtrans.training.settings import Settings, build_model
from memtrans.training.signals import StoppedError
from memtrans.training.trainer import NonFiniteLossError, open_data, pick_device
from memtrans.training.weights import load_weights
from memtrans_kernels import backends_info

BAD_INPUT = (ValueError, OSError)  # from reading what the user named
OVERRIDDEN_BY_EVAL = ("data", "batch", "segment", "memory", "keep_memory", "neighbours", "device", "eval_bytes")


class InputError(Exception):
    """Something the user gave will not do; the message is for the user."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status."""
    options = _parser().parse_args(arguments)
    try:
        return options.command(options)
    except InputError as error:
        return _fail(options, str(error), 2)
    except NonFiniteLossError as error:
        return _fail(options, str(error), 1)
    except BrokenPipeError:  # whoever read the text has gone
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  Python flushes it once more when it ends
        return 1
    except OSError as error:
        return _fail(options, f"writing to {options.out} failed: {error}; the last checkpoint is kept", 1)
    except KeyboardInterrupt:
        return _fail(options, "stopped by Ctrl-C", 130)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        options.speaks = True  # the others have memory enough, and hear of a lost rank only
        return _fail(options, f"the device has too little memory for these sizes: {_first_line(error)}", 1)


def _is_out_of_memory(error: Exception) -> bool:
    """PyTorch has a class for it on GPUs alone."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _fail(options: argparse.Namespace, message: str, status: int) -> int:
    if getattr(options, "speaks", True):
        print(f"memtrans {options.name}: {message}", file=sys.stderr, flush=True)
    return status


# ------------------------------------------------------------------------------------------------------------ options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m memtrans", description="Memorizing Transformers on real text.")
    commands = parser.add_subparsers(required=True, metavar="{train,eval,generate,hf,presets,info}")

    train = commands.add_parser("train", help="train a model", formatter_class=argparse.RawDescriptionHelpFormatter)
    train.set_defaults(command=_train, name="train")
    train.description = "Trains a model on documents read from beginning to end, with a memory of each."
    train.epilog = "A preset sets every option; options that are given override it."
    train.add_argument("--preset", choices=sorted(PRESETS), default="demo", help="set of values to begin with (demo)")
    train.add_argument(
        "--out", type=Path, help="directory of the run (default: the first free of runs/PRESET, -2, ...)"
    )
    train.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    train.add_argument("--plain", action="store_true", help="lines instead of a progress bar")
    _add_settings(train, [field.name for field in dataclasses.fields(Settings)])

    evaluate = commands.add_parser("eval", help="evaluate a run's checkpoint, with its memory and without")
    evaluate.set_defaults(command=_evaluate, name="eval")
    evaluate.add_argument("--out", type=Path, required=True, help="directory of the run")
    evaluate.add_argument("--split", choices=("validation", "test"), default="validation", help="held-out documents")
    _add_settings(evaluate, OVERRIDDEN_BY_EVAL)

    generate = commands.add_parser("generate", help="continue a prompt of any length with a trained model")
    generate.set_defaults(command=_generate, name="generate", out=None)
    cli_generate.add_options(generate)

    pretrained = commands.add_parser("hf", help="give a pretrained model a memory of a document, and ask it")
    pretrained.set_defaults(command=_pretrained, name="hf", out=None)
    cli_hf.add_options(pretrained)

    presets = commands.add_parser("presets", help="what `train --preset` takes, and what each would cost")
    presets.description = (
        "A line for each preset: parameters, bytes of a batch's memories, and the time of a step on one H100 as a "
        "simple model of its arithmetic predicts it (too low for small models, which wait for launches)."
    )
    presets.set_defaults(command=_presets, name="presets", out=None)

    info = commands.add_parser("info", help="versions, devices, and which backend of each operator is live")
    info.set_defaults(command=_info, name="info", out=None)
    return parser


def _add_settings(parser: argparse.ArgumentParser, names: Sequence[str]) -> None:
    """One option for each setting; what is not given does not appear among the parsed options."""
    hints = get_type_hints(Settings)
    fields = {field.name: field for field in dataclasses.fields(Settings)}
    for name in names:
        keywords: dict[str, Any] = {"default": argparse.SUPPRESS, "help": fields[name].metadata["help"]}
        text = str(hints[name])
        if hints[name] in (bool, bool | None):
            keywords["action"] = argparse.BooleanOptionalAction
        elif "tuple" in text:
            keywords |= {"type": int, "nargs": "+", "metavar": "LAYER"}
        else:
            keywords["type"] = next(kind for kind in (float, int, str) if kind.__name__ in text)
            keywords["metavar"] = keywords["type"].__name__.upper()
        if "choices" in fields[name].metadata:
            keywords["metavar"] = "{" + ",".join(fields[name].metadata["choices"]) + "}"
        parser.add_argument("--" + name.replace("_", "-"), **keywords)


def _given(options: argparse.Namespace) -> dict[str, Any]:
    """The settings that stand on the command line."""
    names = {field.name for field in dataclasses.fields(Settings)}
    chosen = {name: value for name, value in vars(options).items() if name in names}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in chosen.items()}


# ----------------------------------------------------------------------------------------------------------- commands


def _train(options: argparse.Namespace) -> int:
    ranks = ALONE
    try:
        with joined() as ranks:
            options.speaks = ranks.first
            status = _train_on(ranks, options)
    except LaunchError as error:
        raise InputError(str(error)) from error
    except InputError as error:
        status = _fail(options, str(error), 2)
    except LostRankError as error:
        options.speaks = True
        status = _fail(options, f"{error}; the last checkpoint is kept, --resume goes on from there", 1)
    if ranks.size > 1:
        end_process(status)
    return status


def _train_on(ranks: Ranks, options: argparse.Namespace) -> int:
    try:
        options.out = ranks.gather(options.out or _free_directory(options.preset, options.resume))[0]
        settings = ranks.together(lambda: _settings(options))
        trainer = start(settings, options.out, options.resume, ranks)
        ranks.together(lambda: options.out.mkdir(parents=True, exist_ok=True))
    except BAD_INPUT as error:
        raise InputError(str(error)) from error
    run = Run(trainer, options.out, options.plain)
    try:
        summary = run.train()
    except KeyboardInterrupt as error:
        stopped = error if isinstance(error, StoppedError) else StoppedError()
        kept = f"step {run.saved_step} is saved, --resume --out {options.out} goes on from there"
        saved = kept if run.saved_step >= 0 else "nothing is saved yet"
        return _fail(options, f"{stopped}; {saved}", stopped.status)
    except NonFiniteLossError as error:
        return _fail(options, f"{error}; the last good checkpoint is kept", 1)
    if ranks.first:
        print(_json_line(summary), flush=True)
    return 0


def _settings(options: argparse.Namespace) -> Settings:
    if options.resume:
        return resumed_settings(options.out, _given(options))
    return dataclasses.replace(PRESETS[options.preset], **_given(options))


def _json_line(values: dict[str, Any]) -> str:
    """Strict JSON: what is no finite number is null."""
    finite = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in values.items()}
    return json.dumps(finite, allow_nan=False)


def _free_directory(preset: str, resume: bool) -> Path:
    """runs/PRESET, or the first of runs/PRESET-2, -3, ... that does not exist; with `resume`, the last that does."""
    number = 1
    path = Path("runs") / preset
    while path.exists():
        number += 1
        following = Path("runs") / f"{preset}-{number}"
        if resume and not following.exists():
            break
        path = following
    return path


def _evaluate(options: argparse.Namespace) -> int:
    try:
        checkpoint = require(load_checkpoint(checkpoint_of(options.out)), "settings", "step")
        trained = Settings.from_json(checkpoint.values["settings"])
        settings = dataclasses.replace(trained, **_given(options))
        check_memory(settings.memory, trained.memory)
        data = open_data(settings, options.split)
        model = build_model(settings).to(pick_device(settings.device))
        load_weights(model, checkpoint)
    except BAD_INPUT as error:
        raise InputError(str(error)) from error
    report = evaluate_both(
        model,
        data.held_out,
        settings.batch,
        settings.segment,
        settings.eval_bytes,
        dtype=settings.compute_dtype(model.token_emb.weight.device),
        keep_memory=settings.keep_memory,
    )
    rest = {"steps": checkpoint.values["step"], "data": settings.data, "split": options.split, "out": str(options.out)}
    device = str(model.token_emb.weight.device)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(_json_line({**rest, **report, "parameters": parameters, "device": device}), flush=True)
    return 0


def _generate(options: argparse.Namespace) -> int:
    try:
        generation = cli_generate.Generation.open(options)
    except (*BAD_INPUT, IndexError) as error:
        raise InputError(str(error)) from error
    try:
        generation.run()
    except BrokenPipeError:
        raise
    except OSError as error:
        return _fail(options, f"writing failed: {error}", 1)
    return 0


def _pretrained(options: argparse.Namespace) -> int:
    try:
        cli_hf.run(options)
    except BrokenPipeError:
        raise
    except (*BAD_INPUT, ImportError) as error:
        raise InputError(str(error)) from error
    return 0


def _presets(options: argparse.Namespace) -> int:
    del options
    for name, settings in PRESETS.items():
        print(f"{name:22} {figures(settings)}")
    return 0


def _info(options: argparse.Namespace) -> int:
    del options
    for name in ("memtrans", "torch", "triton", "numpy", "safetensors"):
        print(f"{name:12} {_version(name)}")
    print(f"{'python':12} {platform.python_version()} on {platform.platform()}")
    print(f"{'gpu':12} {_gpu()}")
    for line in backends_info():
        state = f"live{f' ({line.reason})' if line.reason else ''}" if line.live else f"not live: {line.reason}"
        print(f"{line.operator:26} {line.backend:10} {line.device:5} {state}")
    return 0


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _gpu() -> str:
    if not torch.cuda.is_available():
        built = torch.version.cuda
        return "none" if built else "none; this torch is built without CUDA"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return f"{', '.join(names)}; CUDA {torch.version.cuda}"
