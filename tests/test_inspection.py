"""``python -m meta_train.inspect``: what is said of rules that are known, and that it can be said of every rule."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from tables import SMALL, generator, random_theta
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from training import status

import l2o
from l2o import rules
from l2o.inspection import Inspection, findings, inspect, inspection_png, plots
from l2o.inspection import experiments as inspection_module
from l2o.inspection.experiments import FRACTIONS, PASTS, SPIKES, channel_counts, directions, sensitivity
from l2o.inspection.findings import decay_rate
from l2o.inspection.recording import record
from l2o.rules import LSTM, MLP, SGD, STAR, AdaGrad, Adam, Celo2, Momentum, RMSProp
from l2o.tasks import ImageMLP, Quadratic
from l2o.types import ConfigurationError, Grads, OptState, Params, Run, Theta, UpdateRule
from l2o.unroll import expand_theta, sample_runs, unroll
from meta_train import inspect as command

TINY = ImageMLP(width=3, pool=2, batch_size=16)
STEPS = 20


def look(rule: UpdateRule, steps: int = STEPS, noise: bool = True) -> Inspection:
    theta = random_theta(rule) if noise else rule.init_theta(generator())
    return inspect(rule, {k: t.float() for k, t in theta.items()}, TINY, steps, generator(1), lanes=2, points=5)


def answers(inspection: Inspection) -> dict[str, str]:
    return {finding.topic: finding.answer for finding in findings(inspection)}


@pytest.mark.parametrize("name", rules.__all__)
def test_every_rule_can_be_inspected(name: str) -> None:
    rule = SMALL.get(name) or getattr(rules, name)()
    inspection = look(rule)
    leaves = [x for x in tree_leaves(inspection) if isinstance(x, Tensor)]
    assert all(x.isfinite().all() for x in leaves)
    assert inspection.response.by_past.shape == (len(PASTS), 5)
    assert inspection.response.by_age.shape == (len(FRACTIONS), 5)
    assert all(math.isfinite(value) and value >= 0.0 for value in inspection.sensitivity.values())
    told = findings(inspection)
    assert all(math.isfinite(finding.number) for finding in told)
    assert "nan" not in " ".join(finding.sentence for finding in told)


@pytest.mark.parametrize("rule", [SGD(), SMALL["VeLO"]], ids=["SGD", "VeLO"])
def test_the_picture_takes_what_was_found(rule: UpdateRule) -> None:
    """Two extremes: a rule of which most is 0, and one with more inputs than there are bars."""
    assert inspection_png(look(rule), "title").startswith(b"\x89PNG")


@pytest.mark.parametrize("rule", [Adam(), SMALL["VeLO"]], ids=["Adam", "VeLO"])
def test_what_is_written_in_the_picture(rule: UpdateRule, monkeypatch) -> None:
    """Legends lie within their panels, rules without decay have 0 and not -0, and a run that goes up is seen to."""
    monkeypatch.setattr(plots, "png", lambda figure: figure)
    inspection = look(rule)
    run = inspection.run._replace(
        losses=torch.full_like(inspection.run.losses, 2.0).index_fill(0, torch.tensor(-1), 5e10)
    )
    figure = inspection_png(inspection._replace(run=run), "title")
    figure.canvas.draw()
    for panel in figure.axes:
        if legend := panel.get_legend():
            inside, outside = (artist.get_window_extent() for artist in (legend, panel))
            assert outside.x0 <= inside.x0 < inside.x1 <= outside.x1, panel.get_title()
            assert not any(text.get_text().startswith("-0 p") for text in legend.get_texts())
    assert any("loss 2 to 5e+10;" in text.get_text() for panel in figure.axes for text in panel.texts)


HAND_DESIGNED = {
    "SGD": (SGD(), {"momentum": "no", "clipping": "no", "inputs": "gradient"}),
    "Momentum": (Momentum(), {"momentum": "yes", "clipping": "no", "inputs": "velocity", "step size": "rises"}),
    "RMSProp": (RMSProp(), {"momentum": "no", "clipping": "yes"}),
    "AdaGrad": (AdaGrad(), {"momentum": "no", "clipping": "yes", "step size": "falls"}),
    "Adam": (Adam(), {"momentum": "yes", "clipping": "yes", "inputs": "m", "step size": "steady"}),
}


@pytest.mark.parametrize("name", HAND_DESIGNED)
def test_what_hand_designed_rules_do(name: str) -> None:
    rule, expected = HAND_DESIGNED[name]
    found = answers(look(rule, noise=False))
    assert found == {**found, **expected, "schedule": "no", "decay": "no"}


@pytest.mark.parametrize("rule", [Momentum(momentum=0.7), Adam(beta1=0.7)])
def test_the_share_of_the_past_is_that_of_a_geometric_series(rule: UpdateRule) -> None:
    past = sum(0.7**k for k in range(1, 11))
    share = next(finding.number for finding in findings(look(rule, noise=False)) if finding.topic == "momentum")
    assert share == pytest.approx(past / (1.0 + past), rel=0.01)


def test_sgd_has_its_learning_rate_everywhere() -> None:
    inspection = look(SGD(lr=0.25), noise=False)
    torch.testing.assert_close(inspection.run.rates, torch.full_like(inspection.run.rates, 0.25))
    torch.testing.assert_close(inspection.run.descent, inspection.run.rates)
    torch.testing.assert_close(inspection.spikes, torch.tensor(SPIKES, dtype=torch.float64))
    assert inspection.sensitivity == {"gradient": pytest.approx(1.0), "parameter": 0.0, "clock": 0.0}


@dataclasses.dataclass(frozen=True)
class Decaying(SGD):
    """Gradient descent that is known to have a linear schedule and decay, and clips entries."""

    decay: float = 0.01

    def update(self, theta: Theta, grads: Grads, state: OptState, params: Params, infos, run: Run, reduce=None):
        left = 1.0 - run.step / run.total_steps
        moves = {name: -left * (0.1 * g.clamp(-1.0, 1.0) + self.decay * params[name]) for name, g in grads.items()}
        return moves, state


@pytest.mark.parametrize(("decay", "said"), [(0.02, "yes"), (-0.02, "reversed"), (0.0, "no")])
def test_schedule_clipping_and_decay_are_seen(decay: float, said: str) -> None:
    inspection = look(Decaying(decay=decay), noise=False)
    assert answers(inspection) == {**answers(inspection), "schedule": "yes", "clipping": "yes", "decay": said}
    rate, correlation = decay_rate(inspection)
    assert rate == pytest.approx(decay / 2.0)  # half the run is left
    assert correlation == pytest.approx(np.sign(decay))
    ages = inspection.schedule / inspection.schedule[0]
    expected = [(1.0 - fraction) / (1.0 - FRACTIONS[0]) for fraction in FRACTIONS]
    torch.testing.assert_close(ages, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize(
    ("rule", "said"), [(MLP(), "yes"), (MLP(time="steps"), "yes"), (LSTM(), "no"), (Celo2(), "no")]
)
def test_rules_that_see_the_clock_are_told_apart(rule: UpdateRule, said: str) -> None:
    assert answers(look(rule))["schedule"] == said


def test_decoupled_weight_decay_of_star_is_its_decay() -> None:
    rule = STAR(weight_decay=0.05)
    assert decay_rate(look(rule))[0] == pytest.approx(0.05, rel=0.1)


def moment_of(rule: UpdateRule, steps: int = 12):
    theta = random_theta(rule)
    single = {k: t.float() for k, t in theta.items()}
    return theta, record(rule, single, TINY, steps, generator(), lanes=1, keep=[10]).inputs[10]


@pytest.mark.parametrize("rule", [MLP(), Adam(), SMALL["Celo"]], ids=["MLP", "Adam", "Celo"])
def test_sensitivities_are_derivatives(rule: UpdateRule, monkeypatch) -> None:
    """Of each input but the clock, which has whole numbers; in the limit of small changes."""
    monkeypatch.setattr(inspection_module, "EPSILON", 1e-6)
    theta, moment = moment_of(rule)
    found = sensitivity(rule, theta, moment, generator(5))

    leaves, spec = tree_flatten(moment)
    floats = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()]

    def update(*moved: Tensor) -> tuple[Tensor, ...]:
        own = dict(zip(floats, moved, strict=True))
        m = tree_unflatten([own.get(i, leaf) for i, leaf in enumerate(leaves)], spec)
        run = m.run if rule.needs_loss else m.run._replace(loss=None)
        return tuple(rule.update(theta, m.grads, m.state, m.params, m.infos, run)[0].values())

    def size(tensors: Sequence[Tensor]) -> float:
        return float(torch.cat([t.flatten() for t in tensors]).norm())

    for name, direction in directions(rule, moment, generator(5)):
        if name != "clock":
            at, along = (tuple(tree_flatten(m)[0][i] for i in floats) for m in (moment, direction))
            there, change = torch.autograd.functional.jvp(update, at, along)
            assert found[name] == pytest.approx(size(change) / size(there), rel=1e-3, abs=1e-9), name


def test_channels_are_told_apart_by_name_not_by_coincidence_of_sizes() -> None:
    params = {"w": torch.zeros(3, 3), "b": torch.zeros(3)}
    slots = {
        k: {"m": torch.zeros(3, *p.shape), "v": torch.zeros_like(p), "n": torch.zeros(())} for k, p in params.items()
    }
    assert channel_counts(OptState(slots, {}), params) == {"m": 3}
    slots["w"]["h"] = slots["b"]["h"] = torch.zeros(20)
    assert channel_counts(OptState(slots, {}), params) == {"m": 3}


@pytest.mark.parametrize("rule", [MLP(), Momentum()], ids=["MLP", "Momentum"])
def test_a_recorded_run_is_the_run(rule: UpdateRule) -> None:
    theta = rule.init_theta(generator())
    run = record(rule, theta, TINY, 8, generator(3), lanes=2, keep=[0, 7])
    g, lanes = generator(3), expand_theta(theta, 2)
    with torch.no_grad():
        state = sample_runs(rule, lanes, TINY, torch.tensor([8, 8]), g)
        state, losses = unroll(rule, lanes, TINY, state, 7, g)
    torch.testing.assert_close(run.losses[:7], losses)
    first = tree_map(lambda x: x[0].double(), (state.opt, state.params))
    torch.testing.assert_close((run.inputs[7].state, run.inputs[7].params), first)
    assert int(run.inputs[7].run.step) == 7


def test_a_run_that_diverges_is_an_error() -> None:
    with pytest.raises(ConfigurationError, match=r"diverged at step \d+ of 40"):
        inspect(SGD(lr=1e3), SGD(lr=1e3).init_theta(generator()), Quadratic(), 40, generator())


@pytest.mark.parametrize("steps", [19, 0, 2.5])
def test_a_run_too_short_is_an_error(steps: float) -> None:
    with pytest.raises(ConfigurationError, match=r"^steps=.*at least 20"):
        inspect(SGD(), SGD().init_theta(generator()), TINY, steps, generator())  # type: ignore[arg-type]


OWN = """
from dataclasses import dataclass
from l2o.rules import SGD

