"""Pictures in and out: shapes cut out, digits found, patches sharpened; textures, splats, a hashed grid, phases."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from meta_train.problems.common import Begun, Draw, Parts, Residual, fixed, perceptron, problem
from meta_train.problems.data import digits
from meta_train.problems.second.data import coloured, grey


def _scenes(draw: Draw, count: int, side: int = 24) -> tuple[Tensor, Tensor]:
    """Noisy pictures ``[count, 1, side, side]`` of a disc and a square, and what each pixel is of, ``[count, ...]``."""
    axis = torch.arange(float(side))
    rows, columns = axis[:, None].expand(side, side), axis.expand(side, side)
    kinds = torch.zeros(count, side, side, dtype=torch.long)
    for kind in (1, 2):
        top, left = (5 + draw.uniform(2, count, 1, 1) * (side - 10)).unbind(0)
        size, (up, over) = 3 + 3 * draw.uniform(count, 1, 1), ((rows - top).abs(), (columns - left).abs())
        distance = torch.hypot(up, over) if kind == 1 else torch.maximum(up, over)
        kinds[distance < size] = kind
    shades = draw.uniform(count, 3) * 0.6 + torch.tensor([0.0, 0.5, 0.5])
    picture = shades.gather(1, kinds.flatten(1)).view(count, 1, side, side)
    return picture + 0.15 * draw.normal(*picture.shape), kinds


@problem(400)
def segment_dice(draw: Draw) -> Begun:
    """Say of each pixel whether it is of a disc, a square or neither, by dilated convolutions and the Dice loss."""
    layers: list[nn.Module] = []
    for inputs, dilation in ((1, 1), (16, 2), (16, 4), (16, 2)):
        convolution = nn.Conv2d(inputs, 16, 3, padding=dilation, dilation=dilation)
        layers += [convolution, nn.InstanceNorm2d(16, affine=True), nn.LeakyReLU(0.1)]
    model = nn.Sequential(*layers, nn.Conv2d(16, 3, 1))

    def loss() -> Tensor:
        pictures, kinds = _scenes(draw, 6)
        chances, there = model(pictures).softmax(1), F.one_hot(kinds, 3).permute(0, 3, 1, 2)
        both, either = (chances * there).sum((0, 2, 3)), (chances + there).sum((0, 2, 3))
        return 1 - ((2 * both + 1) / (either + 1)).mean()

    return Begun(model, loss)


def _matched(costs: Tensor) -> tuple[Tensor, Tensor]:
    """The rows and columns of the cheapest matching in each of ``costs [n, queries, things]``, ``[n, things]`` each."""
    pairs = [linear_sum_assignment(cost) for cost in costs.detach().nan_to_num().numpy()]  # it raises where it sees NaN
    rows, columns = (torch.stack([torch.as_tensor(pair[side]) for pair in pairs]) for side in (0, 1))
    return rows, columns


@problem(400)
def detr_digits(draw: Draw) -> Begun:
    """Find three digits on a canvas, as a set of five classes and places that is matched to them (Carion 2020)."""
    images, labels = digits()
    stem = [nn.Conv2d(1, 24, 5, 2, 2), nn.ReLU(), nn.Conv2d(24, 32, 3, 2, 1), nn.ReLU()]
    model = Parts(
        stem=nn.Sequential(*stem),
        places=draw.normal(36, 32) * 0.1,
        queries=draw.normal(5, 32),
        decoder=nn.TransformerDecoderLayer(32, 4, 64, 0.0, batch_first=True),
        classes=nn.Linear(32, 11),
        corners=perceptron(32, 32, 2),
    )
    weights = torch.cat([torch.ones(10), torch.tensor([0.1])])  # of no digit: less

    def loss() -> Tensor:
        canvas, rows = torch.zeros(16, 24, 24), draw.integers(len(images), 16, 3)
        shift = draw.integers(9, 16, 3, 2)
        corners = torch.tensor([[0, 0], [8, 8], [16, 0]]) + torch.stack([shift[..., 0] * 0, shift[..., 1]], 2)
        for i, own in enumerate(corners.tolist()):
            for row, (top, left) in zip(rows[i], own, strict=True):
                canvas[i, top : top + 8, left : left + 8] = images[row].view(8, 8)
        memory = model.stem(canvas[:, None]).flatten(2).transpose(1, 2) + model.places
        hidden = model.decoder(model.queries.expand(16, 5, 32), memory)
        logits, found, true = model.classes(hidden), model.corners(hidden).sigmoid(), corners / 16
        kinds = labels[rows]
        chances = logits.softmax(2).gather(2, kinds[:, None].expand(16, 5, 3))
        query, thing = _matched(5 * torch.cdist(found, true, p=1) - chances)
        each = torch.arange(16)[:, None]
        wanted = torch.full((16, 5), 10).index_put((each, query), kinds[each, thing])
        error = (found[each, query] - true[each, thing]).abs().mean()
        return F.cross_entropy(logits.transpose(1, 2), wanted, weights) + 5 * error

    return Begun(model, loss)


@problem(500)
def superresolution_shuffle(draw: Draw) -> Begun:
    """Double the side of patches by residual blocks and a shuffle of pixels, which go from 0 to 255."""
    picture = 255 * grey("camera", 256)
    blocks = [
        Residual(nn.Conv2d(16, 16, 3, 1, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, 1, 1), nn.Conv2d(16, 16, 1))
        for _ in range(2)
    ]
    model = nn.Sequential(nn.Conv2d(1, 16, 3, 1, 1), *blocks, nn.Conv2d(16, 4, 3, 1, 1), nn.PixelShuffle(2))

    def loss() -> Tensor:
        sharp = draw.patches(picture, 8, 24)[:, None]
        return F.l1_loss(model(F.avg_pool2d(sharp, 2)), sharp)

    return Begun(model, loss)


@problem(300)
def gram_texture(draw: Draw) -> Begun:
    """Paint pixels whose features in a random network go together as those of a picture do (Gatys et al. 2015)."""
    wide, narrow = fixed(11, lambda: (nn.Conv2d(3, 24, 5, 2), nn.Conv2d(24, 32, 3, 2)))
    for layer in (wide, narrow):
        layer.requires_grad_(False)

    def grams(picture: Tensor) -> list[Tensor]:
        first = wide(picture[None]).relu()
        features = [each.flatten(1) for each in (picture, first[0], narrow(first)[0].relu())]
        return [each @ each.T / each.shape[1] for each in features]

    wanted = grams(coloured("coffee", 48).permute(2, 0, 1))
    model = Parts(pixels=0.5 + 0.2 * draw.normal(3, 48, 48))

    def loss() -> Tensor:
        pairs = zip(grams(model.pixels), wanted, strict=True)
        return 1e3 * sum((F.mse_loss(own, other) for own, other in pairs), torch.zeros(()))

    return Begun(model, loss)


@problem(400)
def splatting(draw: Draw) -> Begun:
    """Paint a picture by 64 Gaussians: their places, sizes, turns, colours and weights, all pixels at once."""
    picture = coloured("rocket", 40).view(-1, 3)
    axis = torch.linspace(0, 40, 40)
    pixels = torch.cartesian_prod(axis, axis)
    model = Parts(
        places=draw.uniform(64, 2) * 40,
        log_sizes=torch.full((64, 2), 1.0),
        turns=draw.uniform(64) * 3.14,
        colours=torch.zeros(64, 3),
        weights=torch.full((64,), -2.0),
    )

    def loss() -> Tensor:
        x, y = (pixels[:, None] - model.places).unbind(2)
        cos, sin = model.turns.cos(), model.turns.sin()
        width, height = model.log_sizes.exp().unbind(1)
        distance = ((x * cos + y * sin) / width) ** 2 + ((y * cos - x * sin) / height) ** 2
        shares = torch.exp(-distance / 2) * model.weights.sigmoid()
        painted = shares @ model.colours.sigmoid()
        return 0.8 * F.l1_loss(painted, picture) + 0.2 * F.mse_loss(painted, picture)

    return Begun(model, loss)


@problem(500)
def hash_grid_picture(draw: Draw) -> Begun:
    """Learn a picture in colour by heart by hashed tables of six resolutions (Müller et al. 2022)."""
    picture, sides, size = coloured("chelsea", 96), (6, 10, 16, 26, 42, 68), 512
    model = Parts(tables=draw.uniform(6, size, 2) * 2e-4 - 1e-4, colour=perceptron(12, 32, 32, 3))
    corners = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])

    def features(places: Tensor) -> Tensor:
        found = []
        for table, side in zip(model.tables, sides, strict=True):
            low = (places * side).long()
            part = (places * side - low)[:, None]
            corner = low[:, None] + corners
            index = (corner[..., 0] ^ (corner[..., 1] * 2654435761)) % size
            weights = (corners * part + (1 - corners) * (1 - part)).prod(2)
            found.append((weights[..., None] * table[index]).sum(1))
        return torch.cat(found, 1)

    def loss() -> Tensor:
        at = draw.integers(96, 384, 2)
        return F.mse_loss(model.colour(features(at / 96)), picture[at[:, 0], at[:, 1]])

    return Begun(model, loss)


@problem(500)
def phase_retrieval(draw: Draw) -> Begun:
    """Find a picture from how large its Fourier coefficients are under three random masks."""
    picture = grey("moon", 32)
    masks = draw.integers(2, 3, 32, 32) * 2.0 - 1

    def sizes(x: Tensor) -> Tensor:
        return torch.fft.rfft2(masks * x, norm="ortho").abs()

    seen = sizes(picture) + 0.02 * draw.normal(3, 32, 17)
    model = Parts(pixels=draw.uniform(32, 32))
    return Begun(model, lambda: (sizes(model.pixels) - seen).square().sum())
