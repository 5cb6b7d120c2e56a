"""Held-out evaluation in the course of meta-training: the rule as it stands, beside a tuned Adam."""

from __future__ import annotations

import math
from typing import Any

import torch

from l2o.evaluation.baselines import baselines
from l2o.evaluation.scores import Score, score
from l2o.evaluation.trials import Setting, Trials, run_baseline, run_learned
from l2o.types import Theta, UpdateRule


class HeldOut:
    """Tasks, initialisations and batches that meta-training never sees: a random stream of their own, always the same.

    adam: what the best rate of Adam's grid reaches, found once; to be kept with the run's state.

    Of images it is new initialisations and batch orders of the meta-training half, whose meta-test half is for final
    reports. Nothing is drawn from the generator of the run.
    """

    def __init__(self, rule: UpdateRule, setting: Setting, device: torch.device) -> None:
        self.rule, self.setting, self.device = rule, setting, device
        self.adam: dict[str, float | None] | None = None

    def measure(self, theta: Theta) -> dict[str, float | None]:
        """Seed-means of the final losses, how many seeds of the rule diverged, and the rate of the best Adam."""
        learned = self._score(run_learned(self.rule, theta, self.setting, self.device))
        if self.adam is None:
            adam = self._score(run_baseline(baselines(["adam"])["adam"], self.setting, self.device))
            self.adam = {"adam_loss": finite(adam.mean), "adam_valid_loss": _valid(adam), "adam_lr": adam.rate}
        return {
            "held_out_loss": finite(learned.mean),
            "held_out_valid_loss": _valid(learned),
            "held_out_diverged": int(learned.diverged.sum()),
            **self.adam,
        }

    def _score(self, trials: Trials) -> Score:
        return score(trials, self.setting.smoothing)


def describe(results: dict[str, Any]) -> str:
    """One line for people."""
    learned, adam = (_show(results[name]) for name in ("held_out_loss", "adam_loss"))
    lost = f", {results['held_out_diverged']} diverged" if results["held_out_diverged"] else ""
    rate = f" (learning rate {results['adam_lr']:.2g})" if results["adam_loss"] is not None else ""
    return f"held-out loss {learned}{lost}; best-of-grid Adam {adam}{rate}"


def finite(value: float) -> float | None:
    """The value, or None where it is not finite."""
    return value if math.isfinite(value) else None


def _valid(result: Score) -> float | None:
    return finite(float(result.valid.mean()))


def _show(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"
