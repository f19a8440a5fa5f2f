"""Where a training step's time goes on the device, kernel by kernel: `python benchmarks/step_profile.py enwik8-64k`.

The cases are those of bench_train.py: its set-ups, `enwik8-off` for one, replayed as a graph, or launched one by one
with `--eager`; and its texts, `code-64k-c` for one. Of a step in the middle of a run, with memories full of the model's
own keys, by PyTorch's profiler. On a CPU operators stand for kernels.
"""

from __future__ import annotations

import argparse
from collections import defaultdict

import bench_train
from common import DEVICE
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

STEPS = 3


def trainer_of(case: str, eager: bool) -> bench_train.Trainer:
    """In the middle of its run."""
    if case not in bench_train.OF_TEXT:
        return bench_train.full_trainer(bench_train.settings_of(case, compiled=not eager, replayed=not eager))
    settings, data = bench_train.of_text(case)
    trainer = bench_train.Trainer(settings, data, bench_train.pick_device(DEVICE, bench_train.ALONE))
    for _ in range(bench_train.LEARNT):
        trainer.advance()
    return trainer


def kernels(trainer: bench_train.Trainer) -> dict[str, list[float]]:
    """The microseconds of each launch in STEPS steps, by the kernel's name."""
    of_gpu = DEVICE == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if of_gpu else ProfilerActivity.CPU]) as seen:
        for _ in range(STEPS):
            trainer.advance()
        bench_train.synchronize()
    found = defaultdict(list)
    for event in seen.events():
        if (event.device_type == DeviceType.CUDA) == of_gpu:
            found[event.name].append(event.device_time_total if of_gpu else event.self_cpu_time_total)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=[*bench_train.CASES, *bench_train.OF_TEXT])
    parser.add_argument("--eager", action="store_true", help="neither compiled nor replayed")
    parser.add_argument("--most", type=int, default=40, help="kernels to name (40)")
    options = parser.parse_args()
    found = kernels(trainer_of(options.case, options.eager))
    print(f"{options.case}: {sum(map(sum, found.values())) / STEPS / 1e3:.2f} ms a step")
    for name in sorted(found, key=lambda name: -sum(found[name]))[: options.most]:
        total, launches = sum(found[name]), len(found[name])
        print(f"{total / STEPS / 1e3:8.3f} ms {launches / STEPS:7.1f} launches of {total / launches:8.2f} us  {name}")


if __name__ == "__main__":
    main()
