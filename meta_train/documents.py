"""``python -m meta_train.documents``: write what documents take from records, so that no figure is copied by hand.

Model cards (``pretrained/*/README.md``) and ``pretrained/README.md`` of ``card.json``; in the README and in docs/ what
stands between ``<!-- table of FILE -->`` or ``<!-- made: NAME -->`` and the end of it. ``--card CHECKPOINT`` writes the
model card of a checkpoint of yours instead.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from l2o.checkpoints.model_card import compute, model_card, number, table
from l2o.checkpoints.pretrained import CARD, aliases, list_pretrained, resolve
from l2o.checkpoints.store import load, read_card
from l2o.disk import atomic_write
from l2o.evaluation.markdown import results_block
from l2o.types import ConfigurationError
from meta_train.config.compose import main_guard

ROOT = Path(__file__).resolve().parents[1]
SUITE = "docs/results/standard/results.json"
STEPS, STEPS_OF_OTHERS = "benchmarks/step.json", "benchmarks/step-rules.json"
_BLOCK = re.compile(r"(<!-- (table of|made:) (\S+) -->\n).*?(<!-- end(?: of table)? -->)", re.S)

_SHELF = """# Pretrained rules

Written by `python -m meta_train.documents` from the cards. Each folder has θ (`theta.safetensors`), `card.json` (the
command that made it, data, seeds, commit, hardware, compute, measured results, licence, checksum, what the rule is for
and what not), and the card as text. `l2o.read_card(name)` reads a card, `l2o.list_pretrained()` lists the names.
Aliases (`aliases.json`) will come to mean better rules, while a name of its own keeps its meaning.

{which}

{figures}

Figures are those of `suite=standard` ([report](../docs/results/standard/report.md)): targets are tuned Adam's final
training losses, speed-ups are medians over problems with a miss as 0. Costs are times of a step over fused AdamW's on
the same tensors ([measured](../docs/performance.md), one thread; from the card where that has none).

**Those without an alias are not for problems of yours.** They show what meta-training on few kinds of small problems
makes, serve experiments and the tests, and are starts for meta-training of your own.

## Where they are from

{origin}

## On held-out tasks of their own kind

Final training losses, mean over seeds and 95% interval; the learned rule once a seed, untuned, the others at the best
of their grid. The commands are on the cards.

{own}

## Know before use

{notes}
"""


def model_cards() -> dict[Path, str]:
    """Return the text of each model card by its path."""
    return {
        ROOT / "pretrained" / name / "README.md": model_card(name, read_card(name), _others(name))
        for name in list_pretrained()
    }


def pretrained_readme() -> str:
    """Return the text of ``pretrained/README.md``."""
    cards = {name: read_card(name) for name in _names()}
    notes = [f"- `{name}`: {note}" for name, card in cards.items() for note in card.get("notes", ())]
    return _SHELF.format(
        which=which(), figures=figures(), origin=_origins(cards), own=_own_results(cards), notes="\n".join(notes)
    )


def which() -> str:
    """Return a row for each shipped rule: what it is for."""
    cards = {name: read_card(name) for name in _names()}
    rows = [(_shown(name), card.get("for", "–"), card.get("not_for", "–")) for name, card in cards.items()]
    return table(("name", "take it for", "do not take it for"), rows)


def figures() -> str:
    """Return a row for each shipped rule: what it reaches, and what a step costs."""
    scores = {found["label"]: found for found in _json(SUITE)["optimizers"]}
    columns = ("name", "targets reached", "speed-up", "validation / Adam's", "diverged runs", "a step costs")
    return table(columns, [(_shown(name), *_figures(name, scores), _cost(name)) for name in _names()])


def words() -> str:
    """Return what each shipped rule with an alias misses and overfits on, one by one."""
    scores = {found["label"]: found for found in _json(SUITE)["optimizers"]}
    lines = []
    for name in aliases():
        missed = [task for task, speed_up in scores[name]["speed_ups"].items() if not speed_up]
        lines.append(f"- `{name}` misses {', '.join(missed) or 'nothing'}.")
        lines.append(f"- `{name}` overfits on {', '.join(scores[name]['overfitted']) or 'nothing'}.")
    return "\n".join(lines)


def costs() -> str:
    """Return times of a step over fused AdamW's, by shapes, one thread."""
    records = [r for r in _json(STEPS) if r["threads"] == 1]
    rules, shapes = (list(dict.fromkeys(r[key] for r in records)) for key in ("rule", "shapes"))
    ratios = {(r["rule"], r["shapes"]): f"{r['ratio_to_fused_adamw']:.1f}" for r in records}
    rows = [(shape, *(ratios.get((rule, shape), "–") for rule in rules)) for shape in shapes]
    return table(("tensors", *rules), rows)


def hardware() -> str:
    """Return what the steps were measured on."""
    used = _json(STEPS)[0]["hardware"]
    return f"Measured on {used['cpu']}, {used['cores']} cores, torch {used['torch']}."


BLOCKS: dict[str, Callable[[], str]] = {
    "which": which,
    "figures": figures,
    "words": words,
    "costs": costs,
    "hardware": hardware,
}


