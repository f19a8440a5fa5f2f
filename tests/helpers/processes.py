"""Several processes that call the same functions side by side, as ranks of one group: over gloo, or NCCL on GPUs."""

from __future__ import annotations

import multiprocessing
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, SpawnContext
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

# What a process imports that is forked from others of its kind. Threads and groups begin after the fork.
WARM = [
    *("pytest", "torch.distributed.fsdp", "memtrans.cli.main", "memtrans.training.trainer", "memtrans.presets"),
    *("torch._dynamo", "matplotlib.figure", "matplotlib.backends.backend_agg"),  # what the end of a run imports
]
SECONDS = 30
GLOO_SAYS = re.compile(r"^\[Gloo\] Rank \d+ is connected to .*\n", re.MULTILINE)  # some versions, to either stream
MOMENT = 5  # seconds that the other ranks have to answer once one has failed
COMPILING_SECONDS = 150  # more on GPUs: each rank compiles its kernels first, one maybe long after the other


class Processes:
    """So many ranks; they wait for functions until `close`.

    A function must be importable, and so must what it is given and returns.

    device: cpu, or cuda for a GPU each, on which tensors are then made.
    """

    def __init__(self, size: int, device: str = "cpu") -> None:
        self.size, self.device = size, device
        self._seconds = SECONDS if device == "cpu" else COMPILING_SECONDS
        self._start()

    def _start(self) -> None:
        size = self.size
        context = warm_context() if self.device == "cpu" else multiprocessing.get_context("spawn")
        self._directory = tempfile.TemporaryDirectory()
        store = Path(self._directory.name) / "store"
        pairs = [context.Pipe() for _ in range(size)]
        self._pipes = [ours for ours, _ in pairs]
        arguments = [
            (rank, size, self.device, self._seconds, str(store), theirs) for rank, (_, theirs) in enumerate(pairs)
        ]
        self._processes = [context.Process(target=_serve, args=given, daemon=True) for given in arguments]
        for process in self._processes:
            process.start()

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What the function returns on each rank; its first argument is the rank's number."""
        for pipe in self._pipes:
            pipe.send((function, arguments))
        answers = self._answers()
        failures = [answer for failed, answer in answers if failed]
        if len(failures) not in (0, self.size) or any("LostRankError" in failure for failure in failures):
            # what the ranks have still to tell each other nobody knows
            self.close()
            self._start()
        assert not failures, "\n".join(failures)
        return [answer for _, answer in answers]

    def _answers(self) -> list[tuple[bool, Any]]:
        """Whether each rank failed, and what it says; once one has failed the others have a moment more."""
        answers: dict[int, tuple[bool, Any]] = {}
        deadline = time.monotonic() + 2 * self._seconds
        while len(answers) < self.size and time.monotonic() < deadline:
            for rank, pipe in enumerate(self._pipes):
                if rank in answers or not pipe.poll(0.01):
                    continue
                try:
                    answers[rank] = pipe.recv()
                except EOFError:
                    answers[rank] = True, f"rank {rank} ended"
                if answers[rank][0]:
                    deadline = min(deadline, time.monotonic() + MOMENT)
        return [answers.get(rank, (True, f"rank {rank}: no answer")) for rank in range(self.size)]

    def close(self) -> None:
        for process in self._processes:
            process.terminate()
            process.join()
        self._directory.cleanup()


def warm_context() -> SpawnContext | ForkServerContext:
    """How processes start quickly: forked from a server that has imported what they need, where forks are safe."""
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(WARM)
    return context


def _serve(rank: int, size: int, device: str, seconds: int, store: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
        torch.set_default_device("cuda")
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(
        backend, init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=seconds)
    )
    while True:
        function, arguments = pipe.recv()
        try:
            pipe.send((False, function(rank, *arguments)))
        except BaseException:
            pipe.send((True, f"rank {rank}: {traceback.format_exc()}"))


def free_port() -> int:
    """Below those that connections are given, one of which might take it before the ranks do."""
    for port in random.sample(range(20_000, 30_000), 100):
        with socket.socket() as place:
            if place.connect_ex(("127.0.0.1", port)) != 0:
                return port
    raise RuntimeError("no port is free")


def launched(size: int) -> list[dict[str, str]]:
    """The variables that torchrun sets on each rank."""
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [{**shared, "OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]


def started(size: int, *arguments: str, **changes: tuple[str, ...]) -> list[subprocess.Popen[str]]:
    """`python -m memtrans` on each rank with the variables that torchrun sets; changes: of one rank's arguments."""
    processes = []
    for rank, variables in enumerate(launched(size)):
        command = [sys.executable, "-m", "memtrans", *arguments, *changes.get(f"rank{rank}", ())]
        environment = {**os.environ, **variables}
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    return processes


class Ending(Protocol):
    """What is asked of a process that is waited for."""

    @property
    def returncode(self) -> int | None: ...

    def communicate(self, *, timeout: float) -> tuple[str, str]: ...

    def kill(self) -> None: ...


def ended(processes: Sequence[Ending], seconds: float = SECONDS) -> list[tuple[int, str, str]]:
    """Status, standard output and standard error of each, once all have ended; without what Gloo says of its own."""
    try:
        texts = [process.communicate(timeout=seconds) for process in processes]
        pairs = zip(processes, texts, strict=True)
        return [(process.returncode, *(GLOO_SAYS.sub("", stream) for stream in streams)) for process, streams in pairs]
    finally:
        for process in processes:
            process.kill()
