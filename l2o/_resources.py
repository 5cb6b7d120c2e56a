"""Where the data folders of a package lie, in an installed wheel and in a checkout of the repository."""

from __future__ import annotations

from pathlib import Path

from l2o.types import L2OError


def resource(package: Path, name: str) -> Path:
    """The folder ``name`` that travels with a package, such as ``resource(Path(l2o.__file__).parent, "pretrained")``.

    package: the package's folder. A wheel holds the data folder inside it, a checkout beside it.
    Raises `L2OError` where it is in neither place.
    """
    # Inside first: beside an installed package are other people's packages.
    for folder in (package / name, package.parent / name):
        if folder.is_dir():
            return folder
    raise L2OError(
        f"no folder {name!r} in or beside {package}: this installation of {package.name} is incomplete; reinstall it"
    )
