"""What a rule does, seen from outside.

`inspect` experiments with one rule alone; `findings` and `inspection_png` tell what it does.
`l2o.inspection.rules_table` holds all rules against their originals.
"""

from l2o.inspection.experiments import Inspection, inspect
from l2o.inspection.findings import Finding, findings
from l2o.inspection.plots import inspection_png

__all__ = ["Finding", "Inspection", "findings", "inspect", "inspection_png"]
