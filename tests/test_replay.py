"""``python -m meta_train.replay``: recorded runs of any shapes, tolerances, and files that are none."""

import json

import numpy as np
import pytest
import torch
from conftest import ROOT
from tables import generator, one_update

from l2o.interop.references import REFERENCES
from l2o.interop.traces import read_trace, replay
from l2o.ops.kinds import infos_of
from l2o.rules import MLP
from l2o.types import CheckpointError
from meta_train.replay import run

SMALL_FC = ROOT / "tests" / "golden" / "adafac_mlp_lopt.npz"
SHAPES = {"0.weight": (2, 1, 3, 2, 2), "empty": (0, 3), "b/ias": (1,), "τ": ()}
STEPS, TOTAL = 3, 9


@pytest.fixture
def arrays():
    with np.load(SMALL_FC) as file:
        return dict(file)


def write(path, arrays):
    np.savez(path, **arrays)
    return str(path)


def recorded(rule, theta):
    """A run of ``rule`` as a trace of MLPLOpt, on tensors of other names and ranks."""
    g = generator(4)
    params = {k: torch.randn(s, generator=g) for k, s in SHAPES.items()}
    grads = {k: torch.randn(STEPS, *s, generator=g) for k, s in SHAPES.items()}
    arrays = {f"init/{k}": p for k, p in params.items()} | {f"grads/{k}": x for k, x in grads.items()}
    arrays |= {f"theta/mlp/~/linear_{k[1:]}/{k[0]}": t for k, t in theta.items()}
    state, after, steps = rule.init(theta, params, infos_of(params)), [], []
    for t in range(STEPS):
        updates, state = one_update(rule, theta, {k: x[t] for k, x in grads.items()}, state, params, t, TOTAL)
        params = {k: p + updates[k] for k, p in params.items()}
        after.append(params)
        steps.append({k: -u for k, u in updates.items()})
    for group, history in {"params": after, "step": steps}.items():
        arrays |= {f"{group}/{k}": torch.stack([tensors[k] for tensors in history]) for k in SHAPES}
    settings = {"cls": "MLPLOpt", "decays": [0.5, 0.99], "step_mult": 0.2, "exp_mult": 0.3, "hidden_layers": 1}
    meta = np.array(json.dumps({"hyperparameters": settings, "num_steps": TOTAL}))
    return {k: t.numpy() for k, t in arrays.items()} | {"losses": np.ones(STEPS), "meta": meta}


def test_a_run_of_other_shapes_names_and_settings_is_rebuilt(tmp_path, capsys):
    rule = MLP(hidden=(3,), decays=(0.5, 0.99), step_mult=0.2, exp_mult=0.3, time="steps")
    path = write(tmp_path / "run.npz", recorded(rule, rule.init_theta(generator())))
    trace = read_trace(path)
    assert trace.rule == rule
    assert trace.total_steps == TOTAL
    assert {e.tensor: (e.shape, e.params, e.step) for e in replay(trace)} == {k: (s, 0, 0) for k, s in SHAPES.items()}
    assert run([path, str(SMALL_FC)]) == 0
    assert "(2, 1, 3, 2, 2)" in capsys.readouterr().out


def test_a_first_layer_cut_into_groups_is_put_together(tmp_path, arrays):
    whole = arrays.pop("theta/nn/~/w0")
    arrays |= {f"theta/nn/~/w0__{j}": part for j, part in enumerate(np.split(whole, [1, 2, 5, 6, 20]))}
    trace = read_trace(write(tmp_path / "run.npz", arrays))
    assert trace.theta["w0"].equal(torch.from_numpy(whole))


@pytest.mark.parametrize(("group", "factor"), [("params", 1 + 2e-5), ("step", 1 + 2e-4), ("step", np.nan)])
def test_what_is_over_tolerance_is_marked_and_decides_the_exit_status(tmp_path, arrays, capsys, group, factor):
    arrays[f"{group}/tall"] = arrays[f"{group}/tall"] * np.float32(factor)
    assert run([str(SMALL_FC), write(tmp_path / "run.npz", arrays)]) == 1
    marked = [line for line in capsys.readouterr().out.splitlines() if "over tolerance" in line]
    assert [line.split()[0] for line in marked] == ["tall"]


def change_meta(**entries):
    def change(arrays):
        arrays["meta"] = np.array(json.dumps(json.loads(str(arrays["meta"])) | entries))

    return change


def change_settings(**settings):
    def change(arrays):
        meta = json.loads(str(arrays["meta"]))
        change_meta(hyperparameters=meta["hyperparameters"] | settings)(arrays)

    return change


