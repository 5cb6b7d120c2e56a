"""The folder of a run: what it was configured as, how far it is, and whether a command line may continue it."""

from __future__ import annotations

import copy
import hashlib
import json
import re
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml  # type: ignore[import-untyped]

from l2o.disk import atomic_write, load_tree, lock_file, remove_leftovers, save_tree, user_path
from l2o.types import ConfigurationError, ResumeError, RunConflictError
from meta_train.config.compose import writing

VERSION = 2
FREE = ("run", "steps", "device", "logger", "log_every", "checkpoint_every")
"""The keys that may change when a run is continued: neither θ after step k nor the metrics up to k depend on them."""

_KNOWN_TARGET = re.compile(
    r"(l2o\.(rules|tasks|estimators)|torch\.optim|meta_train\.loggers)\.[A-Z]\w*|l2o\.meta\.[a-z]\w*"
    r"|l2o\.Mixture|l2o\.tasks\.image\.image_mlps"
)
"""What a saved configuration may name on its own authority: classes and schedules of this toolkit and torch.optim."""


class Request(NamedTuple):
    """What a command line asks for.

    config: composed and resolved.              choices: the file chosen in each config group.
    explicit: keys and groups that the command line names; the rest of ``config`` are defaults.
    command: the line itself.
    """

    config: dict[str, Any]
    choices: dict[str, Any]
    explicit: tuple[str, ...]
    command: str


class RunFolder:
    """One run on disk: ``config.yaml``, ``state.safetensors`` and the records that other modules write.

    Reads what is there and settles the configuration, but writes nothing before ``begin``.

    config: what the run goes by: the saved configuration where there is one, with the free keys of the request.
    state: of the last checkpoint, None where there is none.        id: names the run, also towards loggers.
    command: the one given now.        header: what ``config.yaml`` says besides, with the command that began the run.
    changed: what it is made of whose source is another than when it began.

    Raises RunConflictError if the request differs from the saved configuration, ResumeError for a damaged folder.
    """

    def __init__(self, request: Request) -> None:
        run = request.config["run"]
        if isinstance(run, list | dict) or not str("" if run is None else run).strip():
            what = "is empty" if not run or isinstance(run, str) else f"is {run}"
            raise ConfigurationError(f"run= {what}; expected the path of a folder")
        self.path = user_path(str(run), "run")
        saved = _read_config(self.path)
        self.command = request.command
        self.id: str = saved["id"] if saved else uuid.uuid4().hex[:8]
        self.config = settle(saved, request) if saved else request.config
        self.state = self._read_state() if saved else None
        first = saved or {"command": request.command, "choices": request.choices}
        self.header = {"version": VERSION, "id": self.id, "command": first["command"], "choices": first["choices"]}
        self._sources = saved.get("sources") if saved else None
        self.changed: list[str] = []

    def compare_sources(self, sources: Mapping[str, str]) -> None:
        """Note which digests of source files, by what they are of, are not those that the run began with: ``changed``.

        A run that has noted none takes these.
        """
        began = self._sources if isinstance(self._sources, dict) else dict(sources)
        self.changed = [name for name, digest in sources.items() if began.get(name, digest) != digest]
        self.header["sources"] = began

    def begin(self) -> None:
        """Make the folder, keep other processes out of it, and write ``config.yaml``."""
        with writing(f"run={self.path}"):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / ".lock").open("w", encoding="utf-8")
        try:
            lock_file(self._lock)
        except OSError as error:
            self._lock.close()
            raise RunConflictError(f"run={self.path}: another process is writing to it; name another") from error
        try:
            self._write_config()
        except BaseException:
            self.end()
            raise

    def _write_config(self) -> None:
        text = yaml.safe_dump({**self.header, "config": self.config}, sort_keys=False, allow_unicode=True)
        with writing(self.path / "config.yaml"):
            for folder in (self.path, *(self.path / name for name in ("start", "checkpoint", "best"))):
                remove_leftovers(folder)
            atomic_write(self.path / "config.yaml", text.encode())

    def end(self) -> None:
        """Let other processes in."""
        self._lock.close()

    def save(self, state: Mapping[str, Any]) -> None:
        """Replace ``state.safetensors``, atomically."""
        path = self.path / "state.safetensors"
        with writing(path):
            save_tree(path, state, {"fingerprint": fingerprint(self.config)})

    def _read_state(self) -> dict[str, Any] | None:
        path = self.path / "state.safetensors"
        if not path.exists():
            return None
        state, metadata = load_tree(path)
        if metadata != {"fingerprint": fingerprint(self.config)}:
            raise ResumeError(
                f"{path} was not saved under the configuration in {self.path / 'config.yaml'}: one of the two was "
                "changed or comes from elsewhere; put the right one back, or start over with another run="
            )
        return state


