"""Held-out evaluation in the course of meta-training: the rule as it stands, beside a tuned Adam."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from l2o.evaluation.baselines import baselines
from l2o.evaluation.scores import Score, score
from l2o.evaluation.trials import Setting, run_baseline, run_learned
from l2o.types import Theta, UpdateRule

Results = dict[str, float | None]


class HeldOut:
    """Tasks, initialisations and batches that meta-training never sees: a random stream of their own, always the same.

    settings: one, or one for each family of a mixture.
    adam: what the best rate of Adam's grid reaches in each, by the setting's name; found once; to be kept with the
        run's state.

    Of images it is new initialisations and batch orders of the meta-training half, whose meta-test half is for final
    reports. Nothing is drawn from the generator of the run.
    """

    def __init__(self, rule: UpdateRule, settings: Sequence[Setting], device: torch.device) -> None:
        self.rule, self.settings, self.device = rule, settings, device
        self.adam: dict[str, Results] | None = None

    def measure(self, theta: Theta) -> Results:
        """Measure seed-means of the final losses, how many seeds of the rule diverged, and the rate of the best Adam.

        Of a mixture each of these by family, as ``name/<family>``, and as ``held_out_loss`` and
        ``held_out_valid_loss`` the geometric means over families of the loss divided by Adam's; see `over_adam` for
        losses that are not positive.
        """
        if self.adam is None:
            self.adam = {setting.name: self._measure_adam(setting) for setting in self.settings}
        each = {s.name: {**self._measure(theta, s), **self.adam[s.name]} for s in self.settings}
        if len(self.settings) == 1:
            return each[self.settings[0].name]
        named = {f"{key}/{name}": value for name, results in each.items() for key, value in results.items()}
        return {
            "held_out_loss": over_adam([(r["held_out_loss"], r["adam_loss"]) for r in each.values()]),
            "held_out_valid_loss": over_adam([(r["held_out_valid_loss"], r["adam_valid_loss"]) for r in each.values()]),
            "held_out_diverged": sum(int(r["held_out_diverged"] or 0) for r in each.values()),
            **named,
        }

    def _measure(self, theta: Theta, setting: Setting) -> Results:
        learned = score(run_learned(self.rule, theta, setting, self.device), setting.smoothing)
        return {
            "held_out_loss": finite(learned.mean),
            "held_out_valid_loss": _valid(learned),
            "held_out_diverged": int(learned.diverged.sum()),
        }

    def _measure_adam(self, setting: Setting) -> Results:
        adam = score(run_baseline(baselines(["adam"])["adam"], setting, self.device), setting.smoothing)
        return {"adam_loss": finite(adam.mean), "adam_valid_loss": _valid(adam), "adam_lr": adam.rate}


def describe(results: Results) -> str:
    """Return one line for people."""
    lost = f", {results['held_out_diverged']} diverged" if results["held_out_diverged"] else ""
    learned = _show(results["held_out_loss"])
    if "adam_loss" in results:
        rate = f" (learning rate {results['adam_lr']:.2g})" if results["adam_loss"] is not None else ""
        return f"held-out loss {learned}{lost}; best-of-grid Adam {_show(results['adam_loss'])}{rate}"
    names = [key.partition("/")[2] for key in results if key.startswith("held_out_loss/")]
    each = (f"{n} {_show(results[f'held_out_loss/{n}'])} ({_show(results[f'adam_loss/{n}'])})" for n in names)
    below = any((results[f"{key}/{name}"] or 0.0) < 0 for key in ("held_out_loss", "adam_loss") for name in names)
    head = f"held-out score {learned} beside" if below else f"held-out loss {learned} ×"
    return f"{head} best-of-grid Adam's{lost}: " + ", ".join(each)


def finite(value: float) -> float | None:
    """Return the value, or None where it is not finite."""
    return value if math.isfinite(value) else None


def over_adam(pairs: Sequence[tuple[float | None, float | None]]) -> float | None:
    """Return one number for several losses beside Adam's: the geometric mean of the quotients where all are positive.

    It falls with every loss, of whatever sign: a quotient is 1 plus the difference in units of the size of Adam's, and
    where one is 0 or less, all together come to less than 0. None where a loss is not to be had.
    """
    quotients = []
    for ours, theirs in pairs:
        if ours is None or theirs is None:
            return None
        quotients.append(ours / theirs if theirs > 0 else 1.0 + (ours - theirs) / (abs(theirs) or 1.0))
    if min(quotients) > 0:
        return math.exp(sum(math.log(q) for q in quotients) / len(quotients))
    return sum(q - 1.0 if q <= 0 else -1.0 / (1.0 + q) for q in quotients) / len(quotients)


def _valid(result: Score) -> float | None:
    return finite(float(result.valid.mean()))


def _show(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"
