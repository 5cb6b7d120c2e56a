"""Classifiers of pictures: mixers, convolutions of newer kinds, spikes, coarse weights; shapes by attention."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meta_train.problems.common import Begun, Draw, Parts, fit, fixed, perceptron, problem
from meta_train.problems.data import digits, mnist
from meta_train.problems.second.data import TEXTURES, faces, grey


class MixerBlock(nn.Module):
    """A perceptron across tokens and one across channels, each beside a shortcut (Tolstikhin et al. 2021)."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.tokens = perceptron(tokens, 2 * tokens, tokens, activation=nn.GELU)
        self.channels = perceptron(width, 3 * width, width, activation=nn.GELU)

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor like ``x [n, tokens, width]``."""
        x = x + self.tokens(self.norms[0](x).transpose(1, 2)).transpose(1, 2)
        total: Tensor = x + self.channels(self.norms[1](x))
        return total


@problem(400)
def mixer_textures(draw: Draw) -> Begun:
    """Tell from which of eight pictures a patch was cut, by an MLP-Mixer."""
    pictures = [grey(name, 256) for name in TEXTURES]
    blocks = nn.Sequential(MixerBlock(16, 48), MixerBlock(16, 48), nn.LayerNorm(48))
    model = Parts(patches=nn.Conv2d(1, 48, 6, 6), blocks=blocks, head=nn.Linear(48, len(TEXTURES)))
    labels = torch.arange(len(TEXTURES)).repeat_interleave(4)

    def loss() -> Tensor:
        x = torch.cat([draw.patches(picture, 4, 24) for picture in pictures])[:, None]
        tokens = model.patches(x).flatten(2).transpose(1, 2)
        return F.cross_entropy(model.head(model.blocks(tokens).mean(1)), labels)

    return Begun(model, loss)


class ConvNeXtBlock(nn.Module):
    """A wide convolution of each channel and a perceptron, scaled by what begins tiny (Liu et al. 2022)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.spatial = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.channels = perceptron(width, 4 * width, width, activation=nn.GELU)
        self.scale = nn.Parameter(torch.full((width,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor like ``x [n, channels, height, width]``."""
        hidden = self.channels(self.norm(self.spatial(x).permute(0, 2, 3, 1)))
        total: Tensor = x + (self.scale * hidden).permute(0, 3, 1, 2)
        return total


@problem(300)
def convnext_mixup_faces(draw: Draw) -> Begun:
    """Tell faces from other cuttings, two of them blended (mixup), by two blocks of ConvNeXt."""
    images, labels = faces()
    blocks = [ConvNeXtBlock(24) for _ in range(2)]
    model = nn.Sequential(nn.Conv2d(1, 24, 4, 3), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 2))
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def loss() -> Tensor:
        x, y = draw.batch(16, images, F.one_hot(labels).float())
        share, order = draw.uniform(16, 1) ** 6, torch.randperm(16, generator=draw.generator)
        blended = torch.lerp(x, x[order], share[..., None, None])
        return F.cross_entropy(model(blended), torch.lerp(y, y[order], share))

    return Begun(model, loss)


class MBConv(nn.Module):
    """Widened, convolved by channel, weighted by what all places say, and narrowed (Tan and Le 2019)."""

    def __init__(self, inputs: int, outputs: int, stride: int, wider: int = 3) -> None:
        super().__init__()
        width = wider * inputs
        expand = [nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width), nn.SiLU()]
        spatial = [nn.Conv2d(width, width, 3, stride, 1, groups=width, bias=False), nn.BatchNorm2d(width), nn.SiLU()]
        self.wide = nn.Sequential(*expand, *spatial)
        self.squeeze = nn.Sequential(nn.Linear(width, inputs // 2), nn.SiLU(), nn.Linear(inputs // 2, width))
        self.narrow = nn.Sequential(nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[n, outputs, height, width]`` of ``x [n, inputs, ...]``."""
        wide = self.wide(x)
        narrow: Tensor = self.narrow(wide * self.squeeze(wide.mean((2, 3))).sigmoid()[..., None, None])
        return x + narrow if self.shortcut else narrow


@problem(400)
def mbconv_multilabel(draw: Draw) -> Begun:
    """Name both of two digits of MNIST that lie over each other, by blocks of EfficientNet."""
    images, labels = mnist()
    stem = [nn.Conv2d(1, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.SiLU()]
    body = [MBConv(8, 16, 2), MBConv(16, 16, 1), MBConv(16, 32, 2)]
    model = nn.Sequential(*stem, *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out")

    def loss() -> Tensor:
        (first, a), (second, b) = draw.batch(16, images, labels), draw.batch(16, images, labels)
        there = torch.maximum(F.one_hot(a, 10), F.one_hot(b, 10)).float()
        return F.binary_cross_entropy_with_logits(model(torch.maximum(first, second)), there)

    return Begun(model, loss)


@problem(500)
def spiking_digits(draw: Draw) -> Begun:
    """Classify digits by neurons that leak and spike, gradients through a sigmoid instead of the spike."""
    images, labels = digits()
    model = Parts(inner=nn.Linear(64, 100), outer=nn.Linear(100, 10), leaks=torch.tensor([2.0, 2.0]))

    def loss() -> Tensor:
        x, y = draw.batch(64, images, labels)
        current, keep = 2 * model.inner(x), model.leaks.sigmoid()
        inner, outer, total = torch.zeros(64, 100), torch.zeros(64, 10), torch.zeros(64, 10)
        for _ in range(10):
            inner = keep[0] * inner + current
            soft = (5 * (inner - 1)).sigmoid()
            spikes = soft + ((inner > 1).float() - soft).detach()
            inner = inner - spikes.detach()
            outer = keep[1] * outer + model.outer(spikes)
            total = total + outer
        return F.cross_entropy(total / 10, y)

    return Begun(model, loss)


class CoarseLinear(nn.Linear):
    """Weights of three bits, whose step is learned (Esser et al. 2020)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.step = nn.Parameter(2 * self.weight.detach().abs().mean() / 3**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[n, outputs]`` of ``x [n, inputs]``."""
        scaled = (self.weight / self.step).clamp(-4, 3)
        whole = scaled + (scaled.round() - scaled).detach()
        return F.linear(x, whole * self.step, self.bias)


@problem(500)
def quantised_weights(draw: Draw) -> Begun:
    """Classify MNIST by a perceptron with weights of three bits, gradients straight through."""
    images, labels = mnist()
    layers = [CoarseLinear(784, 64), nn.BatchNorm1d(64), nn.ReLU6(), CoarseLinear(64, 64), nn.BatchNorm1d(64)]
    return fit(nn.Sequential(*layers, nn.ReLU6(), CoarseLinear(64, 10)), draw, 64, images.flatten(1), labels)


@cache
def _trained() -> nn.Sequential:
    """A perceptron that tells digits as they are."""
    images, labels = digits()
    model = fixed(3, lambda: perceptron(64, 96, 96, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(150):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model.requires_grad_(False)


@problem(500)
def lora_turned_digits(draw: Draw) -> Begun:
    """Adapt a trained perceptron to digits on their side by products of rank four, one factor of which starts at 0."""
    images, labels = digits()
    turned = images.view(-1, 8, 8).rot90(1, (1, 2)).flatten(1)
    layers = [layer for layer in _trained() if isinstance(layer, nn.Linear)]
    parts = {f"down_{i}": draw.normal(4, layer.in_features) / 4 for i, layer in enumerate(layers)}
    model = Parts(**parts, **{f"up_{i}": torch.zeros(layer.out_features, 4) for i, layer in enumerate(layers)})

    def loss() -> Tensor:
        x, y = draw.batch(32, turned, labels)
        for i, layer in enumerate(layers):
            x = layer(x) + F.linear(F.linear(x, getattr(model, f"down_{i}")), getattr(model, f"up_{i}"))
            x = x.relu() if i < 2 else x
        return F.cross_entropy(x, y)

    return Begun(model, loss)


def _surfaces(draw: Draw, kinds: Tensor, count: int) -> Tensor:
    """Noisy points ``[n, count, 3]`` of spheres, cubes, cylinders and rings, stretched and turned about an axis."""
    ball = F.normalize(draw.normal(len(kinds), count, 3), dim=2)
    cube = ball / ball.abs().amax(2, keepdim=True)
    around = F.normalize(ball[..., :2], dim=2)
    cylinder = torch.cat([around, 2 * draw.uniform(len(kinds), count, 1) - 1], 2)
    ring = torch.cat([around * (1 + 0.3 * ball[..., 2:]), 0.3 * ball[..., :1]], 2)
    made = torch.stack([ball, cube, cylinder, ring], 1)[torch.arange(len(kinds)), kinds]
    made = made * (0.7 + 0.6 * draw.uniform(len(kinds), 1, 3)) + 0.05 * draw.normal(*made.shape)
    angle = 6.28 * draw.uniform(len(kinds), 1)
    x, y, z = made.unbind(2)
    return torch.stack([x * angle.cos() - z * angle.sin(), y, x * angle.sin() + z * angle.cos()], 2)


@problem(300)
def perceiver_shapes(draw: Draw) -> Begun:
    """Tell shapes by clouds of 64 points, which eight latent vectors look at twice."""
    model = Parts(
        points=perceptron(3, 48, 48, activation=nn.GELU),
        latents=draw.normal(8, 48) * 0.02,
        looks=nn.ModuleList(nn.MultiheadAttention(48, 4, batch_first=True) for _ in range(2)),
        norms=nn.ModuleList(nn.LayerNorm(48) for _ in range(3)),
        mix=nn.TransformerEncoderLayer(48, 4, 96, 0.0, "gelu", batch_first=True, norm_first=True),
        head=nn.Linear(48, 4),
    )

    def loss() -> Tensor:
        kinds = draw.integers(4, 16)
        points = model.norms[2](model.points(_surfaces(draw, kinds, 64)))
        latents = model.latents.expand(16, 8, 48)
        for look, norm in zip(model.looks, model.norms, strict=False):
            latents = model.mix(latents + look(norm(latents), points, points, need_weights=False)[0])
        return F.cross_entropy(model.head(latents.mean(1)), kinds)

    return Begun(model, loss)
