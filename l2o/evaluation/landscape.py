"""Where optimizers go: their paths over the contours of two parameters, or over a slice through a network's loss."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.func import vmap

from l2o.checks import check_int
from l2o.evaluation.entrants import Entrant
from l2o.evaluation.plots import frame, new_figure, png
from l2o.evaluation.trials import Array
from l2o.extras import require
from l2o.tasks import Plateau, Rastrigin, Rosenbrock, Saddle
from l2o.types import ConfigurationError, Params, TaskFamily

LANDSCAPES: dict[str, TaskFamily] = {
    "saddle": Saddle(dims=(2, 2), conditions=(2.0, 2.0), distances=(0.01, 0.01)),
    "ravine": Rosenbrock(dims=(2, 2), conditions=(100.0, 100.0)),
    "egg crate": Rastrigin(dims=(2, 2), conditions=(1.0, 1.0), amplitudes=(0.5, 0.5)),
    "plateau": Plateau(dims=(2, 2), conditions=(5.0, 5.0), radii=(4.0, 4.0)),
}
"""Functions of two parameters, by name."""
_GRID, _COARSE = 121, 41
"""Points of a contour plot along each axis, of a function of two parameters and of a network."""
_LEVELS = 24
_MARGIN = 0.15
_FAR = 3.0
"""What lies outside the picture, by so many times the size of what most paths cover, does not widen it."""


class Paths(NamedTuple):
    """The ways of several optimizers through one problem, as places in a plane.

    title: of the picture.     origin, axes: float64 ``[entries]`` and ``[2, entries]``: the plane in parameter space.
    places: by label, ``[steps + 1, 2]`` along the axes, NaN where a run is no longer finite.
    losses: by label, ``[steps + 1]``.     height: loss at places ``[n, 2]`` of the plane, ``[n]``.
    labels: of the axes of the picture.
    """

    title: str
    origin: Array
    axes: Array
    places: dict[str, Array]
    losses: dict[str, Array]
    height: Callable[[Array], Array]
    labels: tuple[str, str] = ("x₁", "x₂")


def landscape_paths(name: str, entrants: Mapping[str, Entrant], steps: int = 200, seed: int = 0) -> Paths:
    """Return the paths of optimizers on one of ``LANDSCAPES``, from the same start."""
    family = LANDSCAPES[name]
    walked = walk(family, entrants, steps, seed)
    return Paths(name, np.zeros(2), np.eye(2), walked.flat, walked.losses, walked.height)


def network_paths(family: TaskFamily, entrants: Mapping[str, Entrant], steps: int = 200, seed: int = 0) -> Paths:
    """Return the paths of optimizers on a network, projected onto the plane in which they differ most.

    The plane goes through the first one's end along the two principal components of all paths, each filter (row of a
    weight) scaled to the length of that filter at the end, biases left out, as Li et al. 2018, "Visualizing the loss
    landscape of neural nets" (arXiv 1712.09913, sections 4 and 7.2). Places are least-squares projections.
    """
    walked = walk(family, entrants, steps, seed)
    paths = [p[np.isfinite(p).all(1)] for p in walked.flat.values()]
    origin = paths[0][-1]
    around = np.concatenate(paths) - origin
    directions = np.linalg.svd(around, full_matrices=False)[2]
    axes = np.stack([walked.filter_normalised(d, origin) for d in directions[:2]])
    places = {label: np.linalg.lstsq(axes.T, (p - origin).T, rcond=None)[0].T for label, p in walked.flat.items()}
    inside = np.concatenate([p[np.isfinite(p).all(1)] for p in places.values()]) @ axes
    share = 1 - ((around - inside) ** 2).sum() / max((around**2).sum(), 1e-300)
    name = f"{type(family).__name__}, {len(origin):,} parameters"
    title = f"{name}\n{share:.0%} of the paths' squared length in this plane"
    labels = ("first direction, filter-normalised", "second direction")
    return Paths(title, origin, axes, places, walked.losses, walked.height, labels)


class Walked:
    """Paths of several optimizers through one problem.

    flat: by label, parameters as one row ``[steps + 1, entries]``, float64.     losses: ``[steps + 1]``, noiseless.
    """

    def __init__(self, family: TaskFamily, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._family, self._data = family, family.sample(generator, 1)
        self._shapes, self._buffers = family.init(self._data, generator)
        self._batch = family.batch(self._data, "valid", generator)
        self.flat: dict[str, Array] = {}
        self.losses: dict[str, Array] = {}

    def add(self, label: str, params: Sequence[Params]) -> None:
        """Add a path.  params: of each step, ``[1, ...]``."""
        rows = torch.stack([torch.cat([t.flatten() for t in p.values()]) for p in params])
        self.flat[label] = rows.double().numpy()
        self.losses[label] = self.height(self.flat[label])

    def height(self, flat: Array) -> Array:
        """Return losses ``[n]`` at parameters ``[n, entries]``, on a batch of held-out data that is always the same."""
        params = self._unflatten(torch.from_numpy(flat).float())
        once = ({k: t[0] for k, t in tensors.items()} for tensors in (self._buffers, self._data, self._batch))
        with torch.no_grad():
            losses = vmap(lambda p, *rest: self._family.loss(p, *rest)[0], (0, None, None, None), chunk_size=256)(
                params, *once
            )
        return np.asarray(losses.double().numpy())

    def filter_normalised(self, direction: Array, end: Array) -> Array:
        """Return ``direction`` with every filter as long as that of ``end``; 0 for biases and what else has one
        axis."""
        rows = self._unflatten(torch.from_numpy(np.stack([direction, end])))
        return np.concatenate([_as_long(d, e).flatten().numpy() for d, e in (t.unbind(0) for t in rows.values())])

    def _unflatten(self, flat: Tensor) -> Params:
        sizes = [t[0].numel() for t in self._shapes.values()]
        parts = zip(self._shapes.items(), flat.split(sizes, 1), strict=True)
        return {name: part.reshape(-1, *t.shape[1:]) for (name, t), part in parts}


def _as_long(direction: Tensor, end: Tensor) -> Tensor:
    if direction.ndim < 2:
        return torch.zeros_like(direction)
    rows, lengths = direction.flatten(1), end.flatten(1).norm(dim=1, keepdim=True)
    return rows * lengths / rows.norm(dim=1, keepdim=True).clamp(min=1e-30)


def walk(family: TaskFamily, entrants: Mapping[str, Entrant], steps: int, seed: int) -> Walked:
    """Run each optimizer on the same problem and keep the parameters of every step; of a grid, the first rate's."""
    check_int("steps", steps)
    walked = Walked(family, seed)
    for entrant in entrants.values():
        generator = torch.Generator().manual_seed(seed)
        begun = entrant.begin(family, steps, 1, generator)
        state, params = begun.state, [begun.state.params]
        with torch.no_grad():
            for _ in range(steps):
                state, _ = begun.train(state, 1)
                params.append(state.params)
        walked.add(entrant.label, [{k: t[:1].clone() for k, t in p.items()} for p in params])
    return walked


