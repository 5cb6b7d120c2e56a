"""Inner problems, one family a file. A line here lists one, a file in ``configs/task`` names a preset."""

from l2o.checks import listed
from l2o.tasks.analytic import ConvexQuadratic as ConvexQuadratic
from l2o.tasks.analytic import Plateau as Plateau
from l2o.tasks.analytic import Rastrigin as Rastrigin
from l2o.tasks.analytic import Rosenbrock as Rosenbrock
from l2o.tasks.analytic import Saddle as Saddle
from l2o.tasks.augment import Bfloat16Gradients as Bfloat16Gradients
from l2o.tasks.augment import DelayedGradients as DelayedGradients
from l2o.tasks.augment import GradientNoise as GradientNoise
from l2o.tasks.augment import Reparametrized as Reparametrized
from l2o.tasks.autoencoder import ImageAutoencoder as ImageAutoencoder
from l2o.tasks.characters import CharRNN as CharRNN
from l2o.tasks.characters import CharTransformer as CharTransformer
from l2o.tasks.conv import ImageConv as ImageConv
from l2o.tasks.coordinates import CoordinateMLP as CoordinateMLP
from l2o.tasks.image import ImageMLP as ImageMLP
from l2o.tasks.lasso import Lasso as Lasso
from l2o.tasks.linear import LinearNetwork as LinearNetwork
from l2o.tasks.lora import ImageFineTune as ImageFineTune
from l2o.tasks.lora import ImageLoRA as ImageLoRA
from l2o.tasks.module import ModuleTask as ModuleTask
from l2o.tasks.quadratic import Quadratic as Quadratic
from l2o.tasks.repeated import Repeated as Repeated
from l2o.tasks.residual import ImageResNet as ImageResNet
from l2o.tasks.tables import DiabetesMLP as DiabetesMLP
from l2o.tasks.tables import TableClassifier as TableClassifier
from l2o.tasks.words import WordMLP as WordMLP
from l2o.types import TaskFamily

__all__ = listed(globals(), TaskFamily)
