"""Analytic families and augmentations, in the settings in which every test of families sees them."""

from l2o.tasks import (
    Bfloat16Gradients,
    ConvexQuadratic,
    DelayedGradients,
    GradientNoise,
    ImageMLP,
    Lasso,
    Plateau,
    Quadratic,
    Rastrigin,
    Reparametrized,
    Rosenbrock,
    Saddle,
)
from l2o.types import TaskFamily

LANDSCAPES = {
    "convex": ConvexQuadratic(noise=0.3),
    "ill-conditioned": ConvexQuadratic(dims=(1, 5), conditions=(1e3, 1e6)),
    "rosenbrock": Rosenbrock(dims=(2, 7), noise=0.1),
    "saddle": Saddle(dims=(1, 6)),
    "plateau": Plateau(dims=(3, 3)),
    "rastrigin": Rastrigin(noise=0.1),
}
ANALYTIC: dict[str, TaskFamily] = {**LANDSCAPES, "lasso": Lasso(rows=6, dims=(3, 9), noise=0.1)}
AUGMENTED: dict[str, TaskFamily] = {
    "reparametrized": Reparametrized(ImageMLP(width=4, batch_size=8), per="tensor"),
    "noisy": GradientNoise(Quadratic(dim=3)),
    "rounded": Bfloat16Gradients(Rastrigin(dims=(2, 4))),
    "delayed": DelayedGradients(ConvexQuadratic(dims=(2, 4)), delay=2),
    "all": Reparametrized(DelayedGradients(GradientNoise(Bfloat16Gradients(Saddle(dims=(2, 4)))))),
}
