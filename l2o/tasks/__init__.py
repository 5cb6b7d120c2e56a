"""Inner problems, one family a file; a line in ``__all__`` makes one known to configs and tests."""

from l2o.tasks.image import ImageMLP
from l2o.tasks.module import ModuleTask
from l2o.tasks.quadratic import Quadratic
from l2o.tasks.repeated import Repeated

__all__ = ["ImageMLP", "ModuleTask", "Quadratic", "Repeated"]
