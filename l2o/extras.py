"""The packages that only reports need, from the extra ``train``."""

from __future__ import annotations

import importlib

from l2o.types import ConfigurationError


def require(*packages: str) -> None:
    """Raise `ConfigurationError`, which names the extra to install, unless all ``packages`` can be imported."""
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ConfigurationError(
                f"{package} cannot be imported ({error}); reports need: pip install 'l2o[train]'"
            ) from error
