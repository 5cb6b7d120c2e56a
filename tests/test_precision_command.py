"""``python -m meta_train.precision``: the curves of each precision of state, and a page and a picture of them."""

import torch

from l2o.optim import precision as rounded
from meta_train import precision


def test_records_page_and_picture(monkeypatch):
    monkeypatch.setattr(precision, "SOURCES", ("light", "Adam"))
    found = list(precision.curves(steps=150, seeds=1))
    assert len(found) == 2 * 2 * 3
    assert all(len(own) == 50 for record in found for own in record["losses"])
    by_state = {
        r["state"]: r["losses"] for r in found if r["optimizer"] == "Adam" and r["problem"] == precision.PERCEPTRON
    }
    assert len({str(losses) for losses in by_state.values()}) == 3
    about = {"hardware": "here", "commit": "c", "date": "d"}
    cost = {"state_bytes_per_parameter": 8.0, "scratch_bytes_per_parameter": None, "ns_per_parameter": 1.5}
    costs = [{"table": "costs", "optimizer": "light", "state": "float32", **cost}]
    text = precision.page([{**about, **r} for r in [*costs, *found]], "command")
    assert "| light | float32 | 8 | 0 | 1.5 |" in text
    last = by_state["bfloat16"][0][-1] / by_state["float32"][0][-1]
    assert f"| {last:.4g} |" in text
    assert precision.picture(found).startswith(b"\x89PNG")


def test_to_the_nearest_is_for_comparison_alone():
    x, noise = torch.tensor([1.001]), torch.tensor([0xFFFF], dtype=torch.int32)
    with precision.rounding("bfloat16, rounded to the nearest"):
        assert rounded._rounded(x, noise) == 1.0
    with precision.rounding("bfloat16"):
        assert rounded._rounded(x, noise) > 1.0
