"""Checkpoints of meta-parameters: a folder with ``theta.safetensors`` and ``card.json``.

The card says which rule θ is for, with which hyperparameters, and how it came about. Loading is strict, compares every
byte with the card's checksum, and neither unpickles nor imports anything because a file says so.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

import l2o.rules
from l2o.checkpoints.pretrained import CARD, THETA, Source, is_shipped, read, read_json, resolve
from l2o.checkpoints.pretrained import list_pretrained as list_pretrained
from l2o.checkpoints.pretrained import name_of as name_of
from l2o.checkpoints.remote import fetch_checkpoint, is_address
from l2o.disk import atomic_write, atomic_writes, to_bytes, try_folder, user_path
from l2o.types import CheckpointError, ConfigurationError, Theta, UpdateRule

FORMAT_VERSION = 1
"""Of the card; to be raised when a checkpoint of today could no longer be read."""

Card = dict[str, Any]

_OWN = ("format_version", "rule", "hyperparameters", "theta", "versions")
"""The entries of a card that `save` writes itself."""
_REQUIRED: dict[str, type] = {"rule": str, "hyperparameters": dict, "theta": dict}


def save(path: Source, rule: UpdateRule, theta: Theta, card: Mapping[str, Any] | None = None) -> Path:
    """Write a checkpoint and return its folder; one that is there already is replaced.

    path: the folder, made where it is missing.
    theta: finite and with exactly the names and shapes of ``rule.init_theta``; stored as float32.
    card: more entries for ``card.json``, whatever JSON can hold: recipe, data, seeds, hardware, compute, results,
        licence. Numbers that are not finite are written as Python's ``json`` does: ``NaN``, ``Infinity``.

    Both are on disk before the first is replaced, atomically, θ first: a disk that is full leaves the old checkpoint,
    and if the machine stops between the two, `load` says so by the checksum.
    Raises `CheckpointError` (θ is not of this rule, or not finite) or `ConfigurationError` (what the card cannot hold),
    before anything is written, and OSError where the disk does not take the files.
    """
    single = {name: tensor.to(torch.float32) for name, tensor in check_theta(rule, theta).items()}
    data = to_bytes(check_theta(rule, single))  # again: float64 has larger numbers than float32
    text = _card_text(rule, data, card or {})
    folder = user_path(path)
    atomic_writes({folder / THETA: data, folder / CARD: text.encode()})
    return folder


def annotate(source: Source, entries: Mapping[str, Any]) -> None:
    """Add entries to a checkpoint's card, or replace those that are there: measured results, a licence. θ stays.

    Errors as for `load`, `ConfigurationError` for entries that are `save`'s own or that JSON cannot hold and for a
    checkpoint at an address or one that came with l2o, and OSError where the disk does not take the card.
    """
    folder = _own_folder(source)
    card = _read_card(folder)
    own = {key: card.pop(key) for key in _OWN if key in card}
    atomic_write(folder / CARD, _to_json(own, {**card, **entries}).encode())


def check_writable(source: Source) -> None:
    """See whether `annotate` could write a card, before there is anything to write.

    Errors as for `load`, and `ConfigurationError` where the folder takes no files, is a copy of what is elsewhere, or
    came with l2o.
    """
    folder = _own_folder(source)
    try:
        try_folder(folder)
    except OSError as error:
        raise ConfigurationError(
            f"source={os.fspath(source)!r}: its card in {folder} cannot be written ({error.strerror}); "
            "copy the folder to where you may write, and name the copy"
        ) from error


def load(source: Source, rules: Sequence[type[UpdateRule]] = ()) -> tuple[UpdateRule, Theta]:
    """Return the rule of a checkpoint and its θ, float32 on the CPU.

    source: the name of a pretrained checkpoint (`list_pretrained`, or ``"default"``), or the path of a checkpoint's
        folder or of the ``theta.safetensors`` in it. A string that is both is the folder, if that has a ``card.json``;
        a `pathlib.Path` is always a path. Or an address, whose files are fetched once and compared with its pin:
        ``"https://host/folder#sha256=…"``, the SHA-256 of its ``card.json``, which holds that of θ; or
        ``"hf:owner/name@commit"``, a repository of huggingface.co (or of ``$HF_ENDPOINT``) at a full commit. One that
        has no pin is refused unless it ends in ``#unpinned``, which keeps what is there the first time. The files lie
        in ``checkpoints`` in ``$L2O_CACHE_DIR``, else in ``l2o`` of ``$XDG_CACHE_HOME`` or of ``~/.cache``.
    rules: classes that the card may name besides those of `l2o.rules`; of two with one name, the one given here counts.
        Hyperparameters that the card does not mention, because the rule got them later, have their defaults.

    Raises `UnknownNameError` (no such name or path), `ConfigurationError` (an address that has no pin, or is none),
    `DownloadError` (nothing there, or something else) and `CheckpointError` (missing, damaged or truncated files,
    another format version, a rule that is not known here, θ of another rule).
    """
    folder = _folder(source)
    card = _read_card(folder)
    rule = _make_rule(folder, card, known_rules(rules))
    return rule, check_theta(rule, _read_theta(folder, card["theta"]), f"{folder}: ")


def read_card(source: Source) -> Card:
    """Return the content of a checkpoint's ``card.json``; ``source`` and errors as for `load`. θ is not looked at."""
    return _read_card(_folder(source))


