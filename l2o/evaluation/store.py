"""Curves that are run once ever: append-only files, each curve by a digest of what it belongs to (see `identity`)."""

from __future__ import annotations

import io
import json
import math
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from l2o.disk import atomic_write
from l2o.evaluation.entrants import Entrant
from l2o.evaluation.identity import curve_key, digest
from l2o.evaluation.scores import Kept
from l2o.evaluation.trials import Array, Setting
from l2o.types import ConfigurationError, ResumeError

FORMAT = 1
"""Of the files; to be raised when one of today could no longer be read."""
_ARRAYS = ("train", "peak", "valid", "accuracy")
_BITS = {"train": 11, "peak": 6, "valid": 11, "accuracy": 11}
"""Of 23 in the mantissa of a loss that are kept: three significant digits, of a peak two, and half the bytes."""


class Record(NamedTuple):
    """One curve.

    facts: what people may want to know: suite, task, optimizer, rate, seed, seconds; of a time-out also ``timed_out``,
        the seconds that it was allowed.
    steps, valid_steps: as in `Kept`.     curves: train, peak, valid and, where there is one, accuracy, of one run.
    """

    facts: Mapping[str, Any]
    steps: list[int]
    valid_steps: list[int]
    curves: Mapping[str, Array]


class Store:
    """All curves in ``folder``, to which it appends, and in ``bases``, folders that it only reads.

    Raises `ResumeError` for a file that is damaged or of another format.
    """

    def __init__(self, folder: Path, bases: Iterable[Path] = ()) -> None:
        self.folder = folder
        self._records: dict[str, Record] = {}
        self._seen: set[Path] = set()
        for each in (*bases, folder):
            self._read(each)

    def __len__(self) -> int:
        return len(self._records)

    def _read(self, folder: Path) -> None:
        for path in sorted(set(folder.glob("*.npz")) - self._seen):
            for key, record in read(path).items():
                if key not in self._records or _limit(record) >= _limit(self._records[key]):
                    self._records[key] = record
            self._seen.add(path)

    def refresh(self) -> None:
        """Read what other processes have added."""
        self._read(self.folder)

    def lacking(self, suite: str, setting: Setting, entrant: Entrant) -> list[float | None]:
        """Return the learning rates of which a seed is missing, or was ended sooner than the setting's time-out has
        it."""

        def has(key: str) -> bool:
            return key in self._records and _limit(self._records[key]) >= (setting.timeout or math.inf)

        return [rate for rate in entrant.rates if not all(map(has, _keys(suite, setting, entrant, rate)))]

    def add(self, suite: str, setting: Setting, entrant: Entrant, kept: Kept) -> Path:
        """Append the curves of some or all learning rates, those of ``kept``; atomically, in a file of their own."""
        records = {
            key: _record(suite, setting, kept, trial, seed)
            for trial, rate in enumerate(kept.rates)
            for seed, key in enumerate(_keys(suite, setting, entrant, rate))
        }
        self._records.update(records)
        path = write(self.folder, records)
        self._seen.add(path)
        return path

    def kept(self, suite: str, setting: Setting, entrant: Entrant) -> Kept:
        """Return all trials of an optimizer. Raises `ConfigurationError` where some are missing."""
        if self.lacking(suite, setting, entrant):
            raise ConfigurationError(f"{setting.name}: {entrant.label} has not been run; run the suite first")
        rows = [[self._records[k] for k in _keys(suite, setting, entrant, rate)] for rate in entrant.rates]
        first = rows[0][0]
        names = [name for name in _ARRAYS if all(name in r.curves for row in rows for r in row)]
        curves = {n: np.stack([np.stack([r.curves[n] for r in row], 1) for row in rows], 2) for n in names}
        timed_out = np.array([[_limit(r) < math.inf for r in row] for row in rows]).T
        return Kept(
            label=entrant.label,
            rates=entrant.rates,
            steps=first.steps,
            valid_steps=first.valid_steps,
            seconds=sum(r.facts["seconds"] for row in rows for r in row),
            relative_step=first.facts["relative_step"],
            timed_out=timed_out if timed_out.any() else None,
            **{name: curve.astype(np.float64) for name, curve in curves.items()},
        )

    def records(self) -> Iterator[dict[str, Any]]:
        """Return every curve as a plain dict, for a table or for pandas: facts, final losses, and the curve itself."""
        for record in self._records.values():
            ends = {"final": "train", "valid_final": "valid", "accuracy_final": "accuracy"}
            finals = {name: float(record.curves[of][-1]) for name, of in ends.items() if of in record.curves}
            yield {**record.facts, **finals, "steps": record.steps, "valid_steps": record.valid_steps, **record.curves}

    def pack(
        self, folder: Path, suite: str, settings: Iterable[Setting], entrants: Mapping[str, Entrant]
    ) -> list[Path]:
        """Write the curves of a suite, a file an optimizer, into ``folder``: what is committed, or handed on."""
        paths = []
        for name, entrant in entrants.items():
            keys = [k for s in settings for rate in entrant.rates for k in _keys(suite, s, entrant, rate)]
            paths.append(write(folder, {key: self._records[key] for key in keys if key in self._records}, name))
        return paths


