"""Classifiers of MNIST's test images and of digits: attention, experts, convolutions of several kinds, perceptrons."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from meta_train.problems.common import Begun, Draw, Parts, Residual, fit, fixed, perceptron, problem
from meta_train.problems.data import digits, mnist


class VisionTransformer(nn.Module):
    """Three blocks of this width over 16 patches of 7² pixels and a token for the class; images ``[n, 1, 28, 28]``."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 7, 7)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.place = nn.Parameter(torch.randn(1, 17, width) * 0.02)
        block = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, 3, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``[n, 10]`` of ``images``."""
        patches = self.patches(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(images), -1, -1), patches], 1) + self.place
        logits: Tensor = self.head(self.blocks(tokens)[:, 0])
        return logits


@problem(600)
def vit(draw: Draw) -> Begun:
    """Classify MNIST by a small vision transformer."""
    return fit(VisionTransformer(), draw, 32, *mnist())


@problem(800)
def moe(draw: Draw) -> Begun:
    """Classify MNIST by six experts, of which a gate takes a mean."""
    images, labels = mnist()
    experts = 6
    model = Parts(
        gate=nn.Linear(784, experts),
        inner=torch.randn(experts, 784, 24) / 28,
        outer=torch.randn(experts, 24, 10) / 5,
    )

    def loss() -> Tensor:
        x, y = draw.batch(64, images.flatten(1), labels)
        weights = model.gate(x).softmax(1)
        hidden = torch.einsum("bi,eio->beo", x, model.inner).relu()
        logits = torch.einsum("beh,eho->beo", hidden, model.outer)
        return F.cross_entropy((weights[..., None] * logits).sum(1), y)

    return Begun(model, loss)


class ResidualBlock(nn.Module):
    """Two convolutions with batch norm beside one of 1×1, without biases."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.first_norm = nn.BatchNorm2d(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.second_norm = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[n, outputs, height, width]`` of ``x [n, inputs, ...]``."""
        hidden = self.first_norm(self.first(x)).relu()
        total: Tensor = self.second_norm(self.second(hidden)) + self.shortcut(x)
        return total.relu()


def _pooled(width: int) -> list[nn.Module]:
    """Of the end of a convolutional classifier: means over places, and logits."""
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)]


@problem(500)
def resnet_bn(draw: Draw) -> Begun:
    """Classify MNIST by a small residual network with batch norm."""
    stem = [nn.Conv2d(1, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    model = nn.Sequential(*stem, ResidualBlock(8, 16, 2), ResidualBlock(16, 32, 2), *_pooled(32))
    return fit(model, draw, 32, *mnist())


def _separable(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """A convolution of each channel, and one of 1×1 over all of them."""
    channels = nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False)
    across = nn.Conv2d(inputs, outputs, 1, bias=False)
    return nn.Sequential(channels, nn.BatchNorm2d(inputs), nn.ReLU6(), across, nn.BatchNorm2d(outputs), nn.ReLU6())


@problem(500)
def depthwise(draw: Draw) -> Begun:
    """Classify MNIST, with smoothed labels, by convolutions that are depthwise and pointwise in turn."""
    body = [nn.Conv2d(1, 12, 3, 2, 1), _separable(12, 24, 2), _separable(24, 48, 2), _separable(48, 48, 1)]
    model = nn.Sequential(*body, *_pooled(48))
    return fit(model, draw, 32, *mnist(), partial(F.cross_entropy, label_smoothing=0.1))


@problem(500)
def weight_norm_conv(draw: Draw) -> Begun:
    """Classify MNIST by convolutions whose weights are a direction and a length."""
    layers = [weight_norm(nn.Conv2d(1, 8, 5, 2)), weight_norm(nn.Conv2d(8, 16, 5, 2)), weight_norm(nn.Linear(256, 10))]
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), nn.Flatten(), layers[2])
    return fit(model, draw, 32, *mnist())


@problem(500)
def finetune_head_two_groups(draw: Draw) -> Begun:
    """Train a new head, which starts at zero, together with the convolutions under it, the same in every run."""
    body = fixed(
        5, lambda: nn.Sequential(nn.Conv2d(1, 16, 5, 3), nn.ReLU(), nn.Conv2d(16, 32, 3, 2), nn.ReLU(), nn.Flatten())
    )
    head = nn.Linear(288, 10)
    nn.init.zeros_(head.weight)
    return fit(nn.Sequential(body, head), draw, 32, *mnist())


