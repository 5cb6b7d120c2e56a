"""Text and sequences: a decoder; state spaces, gates, rotations, forecasts, sorting."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import orthogonal

from meta_train.problems.common import Begun, Draw, Parts, perceptron, problem
from meta_train.problems.data import characters, digits


class GatedBlock(nn.Module):
    """Attention that weakens with distance (ALiBi) and a gated perceptron (SwiGLU), with RMS norms before them."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor like ``x [n, length, width]``."""
        n, length, width = x.shape
        place = torch.arange(length)
        distance = (place[:, None] - place).float()
        slopes = 2.0 ** -torch.arange(1, self.heads + 1)
        bias = (-slopes[:, None, None] * distance).masked_fill(distance < 0, -math.inf)
        q, k, v = self.qkv(self.norms[0](x)).view(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        looked = F.scaled_dot_product_attention(q, k, v, bias)
        x = x + self.out(looked.transpose(1, 2).reshape(n, length, width))
        gate, value = self.up(self.norms[1](x)).chunk(2, 2)
        total: Tensor = x + self.down(F.silu(gate) * value)
        return total


@problem(400)
def alibi_swiglu_decoder(draw: Draw) -> Begun:
    """Predict characters by a decoder as large models have it now, from weights of deviation 0.02."""
    text, kinds = characters()
    blocks = [GatedBlock(48, 4) for _ in range(2)]
    model = nn.Sequential(nn.Embedding(kinds, 48), *blocks, nn.RMSNorm(48), nn.Linear(48, kinds, bias=False))
    for name, p in model.named_parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.02 / 2 if "down" in name or "out" in name else 0.02)

    def loss() -> Tensor:
        x = text[draw.spans(len(text), 6, 41)]
        return F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())

    return Begun(model, loss)