def landscape_png(found: Sequence[Paths], colours: Mapping[str, str]) -> bytes:
    """Draw a PNG of several landscapes side by side.  colours: by label. Raises `ConfigurationError` without
    matplotlib."""
    figure, _ = _figure(found, colours, None)
    return png(figure)


def landscape_gif(found: Sequence[Paths], colours: Mapping[str, str], frames: int = 40) -> bytes:
    """Draw the same as an animation, which shows how soon each optimizer is where; the last picture stays for a
    while."""
    require("matplotlib", "PIL")
    from PIL import Image

    figure, lines = _figure(found, colours, 72)
    longest = max(len(p) for each in found for p in each.places.values())
    pictures = []
    for until in np.unique(np.geomspace(1, longest, frames).round().astype(int)):
        for line, dot, path in lines:
            line.set_data(*path[:until].T)
            dot.set_data(*path[min(until, len(path)) - 1 : until][-1:].T)
        figure.canvas.draw()
        pictures.append(
            Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3]).quantize(128, Image.Quantize.FASTOCTREE)
        )
    out = io.BytesIO()
    durations = [90] * (len(pictures) - 1) + [2500]
    pictures[0].save(out, "GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0, optimize=True)
    return out.getvalue()


def _figure(found: Sequence[Paths], colours: Mapping[str, str], dpi: int | None) -> tuple[Any, list[tuple[Any, ...]]]:
    """Panels with every path, and of each its line, its end, and its places."""
    if not found:
        raise ConfigurationError("found=[]: expected at least one landscape")
    columns = min(2, len(found))
    rows = -(-len(found) // columns)
    figure = new_figure(max(5.2 * columns, 6.5), 4.3 * rows + 0.4)
    if dpi:
        figure.set_dpi(dpi)
    lines: list[tuple[Any, ...]] = []
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel, paths in zip(panels, found, strict=False):
        lines += _draw(panel, paths, colours)
    for panel in panels[len(found) :]:
        panel.remove()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False)
    return figure, lines


def _draw(panel: Any, paths: Paths, colours: Mapping[str, str]) -> list[tuple[Any, ...]]:
    low, high = _window(paths)
    points = _GRID if len(paths.origin) == 2 else _COARSE
    x, y = (np.linspace(low[i], high[i], points) for i in (0, 1))
    grid = np.stack(np.meshgrid(x, y), -1).reshape(-1, 2)
    height = paths.height(paths.origin + grid @ paths.axes).reshape(points, points)
    # Levels are even in the rank of heights, so that basins and slopes of any scale show.
    shown = np.where(np.isfinite(height), height, np.nanmax(height[np.isfinite(height)]))
    levels = np.unique(np.quantile(shown, np.linspace(0, 1, _LEVELS) ** 1.5))
    panel.contourf(x, y, shown, levels=levels, cmap="Greys", alpha=0.55)
    panel.contour(x, y, shown, levels=levels, colors="#555555", linewidths=0.4)
    start = next(iter(paths.places.values()))[0]
    panel.plot(*start, marker="o", color="white", markeredgecolor="black", markersize=7, zorder=5)
    lines = []
    for rank, (label, path) in enumerate(paths.places.items()):  # the first on top, and thin enough to see the others
        over = {"color": colours[label], "zorder": 4 - 0.1 * rank}
        (line,) = panel.plot(*path.T, linewidth=1.8 + 0.8 * rank, label=label, **over)
        (dot,) = panel.plot(*path[-1:].T, marker="o", markeredgecolor="white", **over)
        lines.append((line, dot, path))
    panel.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), xlabel=paths.labels[0], ylabel=paths.labels[1])
    panel.set_title(paths.title, fontsize=10)
    frame(panel)
    panel.grid(False)
    return lines


def _window(paths: Paths) -> tuple[Array, Array]:
    """The corners of the picture: what the paths cover, but for what is far out."""
    places = np.concatenate(list(paths.places.values()))
    places = places[np.isfinite(places).all(1)]
    middle = np.median(places, 0)
    size = np.quantile(np.abs(places - middle), 0.9, axis=0) + 1e-9
    inside = places[(np.abs(places - middle) <= _FAR * size).all(1)]
    start = next(iter(paths.places.values()))[:1]
    inside = np.concatenate([inside, start])
    low, high = inside.min(0), inside.max(0)
    pad = _MARGIN * np.maximum(high - low, 0.3 * (high - low).max() + 1e-9)
    return low - pad, high + pad
