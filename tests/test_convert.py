"""Weights of others become checkpoints: what they are is told by their tensors, and the rule computes the same."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from msgpack_writer import pack
from originals import CASES, adafac, scheduler, stack, tree, write
from tables import identical
from test_foreign import linear, velo

import l2o
from l2o.interop.convert import convert
from l2o.interop.files import read_foreign
from l2o.interop.pylo import DECAYS, GROUPS
from l2o.interop.references import REFERENCES
from l2o.interop.traces import read_trace, replay
from l2o.ops.moments import decay
from l2o.rules import AdafacMLP, Celo2, VeLO
from l2o.types import CheckpointError, L2OError


@pytest.mark.parametrize("case", CASES)
def test_an_original_is_told_by_its_tensors(here: Path, case: str) -> None:
    shapes, expected = CASES[case]
    file = write(here / "theta.state", shapes)
    folder = convert([file], here / "new", "Apache-2.0")
    rule, theta = l2o.load(folder)
    assert rule == expected
    assert {name: t.shape for name, t in theta.items()} == {
        name: t.shape for name, t in expected.init_theta(torch.Generator()).items()
    }
    card = l2o.read_card(folder)
    assert card["licence"] == "Apache-2.0"
    assert card["origin"]["name"] == case.partition(",")[0]
    assert card["origin"]["files"][0]["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()


def test_of_two_with_the_same_tensors_one_is_taken_and_the_other_can_be(here: Path) -> None:
    file = write(here / "theta.state", stack(8))
    with_adam = convert([file], here / "new", "MIT", name="celo2.Celo2")
    assert l2o.load(with_adam)[0] == Celo2(adam=("vector", "embedding"))
    assert l2o.read_card(with_adam)["origin"]["fits_also"] == ["celo2_optax.scale_by_celo2"]
    with pytest.raises(CheckpointError, match=r"name='HyperV2': the tensors are of celo2_optax\.\w+ or celo2\.Celo2"):
        convert([file], here / "other", "MIT", name="HyperV2")


def test_a_known_defect_of_an_original_is_a_setting_on_the_card(here: Path) -> None:
    file = write(here / "theta.state", {**stack(4, 3), **scheduler(30, 8, 3)})
    rule, _ = l2o.load(convert([file], here / "new", "MIT", {"use_bugged_loss_features": True}))
    assert rule == VeLO(lstm_hidden=8, inits=3, loss_horizon=10)


def test_a_decay_is_the_number_that_the_original_computes() -> None:
    """In nearly all cases; else the next one."""
    convert_momentum = REFERENCES["LearnableSGDM"].rebuild
    logs = torch.linspace(-7.0, -1.0, 500)
    thetas = [convert_momentum({"log_lr": torch.tensor(0.0), "one_minus_momentum": x})[1] for x in logs]
    found = decay(torch.stack([theta["logit_momentum"] for theta in thetas]))
    expected = 1.0 - logs.exp()
    assert (found - expected).abs().max() <= 2.0**-24
    assert (found == expected).float().mean() > 0.9


def test_matrices_come_as_they_are_and_what_is_unused_stays_behind(here: Path) -> None:
    shapes, _ = CASES["celo.optimizers.celo.Celo, a mixture"]
    file = write(here / "theta.state", shapes)
    theirs = read_foreign(file).tensors
    theta = l2o.load(convert([file], here / "new", "MIT"))[1]
    groups = [theirs[f"ff_mod_stack/~/w0__{j}"] for j in range(len(GROUPS))]
    expected = {
        "w0": torch.cat(groups, 1),
        "w2": theirs["ff_mod_stack/~/w2"][..., :2],
        "b2": theirs["ff_mod_stack/~/b2"][..., :2],
        "w_in": theirs["rnn_params/linear_2/w"],
        "b_mix": theirs["rnn_params/linear_1/b"],
        "lstm_w": theirs["rnn_params/rnn/linear/w"],
        "lstm_h": theirs["lstm_init_state/hidden"][0],
        "lstm_c": theirs["lstm_init_state/cell"][0],
        "w_controls": theirs["rnn_params/rnn_to_controls/w"],
        "w_lr": theirs["rnn_params/step_size/w"],
    }
    assert identical({name: theta[name] for name in expected}, expected)


def small_fc() -> dict[str, torch.Tensor]:
    """The state dict of PyLO's ``MetaMLP``."""
    return linear("network.input", 39, 6) | linear("network.linear_0", 6, 6) | linear("network.output", 6, 2)


