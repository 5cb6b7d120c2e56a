"""``python -m meta_train.bench``: how fast this machine meta-trains and steps; figures as JSON records."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch

from l2o.bench.engine import Engine, measure, measure_checkpointing, measure_sharing
from l2o.bench.mixture import measure_mixture
from l2o.bench.share import measure_share
from l2o.bench.steps import checked_shapes, measure_steps
from l2o.checkpoints.store import known_rules, load
from l2o.checks import check_each, check_float, check_int, lookup
from l2o.disk import atomic_write, user_path
from l2o.distributed import ranks
from l2o.types import ConfigurationError, Mixture, TaskFamily, UpdateRule
from meta_train.config.assemble import families
from meta_train.config.build import make, refused
from meta_train.config.compose import (
    TRAINING,
    composed,
    config_path,
    if_interrupted,
    main_guard,
    open_settings,
    resolve_device,
    wrapped,
)
from meta_train.run.card import commit, hardware
from meta_train.run.processes import joined

Record = dict[str, Any]
T = TypeVar("T")


@main_guard
def main() -> None:
    """Run the command."""
    import hydra

    sys.argv[1:] = open_settings(sys.argv[1:], ["engines"])
    composed: list[Any] = []
    # Hydra only composes: where what it runs fails, it adds a message of its own.
    compose = hydra.main(version_base="1.3", config_path=config_path(), config_name="bench")
    compose(lambda config: composed.append(config))()
    for config in composed:
        bench(config)


def bench(config: Any) -> list[Record]:
    """Measure what the configuration says, print a line for each record, and write them."""
    from omegaconf import OmegaConf

    plain: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    check_float("seconds", plain["seconds"], above=0.0)
    suite = lookup("suite", plain["suite"], SUITES)
    device = resolve_device(plain["device"])
    out = None if plain["out"] is None else user_path(plain["out"], "out")
    about = {"hardware": hardware(device), "commit": commit(), "date": datetime.date.today().isoformat()}
    records: list[Record] = []
    for record in suite(plain, str(device)):
        if suite is _step and not records:
            print(_row({key: heading for key, (heading, _) in COLUMNS.items()}))
        records.append({**about, **record})
        print(_row(record) if suite is _step else _line(record), flush=True)
        _write(out, records)  # after each, so that an interrupted suite has left what it found
        if out:
            if_interrupted(f"{out} has the first {len(records)} records; the same command measures them anew")
    return records


def _engine(config: Mapping[str, Any], device: str) -> Iterator[Record]:
    with refused("engines"):
        engines = [Engine(**node) for node in config["engines"]]
    for engine in engines:
        with _empty_cache():
            record = _alone(measure, engine, config["seconds"], device, time.time())
        yield record


def _checkpointing(config: Mapping[str, Any], device: str) -> Iterator[Record]:
    check_each("lengths", config["lengths"], check_int)
    for steps in config["lengths"]:
        for checkpoint in (False, True):
            yield _alone(measure_checkpointing, steps, checkpoint, device)


def _sharing(config: Mapping[str, Any], device: str) -> Iterator[Record]:
    with joined():
        for lanes in (64, 64 * ranks().size):  # the same work shared, and as much for each
            record = measure_sharing(lanes, config["seconds"], device)
            if ranks().rank == 0:
                yield record


def _step(config: Mapping[str, Any], device: str) -> Iterator[Record]:
    check_each("threads", config["threads"], check_int)
    check_each("sources", config["sources"], lambda _, source: load(str(source)))
    check_each("rules", config["rules"], lambda at, name: lookup(at, name, known_rules()))
    check_each("shapes", config["shapes"], checked_shapes)
    for network, threads in itertools.product(config["shapes"], config["threads"] or [None]):
        learned = config["sources"], config["rules"]
        yield from _alone(_steps, *learned, network, threads, 5 * config["seconds"], device)


def _share(config: Mapping[str, Any], device: str) -> Iterator[Record]:
    tokens = check_int("tokens", config["tokens"])
    for threads in config["threads"] or [None]:
        yield _alone(_shares, tokens, threads)


def _mixture(config: Mapping[str, Any], device: str) -> Iterator[Record]:
    lanes, steps, rounds = (check_int(name, config[name]) for name in ("lanes", "steps", "rounds"))
    check_each("threads", config["threads"], check_int)
    from omegaconf import OmegaConf

    with refused("recipe"):
        overrides = [f"experiment={config['recipe']}", *config["recipe_settings"]]
        node: Any = OmegaConf.to_container(composed("train", open_settings(overrides, TRAINING)), resolve=True)
    rule, problems = make(node["rule"], "rule", UpdateRule), make(node["task"], "task", TaskFamily, Mixture)
    before = torch.get_num_threads()
    try:
        for threads in config["threads"] or [before]:
            torch.set_num_threads(threads)
            for record in measure_mixture(rule, families(problems), lanes, steps, rounds, device):
                yield {"recipe": config["recipe"], **record}
    finally:
        torch.set_num_threads(before)


def _shares(tokens: int, threads: int | None) -> Record:
    if threads is not None:
        torch.set_num_threads(threads)
    return measure_share("default", tokens)


def _steps(
    sources: list[Any], rules: list[str], network: Any, threads: int | None, seconds: float, device: str
) -> list[Record]:
    """Records of one network, in a process whose number of threads they are free to set.

    rules: classes that are measured with their defaults and a random θ, besides ``sources``.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    about = {"hardware": hardware(torch.device(device)), "load": _load()}
    learned = {source: load(source) for source in map(str, sources)}
    fresh = {name: known_rules()[name]() for name in rules}
    learned |= {name: (rule, rule.init_theta(torch.Generator().manual_seed(0))) for name, rule in fresh.items()}
    found = measure_steps(learned, network, seconds, device)
    return [{**record, **about} for record in found]


