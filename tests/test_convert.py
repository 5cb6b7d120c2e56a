"""Weights of others become checkpoints: what they are is told by their tensors, and the rule computes the same."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from msgpack_writer import pack
from server import Page, Server
from tables import identical
from test_foreign import linear, velo

import l2o
from l2o.interop.convert import convert
from l2o.interop.files import read_foreign
from l2o.interop.pylo import DECAYS, GROUPS
from l2o.interop.references import REFERENCES
from l2o.interop.traces import read_trace, replay
from l2o.ops.moments import decay
from l2o.rules import AdafacMLP, Celo, Celo2, CeloAdam, VeLO
from l2o.types import CheckpointError, L2OError
from meta_train.convert import main, run, setting

Shapes = dict[str, tuple[int, ...]]


def stack(units: int, *inits: int) -> Shapes:
    """The networks of VeLO, Celo (``inits`` of them) and Celo2 (one)."""
    shapes: Shapes = {f"ff_mod_stack/~/w0__{j}": (*inits, n, units) for j, n in enumerate(GROUPS)}
    for i, (fan_in, fan_out) in enumerate(((0, units), (units, units), (units, 3))):
        shapes |= {f"ff_mod_stack/~/w{i}": (*inits, fan_in, fan_out)} if i else {}
        shapes |= {f"ff_mod_stack/~/b{i}": (*inits, fan_out)}
    return shapes


def scheduler(inputs: int, hidden: int, inits: int = 0) -> Shapes:
    """The LSTM of VeLO and Celo, and what reads its state."""
    shapes: Shapes = {f"lstm_init_state/{name}": (1, hidden) for name in ("hidden", "cell")}
    layers = {"linear": (inputs, hidden), "linear_1": (inputs, hidden), "linear_2": (inputs, hidden)}
    layers |= {"rnn/linear": (2 * hidden, 4 * hidden), "step_size": (hidden, 1)}
    layers |= {"rnn_to_controls": (hidden, inits)} if inits else {}
    for name, shape in layers.items():
        shapes |= {f"rnn_params/{name}/w": shape, f"rnn_params/{name}/b": shape[1:]}
    return shapes


def adafac(*sizes: int) -> Shapes:
    shapes: Shapes = {f"{name}_decays": (n,) for name, n in (("momentum", 3), ("rms", 1), ("adafactor", 3))}
    for i, (fan_in, fan_out) in enumerate(pairwise(sizes)):
        shapes |= {f"nn/~/w{i}": (fan_in, fan_out), f"nn/~/b{i}": (fan_out,)}
    return shapes


CASES = {
    "AdafacMLPLOpt": (adafac(39, 4, 4, 2), AdafacMLP(hidden=(4, 4))),
    "AdafacMLPLOpt, three hidden layers": (adafac(39, 7, 7, 7, 2), AdafacMLP(hidden=(7, 7, 7))),
    "HyperV2": ({**stack(4, 3), **scheduler(30, 8, 3)}, VeLO(lstm_hidden=8, inits=3)),
    "celo.optimizers.celo.Celo": ({**stack(4, 1), **scheduler(18, 8, 1)}, Celo(lstm_hidden=8)),
    "celo.optimizers.celo.Celo, a mixture": ({**stack(4, 5), **scheduler(18, 8, 5)}, Celo(lstm_hidden=8, inits=5)),
    "celo.optimizers.celo_adam.Celo": (scheduler(18, 8), CeloAdam(lstm_hidden=8)),
    "celo2_optax.scale_by_celo2": (stack(8), Celo2(hidden=(8, 8))),
}


def tree(shapes: Shapes) -> dict[str, Any]:
    """Random arrays, nested as flax nests them."""
    rng, nested = np.random.default_rng(0), {}
    for path, shape in shapes.items():
        *folders, leaf = path.replace("rnn/linear", "rnn|linear").split("/")
        node = nested
        for folder in folders:
            node = node.setdefault(folder.replace("|", "/"), {})
        node[leaf] = rng.standard_normal(shape, dtype=np.float32)
    return nested


def write(path: Path, shapes: Shapes) -> Path:
    path.write_bytes(pack(tree(shapes)))
    return path


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


def test_the_command(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    file = str(write(here / "theta.state", adafac(39, 4, 4, 2)))
    command = [file, "--to", "new", "--licence", "CC0-1.0", "--set", "step_mult=0.02"]
    run(command)
    said = capsys.readouterr().out
    assert "AdafacMLPLOpt: AdafacMLP(hidden=(4, 4)" in said
    assert "not in the files: step_mult = 0.02" in said
    assert l2o.load("new")[0] == AdafacMLP(step_mult=0.02)
    bad = {"a checkpoint is there already": command, "expected NAME=VALUE": [*command, "--set", "x"]}
    for message, arguments in bad.items():
        monkeypatch.setattr("sys.argv", ["convert", *arguments])
        with pytest.raises(SystemExit) as caught:
            main()
        assert caught.value.code == 2
        assert message in capsys.readouterr().err


def test_true_and_false_may_be_written_as_in_python() -> None:
    assert [setting(f"mup={text}") for text in ("True", "False", "true", "0")] == [
        ("mup", True), ("mup", False), ("mup", True), ("mup", 0),
    ]  # fmt: skip


@pytest.mark.parametrize("to", ["taken", "taken/new"])
def test_a_folder_that_cannot_be_made_is_one_line(here: Path, capsys, monkeypatch, to: str) -> None:
    (here / "taken").touch()
    file = str(write(here / "theta.state", adafac(39, 4, 4, 2)))
    monkeypatch.setattr("sys.argv", ["convert", file, "--to", to, "--licence", "MIT"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert re.fullmatch(rf"error: to='{to}' cannot be written \(.*name another\n", said)


COMMIT = "0123456789abcdef" * 2 + "01234567"


@pytest.mark.parametrize(
    ("address", "page"),
    [
        (f"hf:owner/name@{COMMIT}", f"/owner/name/resolve/{COMMIT}/theta.state"),
        (f"hf:owner/name@{COMMIT}", f"/owner/name/resolve/{COMMIT}/model.safetensors"),
        (f"hf:owner/name@{COMMIT}/a/b.state", f"/owner/name/resolve/{COMMIT}/a/b.state"),
        ("hf:owner/name@main#sha256={pin}", "/owner/name/resolve/main/theta.state"),
        ("hf:owner/name#unpinned", "/owner/name/resolve/main/theta.state"),
        ("{url}/some/theta.state#sha256={pin}", "/some/theta.state"),
        ("{url}/some/theta.state?key=1#sha256={pin}", "/some/theta.state?key=1"),
    ],
)
def test_weights_at_an_address_are_one_command(
    here: Path, server: Server, capsys, monkeypatch, address: str, page: str
) -> None:
    """Fetched once, and then taken from the cache."""
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    content = write(here / "theta.state", adafac(39, 4, 4, 2)).read_bytes()
    server.pages[page] = Page(content)
    source = address.format(url=server.url, pin=hashlib.sha256(content).hexdigest())
    for to in ("new", "again"):
        run([source, "--to", to])
        assert f"see {source}" in " ".join(capsys.readouterr().out.split())
        server.pages.clear()
    assert l2o.load("again")[0] == AdafacMLP()
    (file,) = l2o.read_card("again")["origin"]["files"]
    assert (file["address"], file["size"]) == (source, len(content))


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("hf:owner/name", "may serve something else tomorrow. Pin it with a full commit"),
        ("hf:owner/name@main", "by the SHA-256 of the file, hf:owner/name@main#sha256"),
        (f"hf:owner/name@{COMMIT[:7]}", "Pin it with a full commit"),
        (f"hf:owner/name@{COMMIT}/../x", "expected hf:owner/name@commit, or with /FILE behind it"),
        ("hf:owner", "expected hf:owner/name"),
        ("{url}/theta.state", "Pin it with #sha256"),
        ("{url}/#unpinned", "expected the address of a file of weights"),
        ("{url}/theta.state#sha256=12", "64 hexadecimal digits, the SHA-256 of the file"),
        ("{url}/other.state#sha256=" + "0" * 64, "expected " + "0" * 64),
        ("{url}/none.state#sha256=" + "0" * 64, "404"),
        (f"hf:owner/name@{COMMIT}", "pytorch_model.bin"),
        ("http://example.org/theta.state#unpinned", "expected an address of https"),
    ],
)
def test_an_address_that_does_not_serve_is_said(
    here: Path, server: Server, capsys, monkeypatch, address: str, message: str
) -> None:
    server.pages["/other.state"] = Page(b"something else")
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setattr("sys.argv", ["convert", address.format(url=server.url), "--to", "new"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
    assert not (here / "new").exists()


def test_a_licence_has_to_be_stated(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(["theta.state", "--to", "new"])
    assert "--licence" in capsys.readouterr().err


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
