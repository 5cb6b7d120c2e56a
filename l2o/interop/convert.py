"""From a file of another project to a checkpoint of ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from l2o.checkpoints import store
from l2o.checkpoints.pretrained import CARD
from l2o.checkpoints.remote import fetch_weights, is_address
from l2o.checks import lookup
from l2o.disk import user_path
from l2o.interop import pylo
from l2o.interop.files import Foreign, read_foreign
from l2o.interop.recognize import recognize
from l2o.interop.references import REFERENCES
from l2o.types import CheckpointError, ConfigurationError, Theta, UpdateRule


def convert(
    files: Sequence[str | Path],
    to: str | Path,
    licence: str,
    settings: Mapping[str, Any] | None = None,
    name: str | None = None,
) -> Path:
    """Write the learned optimizer in ``files`` to the checkpoint ``to``, a folder, which is returned.

    files: one of flax's, or of PyLO's (safetensors, or PyTorch's own); both of VeLO's networks there. A string may be
        an address, pinned as for `l2o.load`: ``"hf:owner/name@commit/theta.state"``, where without a file the usual
        names are tried, or ``"https://host/theta.state#sha256=…"``, the SHA-256 of the file.
    licence: under which the weights are given, an SPDX expression where there is one; it goes onto the card.
    settings: hyperparameters that the tensors do not tell, under the original's names, such as ``{"step_mult": 0.01}``,
        and for weights of µLO ``{"mup": True}``; and meta-parameters that PyLO does not keep in its files, such as
        ``{"momentum_decays": [0, 0, 0]}``, in place of the values that PyLO itself would take.
    name: of an entry of `REFERENCES`, where several have these tensors; by default the first one that has. Where none
        has, the error says what keeps them from being this one.

    The card says where θ comes from: ``origin`` has the original's name, others with these tensors, the settings, and
    of each file name, address, size and SHA-256.
    Raises `CheckpointError` (a file that cannot be read, tensors of nothing that is known here, a setting that the
    optimizer does not have), `DownloadError`, and `ConfigurationError` (an address without a pin, a licence that is
    none, a setting's value that makes no sense, a folder that has a checkpoint already).
    """
    folder = user_path(to, "to")
    if not licence.strip():
        raise ConfigurationError(f"licence={licence!r}: expected the one that the weights' owner gives, such as MIT")
    if (folder / CARD).exists():
        raise ConfigurationError(f"to={str(to)!r}: a checkpoint is there already; name another folder")
    sources = [_read(file) for file in files]
    tensors = _together(sources)
    beside = {**pylo.assumed(tensors), **(settings or {})}
    theirs, hyper = _with_decays(pylo.original_names(tensors), beside)
    names = _names(theirs, hyper, name)
    chosen = names[0] if name is None else name
    rule, theta = _rebuild(chosen, theirs, hyper)
    others = [each for each in names if each != chosen]
    facts = [source.facts for source in sources]
    return store.save(
        folder,
        rule,
        theta,
        {"licence": licence, "origin": {"name": chosen, "fits_also": others, "settings": beside, "files": facts}},
    )


def _read(file: str | Path) -> Foreign:
    if not is_address(file):
        return read_foreign(file)
    tensors, facts = read_foreign(fetch_weights(str(file)))
    return Foreign(tensors, {"address": str(file), **facts})


def _names(theta: Theta, settings: Mapping[str, Any], name: str | None) -> list[str]:
    """All that the tensors fit; where ``name`` is not among them, what it lacks, or what they are instead."""
    if name is not None:
        lookup("optimizer", name, REFERENCES)
    try:
        names = recognize(theta, settings)
    except CheckpointError:
        if name is not None:
            _rebuild(name, theta, settings)  # raises
        raise
    if name not in (None, *names):
        raise CheckpointError(f"name={name!r}: the tensors are of {' or '.join(names)}; name that, or none")
    return names


def _rebuild(name: str, theta: Theta, settings: Mapping[str, Any]) -> tuple[UpdateRule, Theta]:
    try:
        return REFERENCES[name].rebuild(theta, settings)
    except (TypeError, LookupError) as error:
        raise ConfigurationError(f"settings {dict(settings)}: a value is of a wrong type ({error})") from error


def _together(sources: Sequence[Foreign]) -> Theta:
    tensors: Theta = {}
    for source in sources:
        for name in sorted(tensors.keys() & source.tensors.keys()):
            raise CheckpointError(f"{source.facts['file']}: {name!r} is in another of the files, too; leave one out")
        for name, tensor in source.tensors.items():
            if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
                raise CheckpointError(
                    f"{source.facts['file']}: {name!r} is not made of finite floating-point numbers; meta-training "
                    "diverged, or the file is damaged"
                )
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