class StateSpace(nn.Module):
    """Linear systems with a diagonal, complex state of four per channel, run as a convolution (S4D)."""

    def __init__(self, width: int, states: int = 4) -> None:
        super().__init__()
        self.log_step = nn.Parameter(torch.rand(width) * math.log(100) + math.log(1e-3))
        self.log_decay = nn.Parameter(torch.full((width, states), 0.5).log())
        self.speed = nn.Parameter(math.pi * torch.arange(float(states)).repeat(width, 1))
        self.readout = nn.Parameter(torch.randn(width, states, 2))
        self.direct = nn.Parameter(torch.randn(width))
        self.mix = nn.Linear(width, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor like ``x [n, length, width]``."""
        length = x.shape[1]
        pole = torch.complex(-self.log_decay.exp(), self.speed)
        step = self.log_step.exp()[:, None]
        weight = torch.view_as_complex(self.readout) * ((pole * step).exp() - 1) / pole
        powers = (pole * step)[..., None] * torch.arange(length)
        kernel = 2 * (weight[..., None] * powers.exp()).sum(1).real
        u = x.transpose(1, 2)
        spectrum = torch.fft.rfft(kernel, 2 * length) * torch.fft.rfft(u, 2 * length)
        made = torch.fft.irfft(spectrum, 2 * length)[..., :length] + self.direct[:, None] * u
        return x + F.glu(self.mix(F.gelu(made.transpose(1, 2))), 2)


@problem(300)
def s4d_pixels(draw: Draw) -> Begun:
    """Classify digits that are read pixel by pixel, by two layers of state spaces."""
    images, labels = digits()
    layers = [StateSpace(24), nn.LayerNorm(24), StateSpace(24), nn.LayerNorm(24)]
    model = Parts(read=nn.Linear(1, 24), layers=nn.Sequential(*layers), head=nn.Linear(24, 10))

    def loss() -> Tensor:
        x, y = draw.batch(16, images[..., None], labels)
        return F.cross_entropy(model.head(model.layers(model.read(x)).mean(1)), y)

    return Begun(model, loss)


class MinGRU(nn.Module):
    """A GRU whose gates do not see the state, run all at once in logarithms (Feng et al. 2024)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.both = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor like ``x [n, length, width]``."""
        gate, value = self.both(self.norm(x)).chunk(2, 2)
        log_value = torch.where(value >= 0, (value.relu() + 0.5).log(), -F.softplus(-value))
        kept = F.logsigmoid(-gate).cumsum(1)
        state = (kept + torch.logcumsumexp(F.logsigmoid(gate) + log_value - kept, 1)).exp()
        total: Tensor = x + self.out(state)
        return total


@problem(600)
def mingru_copy(draw: Draw) -> Begun:
    """Recall three letters, which stand anywhere among blanks, in order, by two layers of minimal GRUs."""
    letters, length = 6, 12
    model = nn.Sequential(nn.Embedding(letters + 4, 32), MinGRU(32), MinGRU(32), nn.Linear(32, letters))
    ask = torch.arange(letters + 1, letters + 4)

    def loss() -> Tensor:
        places = draw.uniform(24, length).argsort(1)[:, :3].sort(1).values
        recalled = draw.integers(letters, 24, 3)
        x = torch.full((24, length), letters).scatter(1, places, recalled)
        logits = model(torch.cat([x, ask.expand(24, 3)], 1))[:, -3:]
        return F.cross_entropy(logits.flatten(0, 1), recalled.flatten())

    return Begun(model, loss)


@problem(400)
def rotation_rnn_copy(draw: Draw) -> Begun:
    """Recall four letters after eight blanks by a recurrent network whose matrix stays orthogonal."""
    turn = orthogonal(nn.Linear(40, 40, bias=False), orthogonal_map="matrix_exp")
    model = Parts(letters=nn.Embedding(7, 40), turn=turn, bias=torch.zeros(40), head=nn.Linear(40, 6))

    def loss() -> Tensor:
        recalled = draw.integers(5, 32, 4)
        x = torch.cat([recalled, torch.full((32, 8), 5), torch.full((32, 4), 6)], 1)
        state, seen = torch.zeros(32, 40), []
        with parametrize.cached():
            for step in range(16):
                state = model.turn(state) + model.letters(x[:, step])
                state = state.sign() * (state.abs() + model.bias).relu()
                seen.append(state)
        return F.cross_entropy(model.head(torch.stack(seen[-4:], 1)).flatten(0, 1), recalled.flatten())

    return Begun(model, loss)


@problem(500)
def nbeats_raw(draw: Draw) -> Begun:
    """Forecast eight values of seasonal series in the hundreds by three blocks that take off what they explain."""
    blocks = nn.ModuleList(perceptron(32, 64, 64, 40) for _ in range(3))

    def loss() -> Tensor:
        time = torch.arange(40.0)
        level, slope, size, phase = (draw.uniform(64, 1) for _ in range(4))
        season = (2 * math.pi * (time / 12 + phase)).sin()
        series = 100 + 300 * level + 4 * (slope - 0.5) * time + 60 * size * season + 3 * draw.normal(64, 40)
        rest, forecast = series[:, :32], torch.zeros(64, 8)
        for block in blocks:
            back, ahead = block(rest).split([32, 8], 1)
            rest, forecast = rest - back, forecast + ahead
        return F.l1_loss(forecast, series[:, 32:])

    return Begun(blocks, loss)


@problem(600)
def pointer_sort(draw: Draw) -> Begun:
    """Point at seven numbers in order of size, by attention from one step of an LSTM to the next (Vinyals 2015)."""
    model = Parts(
        read=nn.LSTM(1, 48, batch_first=True),
        write=nn.LSTM(1, 48, batch_first=True),
        key=nn.Linear(48, 48, bias=False),
        query=nn.Linear(48, 48, bias=False),
        score=draw.normal(48) * 0.1,
    )

    def loss() -> Tensor:
        x = draw.uniform(32, 7)
        ordered, order = x.sort(1)
        memory, state = model.read(x[..., None])
        shifted = torch.cat([torch.zeros(32, 1), ordered[:, :-1]], 1)
        hidden = model.write(shifted[..., None], state)[0]
        logits = (model.key(memory)[:, None] + model.query(hidden)[:, :, None]).tanh() @ model.score
        return F.cross_entropy(logits.flatten(0, 1), order.flatten())

    return Begun(model, loss)