@pytest.mark.parametrize("form", ["safetensors", "pt"])
def test_small_fc_of_pylo(here: Path, form: str) -> None:
    """Its decays and the size of its step are in PyLO's code, not in its file."""
    state = small_fc()
    file = here / f"model.{form}"
    torch.save(state, file) if form == "pt" else safetensors.torch.save_file(state, file)
    rule, theta = l2o.load(convert([file], here / "new", "Apache-2.0"))
    assert rule == AdafacMLP(hidden=(6, 6), step_mult=0.01)
    assert identical(theta["w1"], state["network.linear_0.weight"].T)
    assert theta["momentum_decays"].tolist() == pytest.approx(DECAYS["momentum_decays"])
    with_mup = convert([file], here / "mup", "Apache-2.0", {"mup": True})
    assert l2o.load(with_mup)[0] == AdafacMLP(hidden=(6, 6), step_mult=0.01, mup=True)
    elo = {name: [0.0] * len(values) for name, values in DECAYS.items()} | {"step_mult": 0.001}
    rule, theta = l2o.load(convert([file], here / "elo", "Apache-2.0", elo))
    assert rule == AdafacMLP(hidden=(6, 6))
    assert not theta["adafactor_decays"].any()
    assert l2o.read_card(here / "elo")["origin"]["settings"] == elo


