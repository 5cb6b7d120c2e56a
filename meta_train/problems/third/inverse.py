"""Found from what is seen of it: slices, factors, paths, surfaces."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from meta_train.problems.common import Begun, Draw, Parts, problem
from meta_train.problems.data import digits, single


@problem(200)
def digits_parafac(draw: Draw) -> Begun:
    """Factor 400 digits, with rows and columns of their own, into twelve products of three vectors, all at once."""
    digit = digits()[0][:400].view(400, 8, 8)
    model = Parts(which=0.3 * draw.normal(400, 12), rows=0.3 * draw.normal(8, 12), columns=0.3 * draw.normal(8, 12))

    def loss() -> Tensor:
        planes = model.rows[:, None] * model.columns
        return F.mse_loss(model.which @ planes.view(64, 12).T, digit.flatten(1))

    return Begun(model, loss)


@cache
def _phantom(side: int) -> Tensor:
    """A slice of a head, as radiologists draw it, float32 ``[side, side]`` in [0, 1]."""
    from skimage import data, transform

    return single(transform.resize(data.shepp_logan_phantom(), (side, side), anti_aliasing=True))


@problem(400)
def tomography(draw: Draw) -> Begun:
    """Find a slice from noisy sums along rays in 24 directions, with a penalty on its edges."""
    side, angle = 32, torch.arange(24) * 3.1416 / 24
    still = torch.zeros(24)
    matrix = torch.stack([angle.cos(), -angle.sin(), still, angle.sin(), angle.cos(), still], 1).view(24, 2, 3)
    grid = F.affine_grid(matrix, [24, 1, side, side], align_corners=False)

    def rays(x: Tensor) -> Tensor:
        return F.grid_sample(x.expand(24, 1, side, side), grid, align_corners=False).sum(2)

    seen = rays(_phantom(side))
    seen = seen + 0.02 * draw.normal(*seen.shape)
    model = Parts(pixels=torch.zeros(side, side))

    def loss() -> Tensor:
        edges = model.pixels.diff(dim=0).abs().mean() + model.pixels.diff(dim=1).abs().mean()
        return F.mse_loss(rays(model.pixels), seen) + 0.005 * edges

    return Begun(model, loss)


@problem(500)
def paths_among_discs(draw: Draw) -> Begun:
    """Plan paths of four robots across a square, short, around twelve discs and clear of each other, in metres."""
    begin, end = (
        torch.tensor([[0.0, 0], [0, 100], [0, 50], [50, 0]]),
        torch.tensor([[100.0, 100], [100, 0], [100, 50], [50, 100]]),
    )
    discs, sizes = 15 + 70 * draw.uniform(12, 2), 4 + 6 * draw.uniform(12)
    share = torch.linspace(0, 1, 32)[1:-1, None]
    straight = torch.lerp(begin[:, None], end[:, None], share)
    model = Parts(shift=draw.normal(4, 30, 2))
    pairs = torch.triu_indices(4, 4, 1)

    def loss() -> Tensor:
        path = torch.cat([begin[:, None], straight + model.shift, end[:, None]], 1)
        speed = path.diff(dim=1)
        inside = (sizes + 2 - (path[:, :, None] - discs).norm(dim=3)).relu().square().sum()
        close = (8 - (path[pairs[0]] - path[pairs[1]]).norm(dim=2)).relu().square().sum()
        return 0.05 * speed.square().sum() + speed.diff(dim=1).square().sum() + inside + close

    return Begun(model, loss)


@problem(400)
def wrapped_sphere(draw: Draw) -> Begun:
    """Pull a sphere of 162 points over a lobed shape that is seen as a cloud: nearest distances, even edges."""
    corner = 2 * torch.tensor([(-1.0) ** (i >> k) for i in range(8) for k in range(3)]).view(8, 3)
    around = F.normalize(torch.cat([corner, draw.normal(154, 3)]), dim=1)
    for _ in range(20):  # spread out
        apart = around[:, None] - around
        push = apart / (apart.square().sum(2, keepdim=True) + 0.01) ** 1.5
        around = F.normalize(around + 3e-3 * push.sum(1), dim=1)
    near = torch.cdist(around, around).topk(7, largest=False).indices[:, 1:]
    seen = F.normalize(draw.normal(400, 3), dim=1)
    seen = seen * (1.3 + 0.5 * (3 * seen[:, :1]).sin() * (4 * seen[:, 1:2]).cos()) + torch.tensor([0.5, 0.0, -0.3])
    model = Parts(shift=torch.zeros(162, 3))

    def loss() -> Tensor:
        points = 0.5 * around + model.shift
        distances = torch.cdist(points, seen).square()
        edges = (points[near] - points[:, None]).mean(1).square().sum(1).mean()
        return distances.amin(0).mean() + distances.amin(1).mean() + 0.3 * edges

    return Begun(model, loss)
