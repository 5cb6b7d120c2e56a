"""``python -m meta_train``."""

from __future__ import annotations

import sys

from meta_train.config.compose import EXTRA, INSTALL

try:
    from meta_train.train import main
except ModuleNotFoundError as error:
    if str(error.name).split(".")[0] not in EXTRA:
        raise
    sys.exit(f"error: {error.name} is not installed; the commands need: {INSTALL}")

main()
