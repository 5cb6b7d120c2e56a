"""Models of a distribution: autoencoders with codes of three kinds, a flow, diffusion, scores, mixtures."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meta_train.problems.common import Begun, Draw, Parts, fit, perceptron, problem
from meta_train.problems.data import digits, mnist, points


def _bits(logits: Tensor, images: Tensor) -> Tensor:
    """Cross entropy of pixels, ``[n]``."""
    return F.binary_cross_entropy_with_logits(logits, images, reduction="none").sum(1)


@problem(1000)
def vae(draw: Draw) -> Begun:
    """Train a variational autoencoder of MNIST with a Gaussian code."""
    images, _ = mnist()
    model = Parts(encoder=perceptron(784, 128, 32), decoder=perceptron(16, 128, 784))

    def loss() -> Tensor:
        (x,) = draw.batch(64, images.flatten(1))
        mean, log_variance = model.encoder(x).chunk(2, 1)
        code = mean + draw.normal(*mean.shape) * (log_variance / 2).exp()
        divergence = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum(1)
        return (_bits(model.decoder(code), x) + divergence).mean()

    return Begun(model, loss)


@problem(800)
def vqvae(draw: Draw) -> Begun:
    """Train an autoencoder of digits whose code is four of 32 vectors, gradients straight through."""
    images, _ = digits()
    model = Parts(encoder=perceptron(64, 64, 32), book=nn.Embedding(32, 8), decoder=perceptron(32, 64, 64))

    def loss() -> Tensor:
        (x,) = draw.batch(64, images)
        code = model.encoder(x).view(-1, 4, 8)
        nearest = (code[:, :, None] - model.book.weight).square().sum(3).argmin(2)
        entry = model.book(nearest)
        through = code + (entry - code).detach()
        book, commitment = (entry - code.detach()).square().mean(), (entry.detach() - code).square().mean()
        return F.mse_loss(model.decoder(through.flatten(1)), x) + book + 0.25 * commitment

    return Begun(model, loss)


@problem(800)
def gumbel_vae(draw: Draw) -> Begun:
    """Train a variational autoencoder of digits with five relaxed choices of eight (Jang et al. 2017)."""
    images, _ = digits()
    model = Parts(encoder=perceptron(64, 64, 40), decoder=perceptron(40, 64, 64))

    def loss() -> Tensor:
        (x,) = draw.batch(64, images)
        logits = model.encoder(x).view(-1, 5, 8)
        gumbel = -torch.log(-torch.log(draw.uniform(*logits.shape) + 1e-9) + 1e-9)
        choice, chance = ((logits + gumbel) / 0.7).softmax(2), logits.softmax(2)
        divergence = (chance * (chance.clamp(min=1e-9) * 8).log()).sum((1, 2)).mean()
        return _bits(model.decoder(choice.flatten(1)), x).mean() + divergence

    return Begun(model, loss)


@problem(500)
def conv_autoencoder_transposed(draw: Draw) -> Begun:
    """Train an autoencoder of MNIST by strided and transposed convolutions."""
    images, _ = mnist()
    encoder = [nn.Conv2d(1, 8, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(8, 16, 4, 2, 1), nn.LeakyReLU(0.2)]
    middle = nn.Conv2d(16, 4, 3, 1, 1)
    decoder = [nn.ConvTranspose2d(4, 16, 4, 2, 1), nn.LeakyReLU(0.2), nn.ConvTranspose2d(16, 1, 4, 2, 1)]
    return fit(nn.Sequential(*encoder, middle, *decoder), draw, 32, images, images, F.mse_loss)


@problem(1000)
def realnvp(draw: Draw) -> Begun:
    """Fit a flow of six affine couplings to two moons."""
    moons = points("moons", 2000)
    model = nn.ModuleList(perceptron(1, 32, 32, 2) for _ in range(6))

    def loss() -> Tensor:
        (x,) = draw.batch(128, moons)
        log_volume = torch.zeros(len(x))
        for layer, network in enumerate(model):
            halves = list(x.chunk(2, 1))
            moved = 1 - layer % 2
            scale, shift = network(halves[1 - moved]).chunk(2, 1)
            scale = scale.tanh()
            halves[moved] = halves[moved] * scale.exp() + shift
            log_volume = log_volume + scale[:, 0]
            x = torch.cat(halves, 1)
        return (0.5 * x.square().sum(1) + math.log(2 * math.pi) - log_volume).mean()

    return Begun(model, loss)


@problem(800)
def diffusion_digits(draw: Draw) -> Begun:
    """Predict the noise in noisy digits, as diffusion models do."""
    images, _ = digits()
    model = perceptron(64 + 16, 128, 128, 64, activation=nn.SiLU)

    def loss() -> Tensor:
        (x,) = draw.batch(64, images)
        time = draw.uniform(64, 1)
        share, noise = torch.cos(time * math.pi / 2), draw.normal(*x.shape)
        noisy = share * (2 * x - 1) + (1 - share * share).clamp(min=0).sqrt() * noise
        waves = time * torch.arange(1, 9) * 3
        return F.mse_loss(model(torch.cat([noisy, waves.sin(), waves.cos()], 1)), noise)

    return Begun(model, loss)


@problem(500)
def score_matching(draw: Draw) -> Begun:
    """Predict the noise in points of two circles, of all sizes of noise from 0.05 to 1."""
    circles = points("circles", 1000, factor=0.5)
    model = perceptron(3, 64, 64, 2, activation=nn.SiLU)

    def loss() -> Tensor:
        (x,) = draw.batch(128, circles)
        size = (draw.uniform(128, 1) * 3 - 3).exp()
        noise = draw.normal(*x.shape)
        return (model(torch.cat([x + size * noise, size.log()], 1)) + noise).square().mean()

    return Begun(model, loss)


@problem(800)
def mixture_density(draw: Draw) -> Begun:
    """Predict a mixture of five Gaussians, where one input has several outputs (Bishop 1994)."""
    model = perceptron(1, 48, 48, 15, activation=nn.Tanh)

    def loss() -> Tensor:
        y = draw.uniform(128, 1) * 20 - 10
        x = 7 * torch.sin(0.75 * y) + 0.5 * y + draw.normal(128, 1)
        weights, means, log_deviations = model(x / 10).chunk(3, 1)
        errors = 0.5 * ((y - 10 * means) / log_deviations.exp()) ** 2
        return -torch.logsumexp(weights.log_softmax(1) - log_deviations - errors, 1).mean()

    return Begun(model, loss)