def _load() -> float | None:
    """How many processes wanted to run here in the last minute, on the mean; None where nobody counts them."""
    return round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None


SUITES: dict[str, Callable[[Mapping[str, Any], str], Iterator[Record]]] = {
    "engine": _engine,
    "checkpointing": _checkpointing,
    "sharing": _sharing,
    "step": _step,
    "share": _share,
    "mixture": _mixture,
}
COLUMNS = {
    "shapes": ("shapes", 11),
    "threads": ("thr", 3),
    "rule": ("rule", 16),
    "path": ("path", 7),
    "ns_per_parameter": ("ns/par", 7),
    "ratio_to_fused_adamw": ("x AdamW", 7),
    "ratio_to_muon": ("x Muon", 6),
    "state_bytes_per_parameter": ("state", 5),
    "scratch_bytes_per_parameter": ("scratch", 7),
}
"""Of the table of suite=step: heading and width."""


def _alone(work: Callable[..., T], *arguments: Any) -> T:
    """``work`` in a process of its own, whose memory is its alone."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: Ctrl-C is this process' to answer
        try:
            started = pool.submit(work, *arguments)
        finally:
            signal.signal(signal.SIGINT, before)
        try:
            return started.result()
        except KeyboardInterrupt:
            for child in multiprocessing.active_children():
                child.terminate()
            raise


@contextlib.contextmanager
def _empty_cache() -> Iterator[None]:
    """As on a machine that has never compiled the kernels."""
    before = os.environ.get("L2O_CACHE_DIR")
    with tempfile.TemporaryDirectory() as cache:
        os.environ["L2O_CACHE_DIR"] = cache
        try:
            yield
        finally:
            del os.environ["L2O_CACHE_DIR"]
            if before is not None:
                os.environ["L2O_CACHE_DIR"] = before


def _write(out: Path | None, records: list[Record]) -> None:
    if out is None or not records:
        return
    try:
        atomic_write(out, (json.dumps(records, indent=2) + "\n").encode())
    except OSError as error:
        raise ConfigurationError(f"out={out} cannot be written ({error.strerror}); name another file") from error


def _line(record: Record) -> str:
    """A paragraph; what belongs to a number stays on its line."""
    items = (f"{key} {_show(value)}" for key, value in record.items() if not isinstance(value, list))
    return wrapped("  ".join(item if "(" in item else item.replace(" ", "\0") for item in items), 2).replace("\0", " ")


def _row(record: Record) -> str:
    """A line of the table of steps; memory is in bytes a parameter."""
    return " ".join(f"{_show(record[key]):{width}.{width}}" for key, (_, width) in COLUMNS.items()).rstrip()


def _show(value: Any) -> str:
    if isinstance(value, dict):
        return "(" + ", ".join(f"{key} {_show(each)}" for key, each in value.items()) + ")"
    return (
        f"{value:,.3g}"
        if isinstance(value, float) and abs(value) < 100
        else (f"{value:,.0f}" if isinstance(value, float) else str(value))
    )


if __name__ == "__main__":
    main()
    sys.exit()
