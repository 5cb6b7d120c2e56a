"""Models of a distribution, and graphs: flows, mixtures, a critic; trees, maps, molecules."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meta_train.problems.common import Begun, Draw, Parts, perceptron, problem
from meta_train.problems.data import digits, standardised, table
from meta_train.problems.second.data import faces


class Masked(nn.Linear):
    """A linear layer that only sees what comes earlier.  degrees: of its inputs and outputs; strict: not equals."""

    mask: Tensor

    def __init__(self, before: Tensor, after: Tensor, strict: bool) -> None:
        super().__init__(len(before), len(after))
        seen = before < after[:, None] if strict else before <= after[:, None]
        self.register_buffer("mask", seen.float())

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[n, outputs]`` of ``x [n, inputs]``."""
        return F.linear(x, self.weight * self.mask, self.bias)


@problem(800)
def maf_wine(draw: Draw) -> Begun:
    """Fit four masked autoregressive steps to thirteen measurements of wine, with noise added."""
    wine = standardised(table("wine")[0])
    order, hidden = torch.arange(13), torch.arange(64) % 12
    model = nn.ModuleList()
    for _ in range(4):
        both = Masked(hidden, order.repeat(2), True)
        model.append(nn.Sequential(Masked(order, hidden, False), nn.ReLU(), both))

    def loss() -> Tensor:
        (x,) = draw.batch(48, wine)
        x, log_volume = x + 0.05 * draw.normal(48, 13), torch.zeros(48)
        for network in model:
            shift, scale = network(x).chunk(2, 1)
            x = ((x - shift) * (-scale).exp()).flip(1)
            log_volume = log_volume - scale.sum(1)
        return (0.5 * x.square().sum(1) + 6.5 * math.log(2 * math.pi) - log_volume).mean()

    return Begun(model, loss)


@problem(500)
def gaussians_iris(draw: Draw) -> Begun:
    """Fit a mixture of four Gaussians with full covariances to irises in centimetres, all rows at once."""
    irises = torch.tensor(table("iris")[0], dtype=torch.float32)
    model = Parts(logits=torch.zeros(4), means=draw.normal(4, 4), factors=0.1 * draw.normal(4, 4, 4))

    def loss() -> Tensor:
        lower = model.factors.tril(-1) + torch.diag_embed(model.factors.diagonal(dim1=1, dim2=2).exp())
        gaussians = torch.distributions.MultivariateNormal(model.means, scale_tril=lower, validate_args=False)
        return -torch.logsumexp(model.logits.log_softmax(0) + gaussians.log_prob(irises[:, None]), 1).mean()

    return Begun(model, loss)


class Modulated(nn.Module):
    """A linear layer whose outputs are normalised, and scaled and shifted by what a code of the time says (FiLM)."""

    def __init__(self, inputs: int, width: int, code: int) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(inputs, width), nn.LayerNorm(width, elementwise_affine=False)
        self.code = nn.Linear(code, 2 * width)
        nn.init.zeros_(self.code.weight)
        nn.init.zeros_(self.code.bias)

    def forward(self, x: Tensor, code: Tensor) -> Tensor:
        """Return ``[n, width]``.  x: ``[n, inputs]``; code: ``[n, code]``."""
        scale, shift = self.code(code).chunk(2, 1)
        return F.silu((1 + scale) * self.norm(self.linear(x)) + shift)


@problem(600)
def rectified_flow_faces(draw: Draw) -> Begun:
    """Predict the straight way from noise to faces (Liu et al. 2022), of 12² pixels."""
    pictures = F.interpolate(faces()[0][:100], 12, mode="area").flatten(1)
    pictures = (pictures - pictures.mean()) / pictures.std()
    model = Parts(first=Modulated(144, 128, 16), second=Modulated(128, 128, 16), last=nn.Linear(272, 144))
    nn.init.zeros_(model.last.weight)

    def loss() -> Tensor:
        (x,) = draw.batch(64, pictures)
        time, noise = draw.normal(64, 1).sigmoid(), draw.normal(*x.shape)
        waves = time * 2.0 ** torch.arange(8)
        code, now = torch.cat([waves.sin(), waves.cos()], 1), torch.lerp(noise, x, time)
        return F.mse_loss(model.last(torch.cat([now, model.second(model.first(now, code), code)], 1)), x - noise)

    return Begun(model, loss)


