"""Judging optimizers: a learned rule once, baselines over grids of learning rates, on the same problems.

`compare` runs a `Setting`; `Report`, `write` and `print_tables` tell the result. The parts: `run` (curves of any rule),
`run_learned` and `run_baseline` (trials), `score` (verdicts), `step_cost` (time and memory of a plug-in step).

`inspect` experiments with one rule alone; `findings` and `inspection_png` tell what it does.
"""

from l2o.evaluation.baselines import BASELINES, Baseline, Scheduled, baselines
from l2o.evaluation.compare import Comparison, compare
from l2o.evaluation.cost import Cost, optimizer_costs, step_cost
from l2o.evaluation.curves import Curves, run
from l2o.evaluation.findings import Finding, findings
from l2o.evaluation.inspection import Inspection, inspect
from l2o.evaluation.inspection_plots import inspection_png
from l2o.evaluation.report import Report, prepare_folder, print_tables, summary, write
from l2o.evaluation.scores import Score, score, speed_up
from l2o.evaluation.trials import Setting, Trials, run_baseline, run_learned

__all__ = [
    "BASELINES",
    "Baseline",
    "Comparison",
    "Cost",
    "Curves",
    "Finding",
    "Inspection",
    "Report",
    "Scheduled",
    "Score",
    "Setting",
    "Trials",
    "baselines",
    "compare",
    "findings",
    "inspect",
    "inspection_png",
    "optimizer_costs",
    "prepare_folder",
    "print_tables",
    "run",
    "run_baseline",
    "run_learned",
    "score",
    "speed_up",
    "step_cost",
    "summary",
    "write",
]
