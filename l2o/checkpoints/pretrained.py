"""Where checkpoints lie: the shelf of pretrained ones, and which folder a name or a path means."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from l2o.checks import unknown
from l2o.disk import resource, user_path
from l2o.types import CheckpointError, ConfigurationError, UnknownNameError

Source = str | os.PathLike[str]

THETA = "theta.safetensors"
CARD = "card.json"


def list_pretrained() -> list[str]:
    """Return the names of the checkpoints that come with l2o, sorted; aliases such as ``default`` are not among
    them."""
    return sorted(card.parent.name for card in _pretrained().glob(f"*/{CARD}"))


def aliases() -> dict[str, str]:
    """Return other names of pretrained checkpoints, such as ``default``, each with the name that it stands for."""
    path = _pretrained() / "aliases.json"
    return read_json(path) if path.is_file() else {}


def is_shipped(folder: Path) -> bool:
    """Say whether this is the folder of a checkpoint that came with l2o, by whatever path."""
    return folder.resolve().parent == _pretrained().resolve()


def resolve(source: Source) -> Path:
    """Return the folder that ``source`` means; its files are not looked at. Raises as `l2o.load` does."""
    if not isinstance(source, str | os.PathLike):
        raise ConfigurationError(f"source={source!r}: expected a name or a path, got {type(source).__name__}")
    text = os.fspath(source)
    try:
        path = user_path(text, "source")
    except ConfigurationError as error:
        raise UnknownNameError(str(error)) from error
    folder = path.parent if path.name == THETA else path
    # A user's own checkpoint comes before one of ours of that name, an unrelated folder does not.
    if text and (folder / CARD).is_file():
        return folder
    named = _named(text) if isinstance(source, str) else None
    if named is not None:
        return named
    if text and folder.is_dir():
        return folder
    raise UnknownNameError(_not_found(text))


def name_of(source: Source) -> str:
    """Return what messages call a checkpoint: a pretrained one by its own name, whatever alias led to it."""
    text = os.fspath(source)
    alias = isinstance(source, str) and text in aliases() and resolve(source).parent == _pretrained()
    return aliases()[text] if alias else text


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; raises `CheckpointError`."""
    data = read(path)  # not within the try: its error is a ValueError too, but of another kind
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({error}); copy the checkpoint again, or save it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def read(path: Path) -> bytes:
    """Return the content of a file of a checkpoint; raises `CheckpointError`."""
    try:
        return path.read_bytes()
    except OSError as error:
        own = path.parent / "checkpoint"
        way_out = f"; take {own}, which is that of this run" if (own / CARD).exists() else ""
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror}); a checkpoint is a folder with {THETA} and {CARD}{way_out}"
        ) from error


def _pretrained() -> Path:
    return resource(Path(__file__).parents[1], "pretrained")


def _named(name: str) -> Path | None:
    """The folder of a pretrained checkpoint, if there is one of that name or alias."""
    name = aliases().get(name, name)
    return _pretrained() / name if name in list_pretrained() else None


def _not_found(name: str) -> str:
    names = unknown("checkpoint", name, {*list_pretrained(), *aliases()})
    return f"{names}; and there is no folder of that name; start with 'default'"
