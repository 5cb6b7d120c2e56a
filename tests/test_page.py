"""The report of a suite: a page that is whole and asks for nothing, its tables, its looks, and the same in Markdown."""

from __future__ import annotations

from html.parser import HTMLParser

import numpy as np
from suites import ENTRANTS, MADE, SUITE, TASKS, comparison, falling, kept_of

from l2o.evaluation import (
    BASELINES,
    Comparison,
    Kept,
    Report,
    Setting,
    Store,
    run_suite,
)
from l2o.evaluation.html import as_html
from l2o.evaluation.markdown import as_markdown
from l2o.evaluation.plots import LEARNED_COLOURS, baseline_style, styles
from l2o.evaluation.tables import diagnoses_table, splits_table
from l2o.evaluation.verdicts import overall
from l2o.tasks import Quadratic


def test_only_what_was_not_tuned_is_called_so():
    assert Report("mine", MADE, {}, {}).title == "mine, untuned, beside baselines"
    tuned = Comparison.of(
        TASKS[0], {"given mine": kept_of([falling(2), falling(4)], (0.1, 1.0)), "adam": kept_of([falling(8)])}
    )
    assert Report("mine", [tuned], {}, {}).title == "mine, beside baselines"
    for text in (as_markdown(Report("mine", [tuned], {}, {})), as_html(Report("mine", [tuned], {}, {}))):
        assert "mine, beside baselines" in text
        assert "untuned, beside" not in text


def test_optimizers_of_a_notebook_may_have_any_name():
    own = [comparison("a", mine=falling(2), adam=falling(8)), comparison("b", mine=falling(0), adam=falling(8))]
    assert [found.name for found in overall(own)] == ["mine"]
    text = as_markdown(Report("mine", own, {}, {}))
    assert "Target reached: mine ends" in text
    assert "Target missed: mine ends" in text


class Reader(HTMLParser):
    """What a page refers to, and whether its elements are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag not in ("meta", "br", "line", "path", "use", "rect", "circle"):
            self.open.append(tag)
        self.references += [value for name, value in attrs if name in ("src", "href", "xlink:href") and value]

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)

    def handle_endtag(self, tag):
        if self.open and self.open[-1] == tag:
            self.open.pop()


def test_a_page_is_whole_and_asks_for_nothing(tmp_path):
    found = run_suite(SUITE, ENTRANTS, Store(tmp_path))
    page = as_html(Report("mine & <yours>", found, {"Command": "`a < b`"}, {}))
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    assert all(ref.startswith("#") for ref in reader.references)
    assert not reader.tags & {"script", "link", "img", "iframe"}
    assert "url(http" not in page
    assert page.count("<svg") > 2 * len(TASKS)
    for part in ("prefers-color-scheme: dark", "width=device-width", "currentColor", "mine &amp; &lt;yours&gt;"):
        assert part in page
    for setting in TASKS:
        assert f"<h3>{setting.name}</h3>" in page
    assert "Every setting and trial" in page
    assert "`a &lt; b`" in page


def test_names_of_optimizers_are_text_on_the_page():
    page = as_html(
        Report("mine", [comparison("<b>a", learned=falling(2), adam=falling(8), **{"<i>": falling(4)})], {}, {})
    )
    assert "&lt;i&gt;" in page
    assert "&lt;b&gt;a" in page
    assert "<i>" not in page
    assert "<b>" not in page


def test_each_judged_optimizer_has_its_own_column_of_kinds():
    two = [
        comparison(n, s, learned=falling(a), given=falling(b), adam=falling(8))
        for n, s, a, b in (("a", "like", 2, 0), ("b", "other", 0, 4))
    ]
    headings, *rows = splits_table(two).rows
    assert headings == ("tasks", "number", "learned", "given")
    assert [row[1:] for row in rows] == [
        ("1", "1 of 1; 4×; 1", "0 of 1; 0×; 3.2"),
        ("1", "0 of 1; 0×; 3.2", "1 of 1; 2×; 1"),
    ]


def test_of_several_seeds_the_gravest_is_in_the_table():
    losses = np.array([[4.0, 4.0, 4.0], [3.0, 9.0, 3.0], [2.0, 9.0, 2.0], [1.0, 9.0, 1.0]])[:, :, None]
    kept = Kept("mine", (None,), [1, 2, 3, 4], losses, losses, losses[-1:], [4], 0.0)
    setting = Setting("seeds", Quadratic(), steps=4, seeds=3, window=1)
    (_, row) = diagnoses_table(Comparison.of(setting, {"learned": kept})).rows
    assert row[:3] == ("mine", "diverged (1 of 3 seeds)", "2")


def test_a_baseline_looks_the_same_whoever_is_beside_it():
    alone, among = (
        comparison("a", learned=falling(2), adam=falling(8), muon=falling(4)),
        comparison("b", sgd=falling(8), learned=falling(2), adamw=falling(8), adam=falling(8), muon=falling(4)),
    )
    assert styles(alone)["muon"] == styles(among)["muon"]
    looks = {(style["color"], style["linestyle"]) for style in map(baseline_style, BASELINES)}
    assert len(looks) == len(BASELINES)
    assert not {colour for colour, _ in looks} & set(LEARNED_COLOURS)


def test_the_report_of_a_suite_has_every_optimizer_and_every_kind_of_task():
    text = as_markdown(Report("learned", MADE, {}, {}))
    assert "| **learned** | untuned | 2 of 4 | 1 [0, 4] | 1 [0, 4] | 2.1 |" in text
    assert "| like those of meta-training | 2 | 2 of 2; 3×; 1 |" in text
    assert "![performance profile](profile.png)" in text
    assert "diverged (1 of 1 seeds)" in text