@problem(500)
def distill(draw: Draw) -> Begun:
    """Learn what a random teacher of other activations says of MNIST."""
    images, _ = mnist()
    teacher = fixed(99, lambda: perceptron(784, 64, 10, activation=nn.Tanh)).requires_grad_(False)
    model = perceptron(784, 32, 10)

    def loss() -> Tensor:
        (x,) = draw.batch(64, images.flatten(1))
        target = (8 * teacher(x)).log_softmax(1)
        return F.kl_div(model(x).log_softmax(1), target, log_target=True, reduction="batchmean")

    return Begun(model, loss)


@problem(500)
def label_noise_wide(draw: Draw) -> Begun:
    """Classify MNIST, nearly a third of whose labels are random."""
    images, labels = mnist()
    wrong = draw.uniform(len(labels)) < 0.3
    labels = torch.where(wrong, draw.integers(10, len(labels)), labels)
    return fit(perceptron(784, 256, 10), draw, 64, images.flatten(1), labels)


@problem(50)
def short_50(draw: Draw) -> Begun:
    """Classify MNIST by a perceptron in 50 steps."""
    images, labels = mnist()
    return fit(perceptron(784, 100, 10), draw, 128, images.flatten(1), labels)


@problem(100)
def short_100_conv(draw: Draw) -> Begun:
    """Classify MNIST by convolutions in 100 steps."""
    convolutions = [nn.Conv2d(1, 16, 5, 2), nn.ReLU(), nn.Conv2d(16, 32, 5, 2), nn.ReLU()]
    return fit(nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(512, 10)), draw, 64, *mnist())


@problem(500)
def maxout_bn_mlp_small_batch(draw: Draw) -> Begun:
    """Classify digits by a perceptron with batch norm, in batches of eight."""
    hidden = [nn.Linear(64, 96), nn.BatchNorm1d(96), nn.ReLU(), nn.Linear(96, 96), nn.BatchNorm1d(96), nn.ReLU()]
    return fit(nn.Sequential(*hidden, nn.Linear(96, 10)), draw, 8, *digits())


@problem(400)
def online_batch_1(draw: Draw) -> Begun:
    """Classify digits by a perceptron, one at a time."""
    return fit(perceptron(64, 32, 10), draw, 1, *digits())


@problem(800)
def deep_narrow_res(draw: Draw) -> Begun:
    """Classify digits by ten narrow residual blocks with layer norm."""
    first = nn.Linear(64, 24)
    blocks = [Residual(nn.LayerNorm(24), nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 24)) for _ in range(10)]
    return fit(nn.Sequential(first, *blocks, nn.Linear(24, 10)), draw, 16, *digits())


@problem(500)
def hinge_svm_rff(draw: Draw) -> Begun:
    """Fit a linear support vector machine to random Fourier features of digits."""
    images, labels = digits()
    directions, phases = draw.normal(64, 200) * 2, draw.uniform(200) * 6.28
    features = (images @ directions / 4 + phases).cos() * 0.1
    model = nn.Linear(200, 10)

    def loss() -> Tensor:
        x, y = draw.batch(64, features, labels)
        return F.multi_margin_loss(model(x), y) + 1e-4 * model.weight.square().sum()

    return Begun(model, loss)


@problem(600)
def uncertainty_weights(draw: Draw) -> Begun:
    """Classify digits and predict how dark they are, with weights of the two losses that are learned."""
    images, labels = digits()
    model = Parts(
        body=nn.Sequential(nn.Linear(64, 64), nn.ReLU()),
        classes=nn.Linear(64, 10),
        ink=nn.Linear(64, 1),
        log_variances=torch.zeros(2),
    )

    def loss() -> Tensor:
        x, y = draw.batch(64, images, labels)
        hidden = model.body(x)
        first, second = model.log_variances
        errors = F.cross_entropy(model.classes(hidden), y), F.mse_loss(model.ink(hidden)[:, 0], 100 * x.mean(1))
        return (-first).exp() * errors[0] + first / 2 + (-second).exp() * errors[1] + second / 2

    return Begun(model, loss)