def settle(saved: dict[str, Any], request: Request) -> dict[str, Any]:
    """Return the configuration to continue with: the saved one, and the request's free keys where the command line has
    them.

    Raises RunConflictError that lists each explicit key which differs, or a saved import path that was not repeated.
    """
    differing = list(_conflicts(saved, request))
    if differing:
        raise RunConflictError(
            f"run={request.config['run']} was started with another configuration:\n  "
            + "\n  ".join(differing)
            + f"\nleave these out to continue it, or name another run= (free to change: {', '.join(FREE[1:])})"
        )
    config = {**request.config, **copy.deepcopy(saved["config"])}
    for key in {"run", *(key.split(".")[0] for key in request.explicit)} & set(FREE):
        config[key] = request.config[key]
    for path, value in _leaves(config):
        _check_leaf(path, value, request)
    return config


def fingerprint(config: Mapping[str, Any]) -> str:
    """Return the hex digest of the part of a configuration that θ and the metrics depend on."""
    bound = {key: value for key, value in config.items() if key not in FREE}
    return hashlib.sha256(json.dumps(bound, sort_keys=True).encode()).hexdigest()


def _conflicts(saved: dict[str, Any], request: Request) -> Iterator[str]:
    for key in dict.fromkeys(request.explicit):
        if key.split(".")[0] in FREE:
            continue
        if key in request.choices:
            old, new = saved["choices"].get(key), request.choices[key]
        else:
            old, new = _lookup(saved["config"], key), _lookup(request.config, key)
        if old != new:
            yield f"{key}: saved {_show(old)}, given {_show(new)}"


def _check_leaf(path: str, value: Any, request: Request) -> None:
    """Nothing is imported, and no variable read, because a file says so."""
    foreign = path.split(".")[-1] == "_target_" and not _KNOWN_TARGET.fullmatch(str(value))
    if (foreign or "${" in str(value)) and _lookup(request.config, path) != value:
        raise RunConflictError(
            f"{request.config['run']}/config.yaml names {value!r}, which is used only where the command line names it "
            f"too: repeat {path}={value}"
        )


def _read_config(folder: Path) -> dict[str, Any] | None:
    path = folder / "config.yaml"
    if not path.exists():
        if folder.exists() and not folder.is_dir():
            raise ResumeError(f"run={folder} is a file; expected a folder, or a name that is free")
        strays = [name for name in ("state.safetensors", "metrics.jsonl") if (folder / name).exists()]
        if strays:
            raise ResumeError(f"run={folder} holds {strays[0]} but no config.yaml; restore it, or name another run=")
        return None
    try:
        saved = yaml.safe_load(path.read_bytes())
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ResumeError(f"{path} is damaged: {error}; restore it, or name another run=") from error
    expected = {"id": str, "command": str, "choices": dict, "config": dict}
    if not isinstance(saved, dict) or any(not isinstance(saved.get(k), t) for k, t in expected.items()):
        raise ResumeError(f"{path} is not the configuration of a run; restore it, or name another run=")
    if saved.get("version") != VERSION:
        raise ResumeError(
            f"{path} has format version {saved.get('version')!r}, this l2o continues runs of version {VERSION}; "
            "continue it with the l2o that began it, or start over with another run="
        )
    return saved


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted path and value of every entry that holds no further ones."""
    if isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, tree


def _lookup(tree: Any, path: str) -> Any:
    """What lies at a dotted path, None where nothing does."""
    for key in path.split("."):
        if isinstance(tree, list):
            tree = dict(zip(map(str, range(len(tree))), tree, strict=True))
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def _show(value: Any) -> str:
    return "unset" if value is None else repr(value)
