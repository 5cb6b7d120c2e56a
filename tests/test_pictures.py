"""Pictures of landscapes and of meta-training: what is drawn is what was run, and bad input is a line."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from training import command

import l2o.checkpoints.store
from l2o.evaluation import Baseline, RuleEntrant, TorchEntrant, run_entrant
from l2o.evaluation.baselines import adamw
from l2o.evaluation.landscape import LANDSCAPES, landscape_gif, landscape_paths, landscape_png, network_paths
from l2o.evaluation.training_plots import column, training_png
from l2o.evaluation.trials import Setting
from l2o.rules import SGD, Adam
from l2o.tasks import ImageMLP
from meta_train import landscape, report
from meta_train.pictures import differing_settings, draw, read_rows
from meta_train.train import main as train

ENTRANTS = {
    "sgd": RuleEntrant("mine", SGD(lr=0.05), SGD(lr=0.05).init_theta(torch.Generator())),
    "adam": Baseline("Adam", Adam(), (0.05,)),
    "adamw": TorchEntrant("AdamW", adamw(0.05)),
}
COLOURS = {"mine": "#D55E00", "Adam": "#0072B2", "AdamW": "#009E73"}
PNG = b"\x89PNG"


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", LANDSCAPES)
def test_paths_are_those_of_the_runs_and_lie_on_the_surface(name):
    found = landscape_paths(name, ENTRANTS, steps=7)
    for entrant in ENTRANTS.values():
        places, losses = found.places[entrant.label], found.losses[entrant.label]
        assert places.shape == (8, 2)
        np.testing.assert_allclose(found.height(found.origin + places @ found.axes), losses)
        trials = run_entrant(entrant, Setting(name, LANDSCAPES[name], 7, 1, seed=0))
        np.testing.assert_allclose(losses[:-1], trials.train[:, 0, 0], rtol=1e-4, atol=1e-7)
    starts = [places[0].tolist() for places in found.places.values()]
    assert starts == [starts[0]] * 3


def test_a_network_is_cut_by_filter_normalised_directions_through_the_first_end():
    family = ImageMLP(width=3, pool=4)
    found = network_paths(family, ENTRANTS, steps=6)
    assert found.axes.shape == (2, family.side**2 * 3 + 3 + 3 * 10 + 10)
    np.testing.assert_allclose(found.places["mine"][-1], 0.0, atol=1e-9)
    assert found.height(found.origin[None]) == pytest.approx(found.losses["mine"][-1])
    generator = torch.Generator().manual_seed(0)
    data = family.sample(generator, 1)
    shapes, _ = family.init(data, generator)
    at = 0
    for name, t in shapes.items():
        rows = [x[at : at + t[0].numel()].reshape(t.shape[1], -1) for x in (found.origin, *found.axes)]
        at += t[0].numel()
        sizes = [np.linalg.norm(r, axis=1) for r in rows]
        for size in sizes[1:]:
            np.testing.assert_allclose(size, sizes[0] if name.endswith("weight") else 0.0, rtol=1e-5)


def test_landscapes_are_drawn_and_filmed():
    from PIL import Image

    found = [landscape_paths(name, ENTRANTS, steps=5) for name in ("saddle", "ravine")]
    assert landscape_png(found[:1], COLOURS).startswith(PNG)
    film = Image.open(io.BytesIO(landscape_gif(found, COLOURS, frames=4)))
    assert (film.format, film.n_frames) == ("GIF", 4)


def test_a_path_that_leaves_for_good_is_drawn_as_far_as_it_goes():
    wild = {**ENTRANTS, "sgd": RuleEntrant("mine", SGD(lr=1e6), SGD(lr=1e6).init_theta(torch.Generator()))}
    assert landscape_png([landscape_paths("ravine", wild, steps=30)], COLOURS).startswith(PNG)


def test_the_command_of_landscapes(here, capsys):
    l2o.checkpoints.store.save("mine", SGD(), SGD().init_theta(torch.Generator()))
    landscape.run(["mine", "--task", "plateau", "--task", "network", "--steps", "3", "--out", "out"])
    assert {path.name for path in Path("out").iterdir()} == {"landscape.png", "landscape.gif", "network.png"}
    assert "out/landscape.gif" in capsys.readouterr().out


# Meta-training --------------------------------------------------------------------------------------------------------

ROWS = [
    {"step": 1, "meta_loss": 3.0, "meta_grad_norm": 1.0, "lanes_masked": 0, "update_skipped": 0},
    {"step": 2, "meta_loss": None, "meta_grad_norm": None, "lanes_masked": 4, "update_skipped": 1},
    {"step": 2, "held_out_loss": 2.0, "held_out_valid_loss": 2.5, "adam_loss": 1.5},
    {"step": 3, "meta_loss": -2.0, "meta_grad_norm": 0.5, "lanes_masked": 0, "update_skipped": 0},
]
MIXED = [*ROWS[:2], {"step": 2, "held_out_loss": 0.9, "held_out_loss/a": 2.0, "adam_loss/a": 1.0}]


def test_columns_have_gaps_where_nothing_was_finite():
    steps, values = column(ROWS, "meta_loss")
    assert steps.tolist() == [1, 2, 3]
    np.testing.assert_array_equal(values, [3.0, np.nan, -2.0])


@pytest.mark.parametrize("runs", [{"a": ROWS}, {"a": MIXED}, {"a": ROWS[:1]}, {"a": ROWS, "b": MIXED}])
def test_records_of_any_kind_are_drawn(runs):
    assert training_png(runs).startswith(PNG)


def write_run(folder: Path, seed: int) -> None:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS) + '{"step": 4, "meta')
    (folder / "config.yaml").write_text(f"config: {{seed: {seed}, run: {folder}, rule: {{width: 3}}}}")


def test_runs_are_drawn_and_compared(here, capsys):
    for seed in (0, 1):
        write_run(Path("runs", f"sweep-{seed}"), seed)
    report.run(["run=runs/sweep-*", "out=both.png"])
    assert {path.name for path in here.glob("**/*.png")} == {"training.png", "both.png"}
    said = capsys.readouterr().out
    assert "seed: 0 in sweep-0, 1 in sweep-1" in said
    assert "rule" not in said
    assert "sweep-1: 3 outer steps, meta-loss -2, best held-out loss 2 at 2; 4 lanes masked, 1 steps skipped" in said


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run=nowhere"], "run=nowhere: no metrics.jsonl"),
        (["nowhere"], "'nowhere': expected run=FOLDER"),
        (["out=a.png"], "run= is missing"),
        (["run=made", "out=a.pdf"], "out='a.pdf': expected the name of a .png file"),
        (["run=damaged"], "line 1, is damaged"),
        (["run=empty"], "nothing is recorded in it yet"),
    ],
)
def test_bad_input_of_a_report_is_a_line(here, capsys, arguments, says):
    write_run(Path("made"), 0)
    for name, text in {"damaged": "{\n{}\n", "empty": ""}.items():
        Path(name).mkdir()
        Path(name, "metrics.jsonl").write_text(text)
    assert command(*arguments, base=[], main=report.main) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert says in error


def test_a_run_ends_with_its_picture(here, monkeypatch, capsys):
    monkeypatch.setattr("meta_train.train.LEAST", 2)
    assert command("steps=2", "evaluate_every=0", main=train) == 0
    assert "picture: run/training.png" in capsys.readouterr().out
    assert Path("run/training.png").read_bytes().startswith(PNG)
    Path("run/training.png").unlink()  # as where it is killed before it is drawn
    assert command("steps=2", "evaluate_every=0", main=train) == 0
    assert Path("run/training.png").exists()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert command("steps=2", "evaluate_every=0", "run=other", main=train) == 0
    assert "no picture: matplotlib cannot be imported" in capsys.readouterr().out
    assert [row["step"] for row in read_rows(Path("other"))] == [1, 2]
    assert differing_settings({"a": Path("run"), "b": Path("other")}) == {}


def test_a_picture_is_the_same_for_the_same_records(here):
    write_run(Path("made"), 0)
    assert draw(Path("made")).read_bytes() == draw(Path("made")).read_bytes()