def check_theta(rule: UpdateRule, theta: Theta, where: str = "") -> Theta:
    """Return ``theta`` in the order of ``rule.init_theta``, by which outer optimizers number the tensors; files have
    none.

    where: put before the message.
    Raises `CheckpointError`, naming the tensor, unless ``theta`` is finite and has the names and shapes of ``rule``.
    """
    expected = rule.init_theta(torch.Generator())
    for name in sorted(expected.keys() | theta.keys(), key=str):
        problem = _misfit(theta.get(name), expected.get(name))
        if problem:
            raise CheckpointError(f"{where}θ is not one of {rule!r}: tensor {name!r} {problem}")
    return {name: theta[name] for name in expected}


def _folder(source: Source) -> Path:
    return fetch_checkpoint(os.fspath(source)) if is_address(source) else resolve(source)


def _own_folder(source: Source) -> Path:
    """The folder of a checkpoint whose card is the user's to write."""
    folder = _folder(source)
    if is_address(source):
        raise ConfigurationError(
            f"source={source!r}: its card stays as it was published; copy the folder {folder}, and name the copy"
        )
    if is_shipped(folder):
        raise ConfigurationError(
            f"source={os.fspath(source)!r}: it was installed with l2o, and its card is not written to; copy the folder "
            f"{folder}, and name the copy"
        )
    return folder


def _misfit(found: Any, expected: Tensor | None) -> str:
    """What is wrong with a tensor of θ, or nothing."""
    if found is None:
        return "is missing; θ was saved by another rule"
    if expected is None:
        return "is unexpected; θ was saved by another rule"
    if not isinstance(found, Tensor):
        return f"is of type {type(found).__name__}, expected a torch.Tensor"
    if found.shape != expected.shape:
        return f"has shape {tuple(found.shape)}, expected {tuple(expected.shape)}; θ was saved by another rule"
    if not found.is_floating_point() or not bool(found.isfinite().all()):
        return "is not made of finite floating-point numbers; meta-training diverged, or the file is damaged"
    return ""


def _card_text(rule: UpdateRule, data: bytes, entries: Mapping[str, Any]) -> str:
    own: Card = {
        "format_version": FORMAT_VERSION,
        "rule": type(rule).__name__,
        "hyperparameters": _hyperparameters(rule),
        "theta": {"file": THETA, "sha256": hashlib.sha256(data).hexdigest(), "size": len(data)},
        "versions": {"l2o": _version(), "torch": str(torch.__version__)},
    }
    return _to_json(own, entries)


def _to_json(own: Card, entries: Mapping[str, Any]) -> str:
    taken = sorted(entries.keys() & set(_OWN))
    if taken:
        raise ConfigurationError(f"card: {taken} are written by l2o.save itself; give these entries other names")
    try:
        return json.dumps({**own, **entries}, indent=2, ensure_ascii=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"card: {error}; expected dicts, lists, strings and numbers only") from error


