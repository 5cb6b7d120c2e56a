"""Embeddings: contrastive ones of images, points of a map, nodes of a graph, users and things, entities, residues."""

from __future__ import annotations

from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meta_train.problems.common import Begun, Draw, Parts, fit, perceptron, problem
from meta_train.problems.data import digits, mnist


def _stage(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, 2, 1), nn.BatchNorm2d(outputs), nn.ReLU()]


@problem(500)
def simclr(draw: Draw) -> Begun:
    """Tell which two of 128 distorted images are of the same one (Chen et al. 2020)."""
    images, _ = mnist()
    body = [*_stage(1, 16), *_stage(16, 32), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    model = nn.Sequential(*body, nn.Linear(128, 32))

    def distorted(x: Tensor) -> Tensor:
        moved = torch.roll(x, draw.integers(4, 2, low=-3).tolist(), (2, 3))
        return moved * (0.6 + 0.8 * draw.uniform(len(x), 1, 1, 1)) + 0.2 * draw.normal(*x.shape)

    def loss() -> Tensor:
        (x,) = draw.batch(64, images)
        codes = F.normalize(model(torch.cat([distorted(x), distorted(x)])), dim=1)
        likeness = (codes @ codes.T / 0.2).masked_fill(torch.eye(128, dtype=torch.bool), -1e9)
        return F.cross_entropy(likeness, torch.arange(128).roll(64))

    return Begun(model, loss)


@problem(500)
def triplet(draw: Draw) -> Begun:
    """Put digits of a kind nearer to each other than to another kind."""
    images, labels = digits()
    model = perceptron(64, 64, 16)
    kinds = [images[labels == kind] for kind in range(10)]

    def one_of_each(wanted: Tensor) -> Tensor:
        return torch.stack([draw.batch(1, kinds[kind])[0][0] for kind in wanted.tolist()])

    def loss() -> Tensor:
        kind = draw.integers(10, 64)
        other = (kind + draw.integers(10, 64, low=1)) % 10
        return F.triplet_margin_loss(*(model(one_of_each(each)) for each in (kind, kind, other)))

    return Begun(model, loss)


@problem(400)
def byol_ema(draw: Draw) -> Begun:
    """Predict what a slowly following copy of the network makes of another distortion (Grill et al. 2020)."""
    images, _ = digits()
    network = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 16))
    model = Parts(online=network, predictor=perceptron(16, 32, 16))
    teacher = deepcopy(network).requires_grad_(False)

    def loss() -> Tensor:
        with torch.no_grad():
            for followed, p in zip(teacher.parameters(), network.parameters(), strict=True):
                followed.lerp_(p, 0.02)
        (x,) = draw.batch(64, images)
        first, second = (x + 0.2 * draw.normal(*x.shape) for _ in range(2))
        return 2 - 2 * F.cosine_similarity(model.predictor(network(first)), teacher(second)).mean()

    return Begun(model, loss)


@problem(500)
def mds_points(draw: Draw) -> Begun:
    """Place 300 digits on a map, from near its middle, so that distances stay (multidimensional scaling)."""
    images = digits()[0][:300]
    wanted, apart = torch.cdist(images, images), ~torch.eye(300, dtype=torch.bool)
    model = Parts(places=draw.normal(300, 2) * 1e-2)

    def loss() -> Tensor:
        places = model.places
        distances = ((places[:, None] - places).square().sum(2) + 1e-8).sqrt()
        return (distances - wanted)[apart].square().mean()

    return Begun(model, loss)


@problem(400)
def gcn_full_batch(draw: Draw) -> Begun:
    """Classify the nodes of a random graph with communities, all at once."""
    nodes, kinds = 300, 4
    labels = torch.arange(nodes) % kinds
    chance = torch.where(labels[:, None] == labels, 0.06, 0.02)
    edges = (draw.uniform(nodes, nodes) < chance).float()
    edges = ((edges + edges.T) > 0).float() + torch.eye(nodes)
    scale = edges.sum(1) ** -0.5
    spread = scale[:, None] * edges * scale
    features = draw.normal(nodes, 50) + 0.3 * draw.normal(kinds, 50)[labels]
    model = Parts(first=nn.Linear(50, 32), second=nn.Linear(32, kinds))

    def loss() -> Tensor:
        hidden = (spread @ model.first(features)).relu()
        return F.cross_entropy(spread @ model.second(hidden), labels)

    return Begun(model, loss)


@problem(1000)
def matrix_factorisation(draw: Draw) -> Begun:
    """Predict ratings by vectors and biases of users and things."""
    users, things = 400, 300
    true_users, true_things = draw.normal(users, 5), draw.normal(things, 5)
    sizes = {"user": (users, 8), "thing": (things, 8), "user_bias": (users, 1), "thing_bias": (things, 1)}
    model = Parts(**{name: nn.Embedding(*size) for name, size in sizes.items()})
    for vectors in (model.user, model.thing):
        nn.init.normal_(vectors.weight, std=0.1)
    for biases in (model.user_bias, model.thing_bias):
        nn.init.zeros_(biases.weight)

    def loss() -> Tensor:
        user, thing = draw.integers(users, 128), draw.integers(things, 128)
        rating = 3 + (true_users[user] * true_things[thing]).sum(1) / 2 + 0.3 * draw.normal(128)
        product = (model.user(user) * model.thing(thing)).sum(1)
        return F.mse_loss(product + model.user_bias(user)[:, 0] + model.thing_bias(thing)[:, 0], rating)

    return Begun(model, loss)


@problem(500)
def bilinear_kge(draw: Draw) -> Begun:
    """Complete triples of 200 entities and six relations by products of their vectors."""
    heads, relations = draw.integers(200, 3000), draw.integers(6, 3000)
    tails = (heads * 7 + relations * 31) % 200
    model = Parts(entities=nn.Embedding(200, 24), relations=nn.Embedding(6, 24))

    def loss() -> Tensor:
        head, relation, tail = draw.batch(64, heads, relations, tails)
        query = model.entities(head) * model.relations(relation)
        return F.cross_entropy(query @ model.entities.weight.T, tail)

    return Begun(model, loss)


@problem(1000)
def grokking(draw: Draw) -> Begun:
    """Add modulo 23 by a perceptron over two embeddings."""
    pairs = torch.cartesian_prod(torch.arange(23), torch.arange(23))
    model = nn.Sequential(nn.Embedding(23, 48), nn.Flatten(), perceptron(96, 96, 23))
    return fit(model, draw, 64, pairs, pairs.sum(1) % 23)