@dataclass(frozen=True)
class Mine(SGD):
    lr: float = 0.001
"""


def run(*arguments: str) -> None:
    command.run([*arguments, "--task", "quadratic", "--steps", "20", "--lanes", "1"])


@pytest.mark.parametrize("source", ["SGD", "saved", "default", "Mine", "saved-mine"])
def test_the_command(here, capsys, monkeypatch, source: str) -> None:
    (here / "own_rules.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(here))
    monkeypatch.delitem(sys.modules, "own_rules", raising=False)
    mine = __import__("own_rules").Mine()
    l2o.save("saved", SGD(), SGD().init_theta(generator()))
    l2o.save("saved-mine", mine, mine.init_theta(generator()))
    run(source, "--rules", "own_rules.Mine", "--out", "sub/picture.png")
    said = capsys.readouterr().out
    assert (here / "sub" / "picture.png").read_bytes().startswith(b"\x89PNG")
    for topic in ("momentum", "schedule", "step size", "clipping", "decay", "inputs"):
        assert f"\n{topic} " in said
    assert "gradient " in said


BAD = {
    "unknown task 'digit_mlp', did you mean 'digits_mlp'": ["SGD", "--task", "digit_mlp"],
    "unknown": ["SDG"],
    "expected the name of a .png file": ["SGD", "--out", "picture.pdf"],
    "steps=5": ["SGD", "--steps", "5"],
    "rules: cannot import": ["SGD", "--rules", "nowhere.Mine"],
    "device='tpu'": ["SGD", "--device", "tpu"],
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_one_line(here, capsys, message: str) -> None:
    assert status(command.main, *BAD[message]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not list(here.glob("*.png"))


def test_without_matplotlib_the_extra_is_named(here, capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert status(command.main, "SGD") == 2
    assert "pip install 'l2o[train]'" in capsys.readouterr().err