def _hyperparameters(rule: UpdateRule) -> dict[str, Any]:
    """The fields of ``rule``, made sure to give the same rule again once they have been JSON."""
    if not dataclasses.is_dataclass(rule):
        raise ConfigurationError(f"rule={rule!r}: expected a frozen dataclass whose fields are its hyperparameters")
    fields = dataclasses.asdict(rule)
    try:
        again = type(rule)(**_from_json(type(rule), json.loads(json.dumps(fields))))
    except (TypeError, ValueError) as error:
        raise ConfigurationError(
            f"rule={rule!r}: its hyperparameters do not fit into JSON ({error}); use numbers, strings and tuples"
        ) from error
    if again != rule:
        raise ConfigurationError(f"rule={rule!r} would be read back as {again!r}; use numbers, strings and tuples")
    return fields


def _from_json(cls: type[UpdateRule], values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has only lists; frozen dataclasses want tuples, so that is what they become unless the default is a list."""
    return {k: v if isinstance(_default(cls, k), list) else _as_tuple(v) for k, v in values.items()}


def _default(cls: type[UpdateRule], name: str) -> Any:
    field = cls.__dataclass_fields__[name]  # type: ignore[attr-defined]
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _as_tuple(value: Any) -> Any:
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value


def _version() -> str:
    try:
        return importlib.metadata.version("l2o")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"


def _read_card(folder: Path) -> Card:
    path = folder / CARD
    card = read_json(path)
    version = card.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format_version is {version!r}, this l2o reads {FORMAT_VERSION}; install the l2o that wrote it"
        )
    for key, kind in _REQUIRED.items():
        if not isinstance(card.get(key), kind):
            raise CheckpointError(f"{path}: expected an entry {key!r} of type {kind.__name__}, got {card.get(key)!r}")
    return card


def known_rules(extra: Sequence[type[UpdateRule]] = ()) -> dict[str, type[UpdateRule]]:
    """Return rules by the name that a card gives them: those of `l2o.rules` and ``extra``, which replaces what it
    names."""
    if isinstance(extra, type) or not all(_is_rule(c) for c in extra):
        raise ConfigurationError(f"rules={extra!r}: expected a list of dataclasses that derive from UpdateRule")
    built_in = {name: getattr(l2o.rules, name) for name in l2o.rules.__all__}
    return {**built_in, **{cls.__name__: cls for cls in extra}}


def _is_rule(cls: object) -> bool:
    return isinstance(cls, type) and issubclass(cls, UpdateRule) and dataclasses.is_dataclass(cls)


def _make_rule(folder: Path, card: Card, known: Mapping[str, type[UpdateRule]]) -> UpdateRule:
    name, values = card["rule"], card["hyperparameters"]
    if name not in known:
        raise CheckpointError(
            f"{folder}: rule {name!r} is not known here; known are {', '.join(sorted(known))}. "
            f"If it is your own, hand its class over: rules=[{name}]"
        )
    fields = {field.name for field in dataclasses.fields(known[name]) if field.init}  # type: ignore[arg-type]
    if values.keys() - fields:
        raise CheckpointError(
            f"{folder}: {name} has no hyperparameter {sorted(values.keys() - fields)}, only {sorted(fields)}; "
            "the card is damaged or of another version of the rule"
        )
    try:
        rule = known[name](**_from_json(known[name], values))
        rule.init_theta(torch.Generator())
    except Exception as error:  # whatever a rule may raise on values that it was not made for
        raise CheckpointError(f"{folder}: {name} does not accept the hyperparameters {values}: {error}") from error
    return rule


def _read_theta(folder: Path, entry: Mapping[str, Any]) -> Theta:
    path = folder / THETA
    data = read(path)
    found = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    for key, value in found.items():
        if entry.get(key) != value:
            raise CheckpointError(
                f"{path}: {key} is {value}, the card says {entry.get(key)}; the file is damaged, or was saved without "
                "its card or by another rule; copy the checkpoint again, or save it again"
            )
    try:
        theta: dict[str, Tensor] = safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError, LookupError) as error:
        raise CheckpointError(f"{path}: not a safetensors file ({error}); save the checkpoint again") from error
    for name, tensor in theta.items():
        if tensor.dtype != torch.float32:
            raise CheckpointError(f"{path}: tensor {name!r} is {tensor.dtype}, expected torch.float32")
    return theta