BAD = {
    "has no 'meta'": lambda arrays: arrays.pop("meta"),
    "meta is no JSON": lambda arrays: arrays.update(meta=np.array("{")),
    "has no 'hyperparameters'": change_meta(hyperparameters=None),
    "unknown optimizer 'AdafacMLP', did you mean 'AdafacMLPLOpt'": change_settings(cls="AdafacMLP"),
    "num_steps='many'": change_meta(num_steps="many"),
    "warmup=3: AdafacMLP has no such setting": change_settings(warmup=3),
    "step_mult='big' .*expected": change_settings(step_mult="big"),
    "θ has no 'nn/~/w0'": lambda arrays: arrays.pop("theta/nn/~/w0"),
    "θ has 'extra', which": lambda arrays: arrays.update({"theta/extra": np.zeros(3, np.float32)}),
    "tensor 'b1' has shape": lambda arrays: arrays.update({"theta/nn/~/b1": np.zeros(5, np.float32)}),
    "grads/tall has shape None, expected \\(20, 9, 3\\)": lambda arrays: arrays.pop("grads/tall"),
    "step/tall has shape \\(19, 9, 3\\)": lambda arrays: arrays.update({"step/tall": arrays["step/tall"][:19]}),
    "has no 'init/...', or no steps": lambda arrays: [arrays.pop(k) for k in list(arrays) if k.startswith("init")],
}


@pytest.mark.parametrize(("message", "change"), BAD.items(), ids=BAD.keys())
def test_bad_files_are_one_clear_line(tmp_path, arrays, capsys, message, change):
    change(arrays)
    path = write(tmp_path / "run.npz", arrays)
    with pytest.raises(CheckpointError, match=message):
        read_trace(path)
    assert run([path, str(SMALL_FC)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {path}: ")


SPOKEN = {
    "cls with all its modules": change_settings(
        cls="learned_optimization.learned_optimizers.adafac_mlp_lopt.AdafacMLPLOpt"
    ),
    "every argument of the original": change_settings(make_separate_weights=False, split_weights=False),
    "no num_steps": change_meta(num_steps=None),
    "no losses, for a rule that reads none": lambda arrays: arrays.pop("losses"),
    "arrays in another order": lambda arrays: arrays.update({k: arrays.pop(k) for k in sorted(arrays, reverse=True)}),
}


@pytest.mark.parametrize("change", SPOKEN.values(), ids=SPOKEN.keys())
def test_what_a_recording_may_say_otherwise_or_not_at_all(tmp_path, arrays, change):
    expected = {error.tensor: error for error in replay(read_trace(SMALL_FC))}
    change(arrays)
    trace = read_trace(write(tmp_path / "run.npz", arrays))
    assert trace.total_steps == 20
    assert {error.tensor: error for error in replay(trace)} == expected


@pytest.mark.parametrize("name", ["velo_hyperv2_small", "celo_random", "celo_adam_random", "celo2", "celo2_with_adam"])
def test_inputs_that_an_original_can_leave_out_are_told_to_be_there(tmp_path, name):
    with np.load(ROOT / "tests" / "golden" / f"{name}.npz") as file:
        arrays = dict(file)
    change_settings(with_g=True, with_fac_rms=True, precondition_output=False)(arrays)
    expected = read_trace(ROOT / "tests" / "golden" / f"{name}.npz").rule
    assert read_trace(write(tmp_path / "run.npz", arrays)).rule == expected
    change_settings(with_g=False)(arrays)
    with pytest.raises(CheckpointError, match=f"with_g=False: {type(expected).__name__} knows True only"):
        read_trace(write(tmp_path / "run.npz", arrays))


def test_losses_are_asked_for_where_the_rule_reads_them(tmp_path):
    with np.load(ROOT / "tests" / "golden" / "celo_random.npz") as file:
        arrays = {name: file[name] for name in file.files if name != "losses"}
    with pytest.raises(CheckpointError, match="has no 'losses' of one axis, which Celo reads"):
        read_trace(write(tmp_path / "run.npz", arrays))


def test_directions_are_steps_of_the_default_rate_where_none_is_said(tmp_path):
    """And an empty pattern names no tensor that Adam would update."""
    golden = ROOT / "tests" / "golden" / "celo2.npz"
    with np.load(golden) as file:
        arrays = dict(file)
    meta = json.loads(str(arrays["meta"]))
    del meta["hyperparameters"]["learning_rate"]
    meta["hyperparameters"]["regex_1d"] = ""
    arrays["meta"] = np.array(json.dumps(meta | {"hyperparameters": meta["hyperparameters"] | {"cls": "celo2.Celo2"}}))
    trace, expected = read_trace(write(tmp_path / "run.npz", arrays)), read_trace(golden)
    assert trace.kinds == expected.kinds
    assert all(error.within for error in replay(trace))


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 torn", None])
def test_what_is_no_archive_is_said_so(tmp_path, content):
    if content is not None:
        (tmp_path / "run.npz").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"cannot be read as an \.npz file"):
        read_trace(tmp_path / "run.npz")


def test_nothing_is_unpickled(tmp_path, arrays):
    arrays["losses"] = np.array([print], dtype=object)
    np.savez(tmp_path / "run.npz", **arrays)
    with pytest.raises(CheckpointError, match=r"arrays, and nothing is unpickled$"):  # NumPy's own text advises to
        read_trace(tmp_path / "run.npz")


@pytest.mark.parametrize("reference", REFERENCES.values(), ids=REFERENCES.keys())
def test_names_of_settings_are_fields(reference):
    fields = set(reference.rule.__dataclass_fields__)
    assert set(reference.fields.values()) | set(reference.fixed) <= fields
    assert not set(reference.fields) & {*reference.implied, *reference.only}
