"""What documents show of records is what the records say: `python -m meta_train.documents` would change nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from tables import generator
from training import command

import l2o
from l2o.checkpoints.model_card import compute, model_card, number, table
from l2o.checkpoints.pretrained import aliases
from l2o.rules import SGD
from l2o.types import ConfigurationError
from meta_train import documents


def test_every_document_is_what_the_command_would_write() -> None:
    made = documents.documents()
    stale = [str(path.relative_to(ROOT)) for path, text in made.items() if path.read_text("utf-8") != text]
    assert not stale, "python -m meta_train.documents writes them anew"
    assert {f"pretrained/{name}/README.md" for name in l2o.list_pretrained()} <= {
        path.relative_to(ROOT).as_posix() for path in made
    }


def test_pages_have_no_figures_of_their_own() -> None:
    """Outside its blocks the page that helps to choose has no decimals but settings of weight decay and lr."""
    text = documents._BLOCK.sub("", (ROOT / "docs" / "choosing.md").read_text("utf-8"))
    assert set(re.findall(r"\d+\.\d+", text)) == {"0.1", "0.3"}


@pytest.mark.parametrize("name", l2o.list_pretrained())
def test_a_model_card_says_what_its_card_says(name: str) -> None:
    card, text = l2o.read_card(name), (ROOT / "pretrained" / name / "README.md").read_text("utf-8")
    head = yaml.safe_load(text.split("---")[1])
    assert head["license"] == card["licence"].lower()
    for part in (card["for"], card["not_for"], card["theta"]["sha256"], card["recipe"]["command"], card["commit"]):
        assert part in text
    assert all(f"`{alias}`" in text for alias, meant in aliases().items() if meant == name)
    for setting in card.get("results", {}).get("settings", ()):
        assert setting["verdict"] in text


def test_a_card_of_ones_own_is_written_beside_it(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rule = SGD()
    l2o.save("mine", rule, rule.init_theta(generator()), {"licence": "MIT", "for": "a test"})
    documents.run(["--card", "mine"])
    text = (here / "mine" / "README.md").read_text("utf-8")
    assert "# mine\n" in text
    assert "**For**: a test." in text
    assert "**Not for**" not in text
    assert "README.md" in capsys.readouterr().out
    documents.run(["--card", "mine"])
    assert capsys.readouterr().out == ""  # nothing has changed


def test_numbers_that_json_has_not_are_dashes() -> None:
    assert [number(x) for x in (None, float("inf"), 0.00123)] == ["–", "–", "0.0012"]
    assert compute({}) == "not said"
    assert compute({"compute": {"inner_steps": 1234, "seconds": 90.0}}) == "1,234 inner steps, 2 min"
    assert table(("a",), [("x | y",)]).splitlines()[-1] == r"| x \| y |"


def test_a_lost_run_is_told_in_the_card() -> None:
    found = {"label": "x", "trials": 1, "mean": None, "interval": [None, None], "valid": None, "diverged": 3}
    setting = {
        "name": "s",
        "steps": 10,
        "seeds": 3,
        "seed": 1,
        "verdict": "Lost.",
        "task": "t",
        "optimizers": {"l": found},
    }
    card = {
        "rule": "SGD",
        "hyperparameters": {},
        "theta": {"size": 4, "sha256": "0"},
        "results": {"settings": [setting]},
    }
    assert "| x | 1 | – [–, –] | – | missed | 3 |" in model_card("lost", json.loads(json.dumps(card)))


def test_blocks_are_filled_once_and_for_all() -> None:
    text = "a\n<!-- made: hardware -->\nold\n<!-- end -->\nb\n"
    made = documents.filled(text)
    assert documents.hardware() in made
    assert "old" not in made
    assert documents.filled(made) == made
    with pytest.raises(ConfigurationError, match=r"made: nothing.*expected one of which"):
        documents.filled("<!-- made: nothing -->\n<!-- end -->")


def test_outside_a_checkout_there_is_nothing_to_write(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(documents, "ROOT", here)
    assert command(base=[], main=documents.main) == 2
    assert "is no checkout of l2o; --card" in capsys.readouterr().err


def test_the_citation_is_of_this_version() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    assert f'\nversion = "{cited["version"]}"\n' in project
    assert f'\nlicense = "{cited["license"]}"\n' in project
    assert {"cff-version", "message", "title", "authors", "type"} <= cited.keys()


def test_the_changelog_is_of_the_form_that_it_names() -> None:
    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert "## [Unreleased]" in text
    assert set(re.findall(r"^### (\w+)$", text, re.M)) <= {
        "Added",
        "Changed",
        "Deprecated",
        "Removed",
        "Fixed",
        "Security",
    }
