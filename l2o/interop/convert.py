"""From a file of another project to a checkpoint of ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from l2o import hub
from l2o._shelf import CARD
from l2o.interop import pylo
from l2o.interop.files import Foreign, read_foreign
from l2o.interop.recognize import recognize
from l2o.types import CheckpointError, ConfigurationError, Theta


def convert(
    files: Sequence[str | Path], to: str | Path, licence: str, settings: Mapping[str, Any] | None = None
) -> Path:
    """Write the learned optimizer in ``files`` to the checkpoint ``to``, a folder, which is returned.

    files: one of flax's, or of PyLO's (safetensors, or PyTorch's own); both of VeLO's networks there.
    licence: under which the weights are given, an SPDX expression where there is one; it goes onto the card.
    settings: hyperparameters that the tensors do not tell, such as ``{"step_mult": 0.01}``, and meta-parameters that
        PyLO does not keep in its files, such as ``{"momentum_decays": [0, 0, 0]}``; both go before what is assumed.

    The card says where θ comes from: the original's name, name, size and SHA-256 of each file, and the settings.
    Raises `CheckpointError` (a file that cannot be read, or whose tensors are of nothing that is known here) and
    `ConfigurationError` (a licence or setting that is none, or a folder that has a checkpoint already).
    """
    folder = Path(to).expanduser()
    if not licence.strip():
        raise ConfigurationError(
            f"licence={licence!r}: expected one, such as MIT or Apache-2.0, as the weights' owner says"
        )
    if (folder / CARD).exists():
        raise ConfigurationError(f"to={str(to)!r}: a checkpoint is there already; name another folder")
    sources = [read_foreign(file) for file in files]
    tensors = _together(sources)
    beside = {**pylo.assumed(tensors), **(settings or {})}
    name, rule, theta = recognize(*_with_decays(pylo.original_names(tensors), beside))
    origin = {"name": name, "files": [source.facts for source in sources], "settings": beside}
    return hub.save(folder, rule, theta, {"licence": licence, "origin": origin})


def _together(sources: Sequence[Foreign]) -> Theta:
    tensors: Theta = {}
    for source in sources:
        twice = tensors.keys() & source.tensors.keys()
        if twice:
            raise CheckpointError(f"{source.facts['file']}: {sorted(twice)[0]!r} is in another of the files, too")
        tensors |= source.tensors
    return tensors


def _with_decays(tensors: Theta, beside: Mapping[str, Any]) -> tuple[Theta, dict[str, Any]]:
    """The tensors, with the meta-parameters among what the files leave out, and the hyperparameters among it."""
    tensors, settings = dict(tensors), dict(beside)
    for name in pylo.DECAYS.keys() & settings.keys():
        if name in tensors:
            raise ConfigurationError(
                f"{name}={settings[name]!r}: the file has this meta-parameter; leave the setting out"
            )
        tensors[name] = _tensor(name, settings.pop(name))
    return tensors, settings


def _tensor(name: str, value: Any) -> Tensor:
    try:
        return torch.tensor(value, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigurationError(f"{name}={value!r}: expected a list of numbers") from error
