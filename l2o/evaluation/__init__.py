"""Judging optimizers: learned rules once, baselines over grids of learning rates or untuned, on the same problems.

`run_suite` runs what a `Store` lacks of a `Suite`, that is of several `Setting`s; `summaries`, `by_split` and `profile`
say what it comes to; `Report`, `write` and `print_tables` tell it. What is compared is an `Entrant`: a rule with its θ
(`RuleEntrant`), any torch optimizer (`TorchEntrant`), or a rule over a grid (`Baseline`). The parts: `run` (curves of
any rule), `run_entrant` (trials), `condense` and `score_kept`, `compare` (one setting, without a store), `step_cost`
(time and memory of a plug-in step). `diagnosis` and `landscape` are about single runs.
"""

from l2o.bench.cost import Cost, optimizer_costs, step_cost
from l2o.evaluation.aggregate import Estimate, Summary, by_split, profile, summaries
from l2o.evaluation.baselines import BASELINES, Baseline, Scheduled, baselines
from l2o.evaluation.compare import GIVEN, LEARNED, Comparison, compare
from l2o.evaluation.curves import Curves, run
from l2o.evaluation.entrants import Entrant, RuleEntrant, TorchEntrant
from l2o.evaluation.report import Report, new_console, prepare_folder, print_tables, summary, write, write_text
from l2o.evaluation.scores import Kept, Score, condense, score, score_kept, speed_up
from l2o.evaluation.store import Record, Store
from l2o.evaluation.suite import Done, Job, Suite, comparisons, missing, run_jobs, run_suite
from l2o.evaluation.trials import Setting, Trials, run_baseline, run_entrant, run_learned

__all__ = [
    "BASELINES",
    "GIVEN",
    "LEARNED",
    "Baseline",
    "Comparison",
    "Cost",
    "Curves",
    "Done",
    "Entrant",
    "Estimate",
    "Job",
    "Kept",
    "Record",
    "Report",
    "RuleEntrant",
    "Scheduled",
    "Score",
    "Setting",
    "Store",
    "Suite",
    "Summary",
    "TorchEntrant",
    "Trials",
    "baselines",
    "by_split",
    "compare",
    "comparisons",
    "condense",
    "missing",
    "new_console",
    "optimizer_costs",
    "prepare_folder",
    "print_tables",
    "profile",
    "run",
    "run_baseline",
    "run_entrant",
    "run_jobs",
    "run_learned",
    "run_suite",
    "score",
    "score_kept",
    "speed_up",
    "step_cost",
    "summaries",
    "summary",
    "write",
    "write_text",
]
