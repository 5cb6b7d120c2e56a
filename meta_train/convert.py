"""Turn weights of others into a checkpoint: ``python -m meta_train.convert hf:owner/name@commit --to FOLDER``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

import l2o
from l2o.checkpoints.remote import is_address
from l2o.interop.convert import convert
from l2o.types import ConfigurationError
from meta_train.config.compose import if_interrupted, main_guard, wrapped, writing


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    made = argparse.ArgumentParser(
        prog="python -m meta_train.convert",
        description="Turn the meta-parameters of a learned optimizer that other code has written into a checkpoint: a "
        "flax theta.state, or state dicts of PyLO (.safetensors, .pt; both files of VeLO). Nothing is unpickled.",
    )
    made.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help="what to read; its tensors say what it is. Or an address: hf:owner/name@COMMIT, with /FILE behind it "
        "where it has none of the usual names, or 'https://host/file#sha256=…'",
    )
    made.add_argument("--to", required=True, metavar="FOLDER", help="where the checkpoint goes")
    made.add_argument(
        "--licence",
        help="under which the weights are given: an SPDX name such as MIT, or a text; an address stands for itself",
    )
    made.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a hyperparameter that the tensors do not tell, as in step_mult=0.01, or mup=true for µLO, or a "
        "meta-parameter that PyLO does not keep in its files, as in 'momentum_decays=[0,0,0]'; may be repeated",
    )
    made.add_argument(
        "--as", dest="name", metavar="NAME", help="which it is: where several have the same tensors, or none has them"
    )
    return made


def setting(text: str) -> tuple[str, Any]:
    """Return ``NAME=VALUE``, the value as in JSON (also True and False) or else a text; raises `ConfigurationError`."""
    name, mark, value = text.partition("=")
    if not name or not mark:
        raise ConfigurationError(f"--set {text}: expected NAME=VALUE")
    try:
        return name, json.loads({"True": "true", "False": "false"}.get(value, value))
    except ValueError:
        return name, value


def run(arguments: Sequence[str] | None = None) -> None:
    """Convert, and say what came out."""
    made = parser()
    given = made.parse_args(arguments)
    if given.licence is None and not all(map(is_address, given.files)):
        made.error("the following arguments are required: --licence")
    licence = given.licence or f"not stated when converted; see {' '.join(given.files)}"
    if_interrupted("no checkpoint was written; the same command goes on, also with a download that broke off")
    with writing(f"to={given.to!r}"):
        folder = convert(given.files, given.to, licence, dict(map(setting, given.set)), given.name)
    rule, theta = l2o.load(folder)
    origin = l2o.read_card(folder)["origin"]
    size = sum(tensor.numel() for tensor in theta.values())
    print(wrapped(f"{origin['name']}: {rule!r}, size of θ: {size:,}, licence: {licence}", 2))
    for name in origin["fits_also"]:
        print(f"  has the same tensors: --as {name}")
    for name, value in origin["settings"].items():
        print(f"  not in the files: {name} = {value}")
    print(f"use it: l2o.LearnedOptimizer(model.parameters(), {str(folder)!r}, total_steps=...)")


@main_guard
def main() -> None:
    """Run the command."""
    run()


if __name__ == "__main__":
    main()
