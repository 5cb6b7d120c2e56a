"""The page of an evaluation: one file without network or scripts, for light and dark, desktop and phone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from l2o.evaluation.aggregate import profile
from l2o.evaluation.compare import Comparison
from l2o.evaluation.markdown import Report, protocol
from l2o.evaluation.plots import profile_picture, setting_svg, styles, svg
from l2o.evaluation.tables import (
    Table,
    diagnoses_table,
    optimizers_table,
    splits_table,
    tasks_table,
    trials_table,
)
from l2o.evaluation.trials import SPLITS
from l2o.evaluation.verdicts import COLUMNS, misses_first, overall, overall_text, table_row, verdict

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #59636e; --paper: #ffffff; --line: #d8dee4; --mark: #fff3ea; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ed; --soft: #9aa4af; --paper: #14181d; --line: #333b44; --mark: #3a2415; }
  svg { filter: brightness(1.5) saturate(1.15); }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem 1rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; } h2 { margin-top: 2.5rem; font-size: 1.25rem; } h3 { font-size: 1.05rem; }
p.note, li.fact, footer { color: var(--soft); font-size: .9rem; }
.verdict { border-left: 4px solid #d55e00; padding: .3rem 0 .3rem .9rem; margin: .6rem 0; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-size: .86rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .6rem; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
td { white-space: nowrap; } td.wrap { white-space: normal; min-width: 14rem; } tr:last-child td { border-bottom: 0; }
tr.ours td { background: var(--mark); font-weight: 600; }
svg { display: block; width: 100%; height: auto; } .wide { overflow-x: auto; } .wide svg { min-width: 40rem; }
details { margin: .6rem 0; } summary { cursor: pointer; color: var(--soft); }
.key { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; margin: .6rem 0; padding: 0; list-style: none; }
.key li { font-size: .86rem; }
.key svg { display: inline-block; width: 1.8rem; height: .6rem; margin-right: .4rem; }
code { font-size: .85em; overflow-wrap: anywhere; } nav a { margin-right: 1rem; } a { color: inherit; }
"""
_LONG = 40
"""Characters from which a cell of a table is broken into lines."""


def as_html(report: Report) -> str:
    """Return the page, with every picture in it. Raises `ConfigurationError` where matplotlib is missing."""
    parts = [*_head(report), *(_together(report.comparisons) if report.scored_together else ())]
    for split, meaning in SPLITS.items():
        found = [c for c in misses_first(report.comparisons) if c.setting.split == split]
        if found:
            parts.append(f'<h2 id="{split}">Tasks {escape(meaning)}</h2>')
            parts += [part for comparison in found for part in _setting(comparison, report.loss_label)]
    body = "\n".join([*parts, *_measured(report)])
    viewport = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    head = f'<meta charset="utf-8">{viewport}<title>{escape(report.title)}</title><style>{_STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n'


def _head(report: Report) -> Iterator[str]:
    yield f"<h1>{escape(report.title)}</h1>"
    yield from (f'<p class="verdict">{escape(overall_text(found))}</p>' for found in overall(report.comparisons))
    splits = dict.fromkeys(c.setting.split for c in report.comparisons)
    links = "".join(f'<a href="#{split}">{escape(SPLITS[split])}</a>' for split in SPLITS if split in splits)
    yield f'<nav>Tasks: {links}<a href="#measured">how it was measured</a></nav>'


def _together(comparisons: Sequence[Comparison]) -> Iterator[str]:
    """What only several tasks together say."""
    yield "<h2>All optimizers</h2>"
    yield _table(optimizers_table(comparisons))
    yield "<h2>Performance profile</h2>"
    yield '<p class="note">How often an optimizer is at the target within τ times the steps of the best one there.</p>'
    yield f'<div class="wide">{profile_picture(profile(comparisons), comparisons[0], svg)}</div>'
    yield _key(comparisons[0])
    yield "<h2>Like meta-training, and unlike it</h2>"
    yield _table(splits_table(comparisons))
    yield "<h2>Tasks, misses first</h2>"
    yield _table(tasks_table(comparisons))


def _setting(comparison: Comparison, loss_label: str) -> Iterator[str]:
    setting = comparison.setting
    yield f"<h3>{escape(setting.name)}</h3>"
    yield f"<p>{escape(verdict(comparison))}</p>"
    yield f'<div class="wide">{setting_svg(comparison, loss_label)}</div>'
    yield _key(comparison)
    rows = [COLUMNS, *(table_row(comparison, name) for name in comparison.scores)]
    yield _folded("Final losses", _table(Table("", rows, [name in comparison.judged for name in comparison.scores])))
    yield _folded("Diagnosis of each optimizer's runs", _table(diagnoses_table(comparison)))
    yield _folded("Every setting and trial", _table(trials_table(comparison)))
    text = f"{setting.family}, {setting.steps:,} steps, {setting.seeds} seeds from {setting.seed}; "
    text += f"a training loss is the mean of {setting.smoothing} steps before the update"
    yield f'<p class="note"><code>{escape(text)}</code></p>'


def _key(comparison: Comparison) -> str:
    """Which colour is whose."""
    dashes = {"--": "5 2", "-.": "5 2 1 2", ":": "1 2"}
    items = []
    for name, style in reversed(styles(comparison).items()):
        pattern = dashes.get(style.get("linestyle", "-"), "none")
        line = f'<line x1="0" y1="3" x2="18" y2="3" stroke="{style["color"]}" stroke-width="{style["linewidth"]}"'
        mark = f'<svg viewBox="0 0 18 6" aria-hidden="true">{line} stroke-dasharray="{pattern}"/></svg>'
        items.append(f"<li>{mark}{escape(comparison.scores[name].label)}</li>")
    return f'<ul class="key">{"".join(items)}</ul>'


def _measured(report: Report) -> Iterator[str]:
    yield '<h2 id="measured">How this was measured</h2><ul>'
    lines = "\n".join(list(protocol(report))[1:]).split("\n- ")
    yield from (f'<li class="fact">{escape(line.removeprefix("- "))}</li>' for line in lines)
    yield "</ul>"


def _folded(title: str, content: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def _table(table: Table) -> str:
    headings, *rows = table.rows
    head = "".join(f"<th>{escape(cell)}</th>" for cell in headings)
    body = "".join(_row(row, ours) for row, ours in zip(rows, table.bold, strict=True))
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{note}'


def _row(row: Sequence[str], ours: bool) -> str:
    cells = (f"<td{' class=wrap' if len(cell) > _LONG else ''}>{escape(cell)}</td>" for cell in row)
    return f"<tr{' class=ours' if ours else ''}>{''.join(cells)}</tr>"
