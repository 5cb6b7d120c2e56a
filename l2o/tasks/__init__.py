"""Inner problems, one family a file. A line in ``__all__`` lists one, a file in ``configs/task`` names a preset."""

from l2o.tasks.analytic import ConvexQuadratic, Plateau, Rastrigin, Rosenbrock, Saddle
from l2o.tasks.augment import Bfloat16Gradients, DelayedGradients, GradientNoise, Reparametrized
from l2o.tasks.image import ImageMLP
from l2o.tasks.lasso import Lasso
from l2o.tasks.module import ModuleTask
from l2o.tasks.quadratic import Quadratic
from l2o.tasks.repeated import Repeated

__all__ = [
    "Bfloat16Gradients",
    "ConvexQuadratic",
    "DelayedGradients",
    "GradientNoise",
    "ImageMLP",
    "Lasso",
    "ModuleTask",
    "Plateau",
    "Quadratic",
    "Rastrigin",
    "Reparametrized",
    "Repeated",
    "Rosenbrock",
    "Saddle",
]