def filled(text: str) -> str:
    """Return ``text`` with every block made anew. Raises `ConfigurationError` for a block that nothing makes."""
    return _BLOCK.sub(lambda block: f"{block[1]}{_made(block[2], block[3])}\n{block[4]}", text)


def _made(kind: str, name: str) -> str:
    if kind == "table of":
        return results_block(_json(name))
    if name not in BLOCKS:
        raise ConfigurationError(f"<!-- made: {name} -->: expected one of {', '.join(BLOCKS)}")
    return BLOCKS[name]()


def documents() -> dict[Path, str]:
    """Return every document that this command writes, as it has to be."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    made = {path: filled(path.read_text("utf-8")) for path in pages}
    return {**model_cards(), ROOT / "pretrained" / "README.md": pretrained_readme(), **made}


def _json(name: str) -> Any:
    return json.loads((ROOT / name).read_text("utf-8"))


def _others(name: str) -> list[str]:
    return [alias for alias, meant in aliases().items() if meant == name]


def _names() -> list[str]:
    """Those with an alias first, in the order of the aliases."""
    return list(dict.fromkeys([*aliases().values(), *list_pretrained()]))


def _shown(name: str) -> str:
    return ", ".join(f"`{each}`" for each in (*_others(name), name))


def _figures(name: str, scores: Mapping[str, Any]) -> tuple[str, ...]:
    found = next((scores[each] for each in (*_others(name), name) if each in scores), None)
    if found is None:
        return ("not run",) * 4
    reached = sum(speed_up > 0 for speed_up in found["speed_ups"].values())
    median, low, high = found["median"]
    interval = f"{median:.2f} [{low:.2g}, {high:.2g}]"
    return f"{reached} of {found['tasks']}", interval, number(found["valid"]), f"{found['diverged']} of {found['runs']}"


def _cost(name: str) -> str:
    """The range over shapes on one thread, of the first record that has the rule, or the card's."""
    own = {name, *_others(name)}
    both = ([r for r in _json(path) if r["rule"] in own and r["threads"] == 1] for path in (STEPS, STEPS_OF_OTHERS))
    ratios = [r["ratio_to_fused_adamw"] for r in next(filter(None, both), [])]
    if ratios:
        low, high = (f"{x:.2g}" if x < 100 else f"{x:.0f}" for x in (min(ratios), max(ratios)))
        return f"{low} to {high} × fused AdamW"
    found = read_card(name).get("results", {}).get("costs", {})
    if not found:
        return "not measured"
    return f"{found['learned']['seconds'] / found['AdamW (fused)']['seconds']:.0f} × fused AdamW"


def _origins(cards: Mapping[str, Any]) -> str:
    rows = []
    for name, card in cards.items():
        size = sum(tensor.numel() for tensor in load(name)[1].values())
        rule, licence = f"`{card['rule']}`, {size:,} numbers", card.get("licence", "not said")
        rows.append((f"[{name}]({name}/README.md)", rule, compute(card), licence))
    return table(("name", "rule", "meta-training", "licence"), rows)


def _own_results(cards: Mapping[str, Any]) -> str:
    columns = ("rule, task", "learned", "Adam", "SGD", "validation: learned / Adam", "diverged")
    settings = [(name, each) for name, card in cards.items() for each in card.get("results", {}).get("settings", ())]
    return table(columns, [_own_row(name, setting) for name, setting in settings])


def _own_row(name: str, setting: Mapping[str, Any]) -> tuple[str, ...]:
    learned, adam, sgd = (setting["optimizers"][key] for key in ("learned", "adam", "sgd"))
    low, high = learned["interval"]
    return (
        f"`{name}`, {setting['name']}: {setting['steps']:,} steps, {setting['seeds']} seeds",
        f"{number(learned['mean'])} [{number(low)}, {number(high)}]",
        number(adam["mean"]),
        number(sgd["mean"]),
        f"{number(learned['valid'])} / {number(adam['valid'])}",
        str(learned["diverged"]),
    )


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    made = argparse.ArgumentParser(
        prog="python -m meta_train.documents",
        description="Write what documents take from records: model cards, pretrained/README.md, tables of results.",
    )
    made.add_argument(
        "--card", metavar="CHECKPOINT", help="only the model card of this checkpoint, beside its card.json"
    )
    return made


def run(arguments: Sequence[str] | None = None) -> None:
    """Write, and name what has changed."""
    given = parser().parse_args(arguments)
    if given.card:
        folder = resolve(given.card)
        made = {folder / "README.md": model_card(folder.name, json.loads((folder / CARD).read_text("utf-8")))}
    elif not (ROOT / "docs").is_dir() or not (ROOT / "pretrained").is_dir():
        raise ConfigurationError(f"{ROOT} is no checkout of l2o; --card CHECKPOINT writes the card of a checkpoint")
    else:
        made = documents()
    changed = [path for path, text in made.items() if not path.exists() or path.read_text("utf-8") != text]
    for path in changed:
        atomic_write(path, made[path].encode())
        print(f"written: {path}")


@main_guard
def main() -> None:
    """Run the command."""
    run()


if __name__ == "__main__":
    main()