@problem(400)
def wasserstein_critic(draw: Draw) -> Begun:
    """Tell digits from noise with their mean and deviation by a critic whose slope a penalty holds at one (WGAN-GP)."""
    images, _ = digits()
    mean, deviation = images.mean(0), images.std(0)
    model = perceptron(64, 96, 96, 1, activation=nn.SiLU)
    [*model.parameters()][-1].requires_grad_(False)  # the last bias cancels out

    def loss() -> Tensor:
        (real,) = draw.batch(48, images)
        false = mean + deviation * draw.normal(48, 64)
        between = torch.lerp(real, false, draw.uniform(48, 1)).requires_grad_()
        slopes = torch.autograd.grad(model(between).sum(), between, create_graph=True)[0]
        return model(false).mean() - model(real).mean() + 10 * (slopes.norm(dim=1) - 1).square().mean()

    return Begun(model, loss)


@problem(500)
def tsne_map(draw: Draw) -> Begun:
    """Place 250 digits on a map, from nearly one point, so that neighbours stay neighbours (t-SNE)."""
    images = digits()[0][:250]
    apart, itself = torch.cdist(images, images) ** 2, torch.eye(250, dtype=torch.bool)
    width = apart.kthvalue(8, 1, keepdim=True).values
    near = (-apart / width * 2).masked_fill(itself, -math.inf).softmax(1)
    near = ((near + near.T) / 500).clamp(min=1e-12)
    model = Parts(places=draw.normal(250, 2) * 1e-2)

    def loss() -> Tensor:
        places = model.places
        logits = -torch.log1p((places[:, None] - places).square().sum(2)).masked_fill(itself, math.inf)
        return (near * (near.log() - logits.flatten().log_softmax(0).view(250, 250)))[~itself].sum()

    return Begun(model, loss)


@problem(600)
def poincare_tree(draw: Draw) -> Begun:
    """Place a tree of 255 nodes in a hyperbolic disc, so that a parent is nearer than others (Nickel, Kiela 2017)."""
    child = torch.arange(1, 255)
    parent = (child - 1) // 2
    model = nn.Embedding(255, 2)
    nn.init.uniform_(model.weight, -1e-2, 1e-2)

    def disc(x: Tensor) -> Tensor:
        size = x.norm(dim=-1, keepdim=True).clamp(min=1e-6)
        return x / size * size.tanh() * 0.999

    def loss() -> Tensor:
        low, high = draw.batch(64, child, parent)
        others = torch.cat([high[:, None], draw.integers(255, 64, 12)], 1)
        u, v = disc(model(low))[:, None], disc(model(others))
        spread = (1 - u.square().sum(2)) * (1 - v.square().sum(2))
        distance = torch.acosh(1 + 2 * (u - v).square().sum(2) / spread + 1e-6)
        return F.cross_entropy(-distance, torch.zeros(64, dtype=torch.long))

    return Begun(model, loss)


@problem(500)
def molecule_messages(draw: Draw) -> Begun:
    """Predict the energy of random molecules of nine atoms by messages along their bonds (Gilmer et al. 2017)."""
    atoms, bonds = draw.normal(5), draw.normal(2, 5, 5)
    model = Parts(
        atoms=nn.Embedding(5, 24),
        messages=nn.ModuleList(nn.Linear(24, 24) for _ in range(2)),
        update=nn.GRUCell(24, 24),
        read=perceptron(24, 32, 1, activation=nn.SiLU),
    )

    def loss() -> Tensor:
        kinds, chance = draw.integers(5, 32, 9), draw.uniform(2, 32, 9, 9).triu(1)
        edges = ((chance > 0.8) + (chance > 0.8).mT).float()
        pairs = bonds[:, kinds[..., None], kinds[:, None]]
        energy = atoms[kinds].sum(1) + (edges * (pairs + pairs.mT)).sum((0, 2, 3)) / 4
        state = model.atoms(kinds)
        for _ in range(2):
            sent = sum(edge @ layer(state) for edge, layer in zip(edges, model.messages, strict=True))
            state = model.update(sent.flatten(0, 1), state.flatten(0, 1)).view(32, 9, 24)
        return F.mse_loss(model.read(state).sum((1, 2)), energy)

    return Begun(model, loss)
