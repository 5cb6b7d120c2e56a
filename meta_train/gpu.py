"""``python -m meta_train.gpu``: check and measure l2o on this machine's GPU, in eight minutes; a record as JSON.

Needs torch, Triton, numpy, safetensors and scikit-learn alone. Without a GPU it does the same, smaller, on the CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import importlib.metadata
import json
import os
import platform
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch

from l2o.bench import gpu, language
from l2o.bench.checks import CHECKS
from l2o.bench.share import Decoder
from l2o.bench.steps import Shapes
from l2o.checkpoints.store import list_pretrained, load
from l2o.disk import atomic_write
from meta_train.config.compose import main_guard, resolve_device, writing
from meta_train.run.card import commit, hardware

MINUTES = 8.0
_LAST = 2.0
"""Seconds of the run that no step is given."""
_MUCH = 10**8
"""Bytes that are worth a search for them, which takes a tenth of a second."""


class Step(NamedTuple):
    """name: in the record.     seconds: which it is not begun without.     work: returns its figures."""

    name: str
    seconds: float
    work: Callable[[], dict[str, Any]]


class Sizes(NamedTuple):
    """networks: of `measure_steps`, by size.     seconds: of a block of calls.     job: seconds of meta-training.

    decoder: of the language model, which is trained for ``steps`` steps of ``sequences``, see `language.train`.
    """

    networks: dict[str, str | Shapes]
    lanes: tuple[int, ...]
    seconds: float
    job: float
    decoder: Decoder
    steps: int
    sequences: tuple[int, int]


FULL = Sizes(
    {"1M": "transformer", "25M": "transformer-512", "124M": "gpt2-small"},
    (64, 512, 4096),
    0.3,
    60.0,
    Decoder(),
    100,
    (16, 4),
)
SMALL = Sizes({"small": [(16, 8), (8,)]}, (2, 4), 0.01, 1.0, Decoder(64, 8, 16, 1, 2), 10, (2, 2))


class Run:
    """A record on disk, written after each step; what fails, or does not fit into the time, is in it too."""

    def __init__(self, path: Path, about: dict[str, Any], deadline: float) -> None:
        self.path, self.record, self.deadline = path, {**about, "finished": False, "steps": []}, deadline
        self._write()

    def step(self, step: Step, device: torch.device) -> None:
        """Takes one step, but for errors of its own; at most until the deadline, on the clock of `time.monotonic`."""
        left, began = self.deadline - time.monotonic() - _LAST, time.monotonic()
        entry: dict[str, Any] = {"name": step.name, "status": "interrupted"}
        try:
            if left < step.seconds:
                raise gpu.LeftOut(f"{left:.0f} s are left, expected {step.seconds:g}")
            with _limited(left):
                entry |= {**step.work(), "status": "ok"}
        except gpu.LeftOut as error:
            entry |= {"status": "left out", "error": str(error)}
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            said = f"{type(error).__name__}: {error}"[:2000]
            entry |= {"status": "failed", "error": said, "where": f"{Path(where.filename).name}:{where.lineno}"}
        finally:  # also where somebody stops the run
            self.record["steps"].append({**entry, "seconds": time.monotonic() - began})
            self._write()
            print(f"{entry['status']:>11}  {step.name}  {entry.get('error', '')}", flush=True)
        _tidy(device)

    def finish(self) -> int:
        """Return how many steps failed."""
        self.record["finished"] = True
        self._write()
        return sum(step["status"] == "failed" for step in self.record["steps"])

    def _write(self) -> None:
        with writing(f"--out {self.path}"):
            atomic_write(self.path, (json.dumps(self.record, indent=2) + "\n").encode())


@contextlib.contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in here once so much time has passed, as soon as the interpreter is back from C."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"stopped after {seconds:.0f} s, which were all that was left")

    if sys.platform == "win32":  # it has no alarm
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def _tidy(device: torch.device) -> None:
    """What a step has left of memory, after an error too, is not there for the next."""
    if device.type == "cuda":
        with contextlib.suppress(RuntimeError):  # of a device that is lost; the next step will say so
            if torch.cuda.memory_allocated(device) > _MUCH:
                gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)


def steps(device: torch.device, sizes: Sizes) -> Iterator[Step]:
    """Return all of them, what matters most and what is safest first."""
    for name, check in CHECKS.items():
        yield Step(f"check: {name}", 2.0, partial(check, device))
    sources = {name: load(name) for name in list_pretrained()}
    for (size, network), (name, source) in product(sizes.networks.items(), sources.items()):
        yield Step(f"optimizer: {name}, {size}", 3.0, partial(gpu.step, source, network, device))
    for (size, network), name in product(sizes.networks.items(), ("default", "light")):
        yield Step(f"optimizer: {name}, {size}, graph", 5.0, partial(gpu.graph_step, load(name), network, device))
    yield Step("main job", sizes.job + 5.0, partial(gpu.main_job, sizes.job, device))
    for name in language.OPTIMIZERS:
        work = partial(language.train, name, sizes.decoder, sizes.steps, sizes.sequences, device)
        yield Step(f"language model: {name}", 20.0, work)
    for lanes, setup in product(sizes.lanes, ("pes", "tbptt")):
        yield Step(f"engine: {setup}, {lanes} lanes", 10.0, partial(gpu.engine, setup, lanes, sizes.seconds, device))
    for variant, lanes in product(gpu.VARIANTS, sizes.lanes):
        work = partial(gpu.inner_steps, variant, lanes, sizes.seconds, device)
        yield Step(f"inner steps: {variant}, {lanes} lanes", 5.0, work)
    for lanes in sizes.lanes:
        work = partial(gpu.without_kernels, partial(gpu.engine, "pes", lanes, sizes.seconds, device))
        yield Step(f"engine: pes, {lanes} lanes, without kernels", 10.0, work)
    for size, network in sizes.networks.items():
        work = partial(gpu.without_kernels, partial(gpu.step, sources["mlp-digits"], network, device))
        yield Step(f"optimizer: mlp-digits, {size}, without kernels", 5.0, work)
        large = partial(gpu.with_large_blocks, work)
        yield Step(f"optimizer: mlp-digits, {size}, without kernels, large blocks", 5.0, large)


def about(device: torch.device, small: bool) -> dict[str, Any]:
    """Say what figures depend on."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = None
    return {
        "device": device_name(device),
        "hardware": hardware(device),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "triton": triton,
        },
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "small": small,
    }


