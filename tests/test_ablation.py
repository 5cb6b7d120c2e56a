"""The ablation command: rows are trained, kept, run on validation problems and put into a table."""

import json
from pathlib import Path

import pytest
import yaml

from l2o import load
from l2o.types import UnknownNameError
from meta_train import ablation
from meta_train.config.compose import config_path

CONFIG = """
common: ["estimator.horizon=[3,4]", estimator.lanes=2, logger=none]
steps: 1
validation: [evaluate/experiment=meta_validation, steps=4, seeds=2, "only=[table,linear]"]
reference: start
rows:
  start: {}
  Adam's direction: {rule: {direction: adam, turned: 0}}
  shipped: {source: steered}
  trained: {rule: {network: true}, train: [estimator.sigma=0.2, KEPT]}
"""
FAMILIES = yaml.safe_load(Path(config_path(), "experiment/default.yaml").read_text("utf-8"))["defaults"]
NAMES = [key.split(".")[-1] for each in FAMILIES for key in each if key.startswith("/task@")]
DROPPED = [name for name in NAMES if name not in ("plateau", "quadratic")]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ablation")
    (folder / "rows.yaml").write_text(CONFIG.replace("KEPT", ", ".join(f"~task.families.{name}" for name in DROPPED)))
    ablation.run(["--config", str(folder / "rows.yaml"), "--runs", str(folder / "runs"), "--out", str(folder / "out")])
    return folder


def test_rows_are_what_they_say(made):
    start, theta = load(str(made / "runs" / "start" / "checkpoint"))
    assert (start.direction, start.controller, start.turned) == ("eigenbasis", "alignment", 128)
    assert load(str(made / "runs" / "adam-s-direction" / "checkpoint"))[0].direction == "adam"
    trained, learned = load(str(made / "runs" / "trained" / "checkpoint"))
    assert trained.network
    assert any(not t.equal(theta[name]) for name, t in learned.items() if name in theta)


def test_the_table_has_every_row_with_its_compute(made):
    about, *records = json.loads((made / "out" / "results.json").read_text())
    assert [r["row"] for r in records] == ["start", "Adam's direction", "shipped", "trained"]
    assert (about["problems"], about["steps"], about["seeds"]) == (2, 4, 2)
    assert [r["outer_steps"] for r in records] == [0, 0, 0, 1]
    assert records[0]["score"] == 0.0 != records[1]["score"]
    assert records[3]["inner_steps"] >= 2 * 2 * 3
    text = (made / "out" / "README.md").read_text()
    assert all(f"| {r['row']} |" in text for r in records)


def test_a_wrong_row_is_named():
    with pytest.raises(UnknownNameError, match="hand"):
        ablation.run(["handmade", "--train-only"])