def _limit(record: Record) -> float:
    """The seconds after which a curve was ended; infinity for a whole one."""
    return float(record.facts.get("timed_out", math.inf))


def _record(suite: str, setting: Setting, kept: Kept, trial: int, seed: int) -> Record:
    facts = {
        "suite": suite,
        "revision": setting.revision,
        "task": setting.name,
        "optimizer": kept.label,
        "rate": kept.rates[trial],
        "seed": seed,
        "seconds": round(kept.seconds / (setting.seeds * len(kept.rates)), 3),
        "relative_step": kept.relative_step,
    }
    if kept.timed_out is not None and kept.timed_out[seed, trial]:
        facts["timed_out"] = setting.timeout
    whole = {name: getattr(kept, name) for name in _ARRAYS if getattr(kept, name) is not None}
    curves = {name: _rounded(curve[:, seed, trial], _BITS[name]) for name, curve in whole.items()}
    return Record(facts, kept.steps, kept.valid_steps, curves)


def _keys(suite: str, setting: Setting, entrant: Entrant, rate: float | None) -> list[str]:
    return [curve_key(suite, setting, entrant, rate, seed) for seed in range(setting.seeds)]


def write(folder: Path, records: Mapping[str, Record], name: str = "") -> Path:
    """Write one file of curves: an array for all of one kind and length.  name: of the file; without, that of its
    content."""
    alike: dict[tuple[Any, ...], list[str]] = {}
    for key, record in records.items():
        alike.setdefault((*record.curves, record.steps[-1]), []).append(key)
    arrays: dict[str, Array] = {}
    groups = []
    for i, keys in enumerate(alike.values()):
        first = records[keys[0]]
        arrays |= {f"{i}.{name}": np.stack([records[k].curves[name] for k in keys]) for name in first.curves}
        facts = {key: dict(records[key].facts) for key in keys}
        groups.append({"steps": first.steps, "valid_steps": first.valid_steps, "facts": facts})
    header = json.dumps({"format": FORMAT, "groups": groups}).encode()
    path = folder / f"{name or digest(sorted(records))}.npz"
    atomic_write(path, _zipped({"header": np.frombuffer(header, np.uint8), **arrays}))
    return path


def _zipped(arrays: Mapping[str, Array]) -> bytes:
    """As `numpy.savez` has it, a third smaller, and the same bytes for the same arrays."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        for name, array in arrays.items():
            entry = zipfile.ZipInfo(f"{name}.npy")  # without the time of day
            entry.compress_type = zipfile.ZIP_LZMA
            with file.open(entry, "w") as written:
                np.lib.format.write_array(written, array, allow_pickle=False)
    return out.getvalue()


def read(path: Path) -> dict[str, Record]:
    """Return the curves of a file, by key. Raises `ResumeError`, which says that it may be deleted."""
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            header = json.loads(file["header"].tobytes())
            if header["format"] != FORMAT:
                raise ResumeError(
                    f"{path} has format {header['format']!r}, this l2o reads {FORMAT}: use the l2o that wrote it"
                )
            return dict(_unpacked(header["groups"], file))
    except ResumeError:
        raise
    except Exception as error:  # whatever zip, compression, NumPy and JSON have against it
        raise ResumeError(
            f"{path} is damaged ({error}); delete it, and the same command runs its curves again"
        ) from error


def _unpacked(groups: Sequence[Mapping[str, Any]], file: Mapping[str, Array]) -> Iterator[tuple[str, Record]]:
    for i, group in enumerate(groups):
        stacked = {name: file[f"{i}.{name}"] for name in _ARRAYS if f"{i}.{name}" in file}
        for row, (key, facts) in enumerate(group["facts"].items()):
            yield key, Record(facts, group["steps"], group["valid_steps"], {n: a[row] for n, a in stacked.items()})


def _rounded(losses: Array, kept: int) -> Array:
    """float32 with so many bits of mantissa, to the nearest; what is not finite stays so."""
    with np.errstate(over="ignore"):
        bits = losses.astype(np.float32).view(np.uint32)
    drop = np.uint32(23 - kept)
    rounded = ((bits + (np.uint32(1) << (drop - np.uint32(1)))) >> drop) << drop
    return np.where(np.isfinite(losses), rounded, bits).astype(np.uint32).view(np.float32)
