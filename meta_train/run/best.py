"""The best θ of a run by a held-out loss: part of the run's state, and a checkpoint of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from l2o.checkpoints.store import load, read_card, save
from l2o.types import ConfigurationError, L2OError, Theta, UpdateRule
from meta_train.config.compose import writing


class Best:
    """Keeps the θ with the lowest loss of all that it is offered.

    folder: of the checkpoint.      key: name of the loss among the results of an evaluation.
    kept: ``loss``, ``theta`` and ``card`` (as JSON) of the best, empty while there is none; part of the run's state.

    A loss that is not finite never counts, nor does one with a diverged run behind it.
    """

    def __init__(self, folder: Path, rule: UpdateRule, key: str) -> None:
        self.folder, self.rule, self.key = folder, rule, key
        self.kept: dict[str, Any] = {}

    @property
    def step(self) -> int:
        """The outer step that the best θ comes from."""
        return self._card()["compute"]["outer_steps"]

    def offer(self, theta: Theta, results: Mapping[str, Any], card: Mapping[str, Any]) -> None:
        """Keep a copy of ``theta``, and write the checkpoint, if this is the best so far; of equals, the first.

        Raises ConfigurationError if the results have no such loss, WriteError where the disk does not take it.
        """
        if self.key not in results:
            raise ConfigurationError(f"evaluation.best_by={self.key!r}: expected one of {', '.join(results)}")
        loss = results[self.key]
        if loss is None or results.get("held_out_diverged") or (self.kept and self.kept["loss"] <= loss):
            return
        copy = {name: tensor.detach().clone() for name, tensor in theta.items()}
        self.kept = {"loss": loss, "theta": copy, "card": json.dumps(card)}
        self._write()

    def restore(self) -> None:
        """Write the checkpoint again unless it is the one kept: the run may have stopped in a later evaluation."""
        if self.kept and not self._is_written():
            self._write()

    def _is_written(self) -> bool:
        try:
            _, theta = load(self.folder, rules=(type(self.rule),))
            same_step = read_card(self.folder).get("compute") == self._card()["compute"]
        except L2OError:
            return False
        return same_step and all(torch.equal(tensor.cpu(), theta[name]) for name, tensor in self.kept["theta"].items())

    def _write(self) -> None:
        with writing(self.folder):
            save(self.folder, self.rule, self.kept["theta"], self._card())

    def _card(self) -> dict[str, Any]:
        return json.loads(self.kept["card"])
