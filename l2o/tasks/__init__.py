"""Inner problems, one family a file. A line in ``__all__`` lists one, a file in ``configs/task`` names a preset."""

from l2o.tasks.analytic import ConvexQuadratic, Plateau, Rastrigin, Rosenbrock, Saddle
from l2o.tasks.augment import Bfloat16Gradients, DelayedGradients, GradientNoise, Reparametrized
from l2o.tasks.autoencoder import ImageAutoencoder
from l2o.tasks.characters import CharRNN, CharTransformer
from l2o.tasks.conv import ImageConv
from l2o.tasks.coordinates import CoordinateMLP
from l2o.tasks.image import ImageMLP
from l2o.tasks.lasso import Lasso
from l2o.tasks.linear import LinearNetwork
from l2o.tasks.lora import ImageFineTune, ImageLoRA
from l2o.tasks.module import ModuleTask
from l2o.tasks.quadratic import Quadratic
from l2o.tasks.repeated import Repeated
from l2o.tasks.residual import ImageResNet
from l2o.tasks.tables import DiabetesMLP, TableClassifier
from l2o.tasks.words import WordMLP

__all__ = [
    "Bfloat16Gradients",
    "CharRNN",
    "CharTransformer",
    "ConvexQuadratic",
    "CoordinateMLP",
    "DelayedGradients",
    "DiabetesMLP",
    "GradientNoise",
    "ImageAutoencoder",
    "ImageConv",
    "ImageFineTune",
    "ImageLoRA",
    "ImageMLP",
    "ImageResNet",
    "Lasso",
    "LinearNetwork",
    "ModuleTask",
    "Plateau",
    "Quadratic",
    "Rastrigin",
    "Reparametrized",
    "Repeated",
    "Rosenbrock",
    "Saddle",
    "TableClassifier",
    "WordMLP",
]