def test_velo_of_pylo_is_in_two_files(here: Path) -> None:
    state = velo(hidden=6, inits=2)
    network = {name: tensor for name, tensor in state.items() if name.startswith(("input_", "hidden_", "output_"))}
    safetensors.torch.save_file(network, here / "mlp.safetensors")
    rest = {name: tensor for name, tensor in state.items() if name not in network}
    safetensors.torch.save_file(rest, here / "rnn.safetensors")
    folder = convert([here / "rnn.safetensors", here / "mlp.safetensors"], here / "new", "Apache-2.0")
    rule, theta = l2o.load(folder)
    assert rule == VeLO(lstm_hidden=6, inits=2)
    assert identical(theta["w0"], state["input_weights_"].mT)
    assert [file["file"] for file in l2o.read_card(folder)["origin"]["files"]] == ["rnn.safetensors", "mlp.safetensors"]
    with pytest.raises(CheckpointError, match=r"known are LearnableSGD, .*both of VeLO's together"):
        convert([here / "mlp.safetensors"], here / "other", "Apache-2.0")
    with pytest.raises(CheckpointError, match="is in another of the files"):
        convert([here / "mlp.safetensors"] * 2, here / "other", "Apache-2.0")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"momentum_decays": None}, "no learned optimizer"),
        ({"nn/~/w1": None}, "no learned optimizer"),
        ({"nn/~/b2": None}, r"no learned optimizer.*'nn/~/w0' \(39, 4\)"),
        ({"nn/~/b2": (3,)}, "no learned optimizer"),
        ({"extra": (1,)}, r"no learned optimizer.*'extra' \(1,\), .*; known are LearnableSGD.*--as NAME"),
        ({"nn/~/w0": (38, 4)}, r"no learned optimizer.*'nn/~/w0' \(38, 4\)"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_written(here: Path, change: dict[str, Any], message: str) -> None:
    shapes = {**adafac(39, 4, 4, 2), **change}
    file = write(here / "theta.state", {name: shape for name, shape in shapes.items() if shape is not None})
    with pytest.raises(CheckpointError, match=message):
        convert([file], here / "new", "MIT")
    assert not (here / "new").exists()


@pytest.mark.parametrize(
    ("change", "name", "message"),
    [
        ({"nn/~/w1": None}, "AdafacMLPLOpt", r"θ has no 'nn/~/b1'|'nn/~/w2'.*no place for"),
        ({"nn/~/w0": (38, 4)}, "AdafacMLPLOpt", r"tensor 'w0' has shape \(38, 4\), expected \(39, 4\)"),
        ({"extra": (1,)}, "AdafacMLPLOpt", "θ has 'extra', which AdafacMLP has no place for"),
        ({}, "MLPLOpt", "the tensors are of AdafacMLPLOpt"),
        ({}, "AdafacMLP", "unknown optimizer 'AdafacMLP', did you mean 'AdafacMLPLOpt'"),
    ],
)
def test_what_keeps_a_file_from_being_the_named_one(
    here: Path, change: dict[str, Any], name: str, message: str
) -> None:
    shapes = {**adafac(39, 4, 4, 2), **change}
    file = write(here / "theta.state", {path: shape for path, shape in shapes.items() if shape is not None})
    with pytest.raises(L2OError, match=message):
        convert([file], here / "new", "MIT", name=name)
    assert not (here / "new").exists()


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_numbers_that_are_not_finite_are_named_and_nothing_written(here: Path, value: float) -> None:
    """1e300 is one in float64, but not in the float32 of a checkpoint."""
    nested = tree(adafac(39, 4, 4, 2))
    nested["nn"]["~"]["b1"] = np.array([0.0, 0.0, 0.0, value])
    (here / "theta.state").write_bytes(pack(nested))
    with pytest.raises(CheckpointError, match=r"'(nn/~/)?b1' is not made of finite floating-point numbers"):
        convert([here / "theta.state"], here / "new", "MIT")
    assert not (here / "new").exists()


@pytest.mark.parametrize(
    ("licence", "settings", "message"),
    [
        (" ", {}, "licence=' '"),
        ("MIT", {"stepmult": 1}, "stepmult=1: AdafacMLP has no such setting"),
        ("MIT", {"step_mult": "big"}, "step_mult='big'"),
        ("MIT", {"mup": "False"}, "mup='False': expected true or false"),
        ("MIT", {"rms_decays": [0.5]}, "the file has this meta-parameter"),
    ],
)
def test_settings_that_are_none(here: Path, licence: str, settings: dict[str, Any], message: str) -> None:
    file = write(here / "theta.state", adafac(39, 4, 4, 2))
    with pytest.raises(L2OError, match=message):
        convert([file], here / "new", licence, settings)
    assert not (here / "new").exists()


RECORDED = sorted((Path(__file__).parent / "golden").glob("*.npz"))


@pytest.mark.parametrize("recorded", RECORDED, ids=lambda path: path.stem)
def test_a_recorded_run_is_repeated_by_the_checkpoint_made_of_its_theta(here: Path, recorded: Path) -> None:
    """θ written as flax writes it, converted with the original's settings, loaded: the run comes out the same."""
    with np.load(recorded) as arrays:
        meta = json.loads(str(arrays["meta"]))
        nested: dict[str, Any] = {}
        for path, (*folders, leaf) in meta["theta_paths"].items():
            node = nested
            for folder in folders:
                node = node.setdefault(folder, {})
            node[leaf] = arrays[f"theta/{path}"]
    (here / "theta.state").write_bytes(pack(nested))
    settings = dict(meta["hyperparameters"])
    folder = convert([here / "theta.state"], here / "new", "Apache-2.0", settings, name=settings.pop("cls"))
    trace = read_trace(recorded)
    rule, theta = l2o.load(folder)
    assert rule == trace.rule
    assert all(error.within for error in replay(dataclasses.replace(trace, rule=rule, theta=theta)))


FILES = {
    "adafac_mlp_lopt_random.state": ("checkpoints/adafac_mlp_lopt_random", None),
    "adafac_mlp_lopt_random_parameter_checkpoint.state": ("checkpoints/adafac_mlp_lopt_random", None),
    "celo/theta.state": ("celo", "celo"),
    "celo2_random.state": ("checkpoints/celo2_random", None),
    "celo_adam/theta.state": ("celo_adam", "celo_adam"),
    "velo_hyperv2_random.state": ("velo_hyperv2", "velo_hyperv2"),
    "velo_hyperv2_small_random.state": ("checkpoints/velo_hyperv2_small_random", None),
}
"""Files that flax wrote, each with the trace that has its values, and the one that was recorded with them."""


@pytest.mark.parametrize("file", FILES)
def test_files_of_flax_are_converted_loaded_and_replayed(golden: Path, tmp_path: Path, file: str) -> None:
    """Every tensor is the recorded one, bit for bit; the loaded checkpoint repeats the run recorded with it."""
    values, trace = FILES[file]
    with np.load(golden / f"{values}.npz") as arrays:
        theirs = {name[6:]: torch.from_numpy(arrays[name]) for name in arrays.files if name.startswith("theta/")}
    assert identical(read_foreign(golden / "checkpoints" / file).tensors, theirs)
    folder = convert([golden / "checkpoints" / file], tmp_path / "new", "MIT")
    rule, theta = l2o.load(folder)
    again, expected = REFERENCES[l2o.read_card(folder)["origin"]["name"]].rebuild(theirs)
    assert rule == again
    assert identical(theta, expected)
    if trace:
        recorded = read_trace(golden / f"{trace}.npz")
        assert rule == recorded.rule
        assert all(error.within for error in replay(dataclasses.replace(recorded, rule=rule, theta=theta)))


def test_no_file_of_flax_is_left_out(golden: Path) -> None:
    folder = golden / "checkpoints"
    assert {str(path.relative_to(folder)) for path in folder.rglob("*.state")} == set(FILES)
