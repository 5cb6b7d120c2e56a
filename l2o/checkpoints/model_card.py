"""A card as Markdown, for people: a pure function of ``card.json``, to lie beside it as ``README.md``."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Card = Mapping[str, Any]

_METADATA = "---\nlicense: {licence}\nlibrary_name: l2o\ntags: [learned-optimizer, optimizer, pytorch]\n---\n"
_FACTS = ("Command", "Hardware", "Date", "Commit")
_COLUMNS = ("optimizer", "trials a seed", "training loss [95%]", "validation", "speed-up", "diverged")


def model_card(name: str, card: Card, other_names: Sequence[str] = ()) -> str:
    """Return the whole text; entries that a card does not have are left out.

    name: what the user loads it by, or its folder.     other_names: aliases.
    """
    return "\n".join([*_head(name, card, other_names), *_origin(card), *_results(card), *_notes(card)]) + "\n"


def compute(card: Card) -> str:
    """Return what meta-training took, in a line."""
    spent = card.get("compute", {})
    if not spent.get("inner_steps"):
        return "none: set by hand" if "compute" in card else "not said"
    said = [f"{spent[key]:,} {key.replace('_', ' ')}" for key in ("inner_steps", "outer_steps") if key in spent]
    said += [f"{spent['seconds'] / 60:.0f} min"] if "seconds" in spent else []
    return ", ".join(said)


def number(value: float | None) -> str:
    """Return two digits; None, which is how JSON has numbers that are not finite, is a dash."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.2g}"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of Markdown."""
    cells = (columns, ["---"] * len(columns), *([text.replace("|", r"\|") for text in row] for row in rows))
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _head(name: str, card: Card, other_names: Sequence[str]) -> Iterator[str]:
    yield _METADATA.format(licence=str(card.get("licence", "other")).lower())
    yield f"# {name}\n"
    yield "Written from `card.json` by `python -m meta_train.documents`.\n"
    if other_names:
        yield f"Also known as {', '.join(f'`{each}`' for each in other_names)}.\n"
    yield f'```python\noptimizer = l2o.LearnedOptimizer(model.parameters(), "{name}", total_steps=1_000)\n```\n'
    titles = {"for": "For", "not_for": "Not for"}
    yield from (f"**{title}**: {card[key]}.\n" for key, title in titles.items() if key in card)


def _origin(card: Card) -> Iterator[str]:
    recipe = card.get("recipe", {})
    rows = {
        "rule": f"`{card['rule']}({', '.join(f'{k}={v!r}' for k, v in card['hyperparameters'].items())})`",
        "θ": f"{card['theta']['size']:,} bytes, SHA-256 `{card['theta']['sha256']}`",
        "compute": compute(card),
        "hardware": _line(card.get("hardware")),
        "seeds": _line(card.get("seeds")),
        "commit": f"`{card['commit']}`" if "commit" in card else "",
        "versions": _line(card.get("versions")),
        "licence": card.get("licence", ""),
        "sources": "; ".join(recipe.get("sources", ())),
    }
    yield "## How it came about\n"
    yield table(("what", "which"), [(key, text) for key, text in rows.items() if text]) + "\n"
    if "command" in recipe:
        yield f"```bash\n{recipe['command']}\n```\n"
    if "constants" in recipe:
        yield f"Constants: {recipe['constants']}.\n"
    data = card.get("data")
    if isinstance(data, str):
        yield f"Data: {data}.\n"
    elif data:
        yield f"Data:\n\n```json\n{json.dumps(data, indent=1)}\n```\n"


def _line(entries: Mapping[str, Any] | None) -> str:
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in (entries or {}).items())


def _results(card: Card) -> Iterator[str]:
    results = card.get("results", {})
    if not results.get("settings"):
        return
    yield "## Results\n"
    for setting in results["settings"]:
        yield f"### {setting['name']}: {setting['steps']:,} steps, {setting['seeds']} seeds from {setting['seed']}\n"
        yield table(_COLUMNS, [_row(found) for found in setting["optimizers"].values()])
        yield f"\n{setting['verdict']} Task: `{setting['task']}`.\n"
    facts = results.get("facts", {})
    yield "\n".join(f"- {key}: {facts[key]}" for key in _FACTS if key in facts) + "\n"


def _row(found: Mapping[str, Any]) -> tuple[str, ...]:
    low, high = found["interval"]
    return (
        found["label"],
        str(found["trials"]),
        f"{number(found['mean'])} [{number(low)}, {number(high)}]",
        number(found["valid"]),
        f"{found['speed_up']:.2f}" if found.get("speed_up") else "missed",
        str(found["diverged"]),
    )


def _notes(card: Card) -> Iterator[str]:
    if "notes" in card:
        yield "## Notes\n"
        yield from (f"- {note}" for note in card["notes"])