def device_name(device: torch.device) -> str:
    """Return it as the driver has it; ``cpu`` of a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    made = argparse.ArgumentParser(prog="python -m meta_train.gpu", description=(__doc__ or "").partition(": ")[2])
    made.add_argument("--device", default="auto", help="cuda, cpu, or auto: the GPU where there is one")
    made.add_argument("--small", action="store_true", help="small sizes, which a CPU always gets")
    made.add_argument("--minutes", type=float, default=MINUTES, help="what does not fit is left out (default 8)")
    made.add_argument("--only", type=re.compile, default=re.compile(""), metavar="REGEX", help="of names of steps")
    made.add_argument("--out", type=Path, metavar="FILE", help="the record (default benchmarks/gpu-<name>.json)")
    return made


def run(arguments: Sequence[str] | None = None) -> int:
    """Take all steps, and say what was written; 1 where one of them failed."""
    deadline = time.monotonic()
    given = parser().parse_args(arguments)
    deadline += 60.0 * given.minutes
    device = resolve_device(given.device)
    small = given.small or device.type == "cpu"
    if device.type == "cpu":  # before Triton is imported
        os.environ["TRITON_INTERPRET"] = "1"
    name = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    made = Run(given.out or Path(f"benchmarks/gpu-{name}.json"), about(device, small), deadline)
    for step in steps(device, SMALL if small else FULL):
        if given.only.search(step.name):
            made.step(step, device)
    failed = made.finish()
    print(f"{made.path}: {len(made.record['steps'])} steps, {failed} failed")
    return 1 if failed else 0


@main_guard
def main() -> None:
    """Run the command."""
    sys.exit(run())


if __name__ == "__main__":
    main()
