"""A language model of real text, trained by each optimizer as it comes: where its loss goes, and what a step costs."""

from __future__ import annotations

import sysconfig
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from l2o.bench.share import Decoder, Language
from l2o.ops.orthogonal import is_matrix
from l2o.optim import LearnedOptimizer, param_groups

Scheduled = tuple[list[torch.optim.Optimizer], Callable[[int], float]]
"""Optimizers that step together, and the factor of their rates at a step."""
_SHARE = 0.05
"""Of the steps, those over which a loss that is reported is the mean."""


def text(tokens: int, vocabulary: int) -> Tensor:
    """Return ``tokens`` pairs of bytes of the sources of Python's standard library, int64 ``[tokens]`` below
    ``vocabulary``; anew from the start where the library is shorter."""
    found = bytearray()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if len(found) >= 2 * tokens:
            break
        found += path.read_bytes()
    whole = torch.frombuffer(found, dtype=torch.uint8).repeat(2 * tokens // len(found) + 1)
    pairs = whole[: 2 * tokens].view(-1, 2).long()
    return (pairs[:, 0] + 256 * pairs[:, 1]) % vocabulary


def _cosine(steps: int, warmup: float = 0.05, least: float = 0.1) -> Callable[[int], float]:
    def factor(step: int) -> float:
        done = torch.tensor(max(step / steps - warmup, 0.0) / (1.0 - warmup) * torch.pi)
        return min((step + 1) / (warmup * steps), 1.0) * float(least + (1.0 - least) * 0.5 * (1.0 + done.cos()))

    return factor


def learned(source: Any, graph: bool = False) -> Callable[[nn.Module, int], Scheduled]:
    """Return a maker of the plug-in with a checkpoint.  graph: replay its steps as a CUDA graph, on CUDA."""

    def make(model: nn.Module, steps: int) -> Scheduled:
        optimizer = LearnedOptimizer(param_groups(model), source, total_steps=steps)
        optimizer.cuda_graph = graph and next(model.parameters()).is_cuda
        return [optimizer], lambda step: 1.0

    return make


def adamw(lr: float, cosine: bool) -> Callable[[nn.Module, int], Scheduled]:
    """Return a maker of torch's AdamW, with the moments and the decay of GPT-2's training (nanoGPT)."""

    def make(model: nn.Module, steps: int) -> Scheduled:
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1)
        return [optimizer], _cosine(steps) if cosine else lambda step: 1.0

    return make


def muon(model: nn.Module, steps: int) -> Scheduled:
    """Return torch's Muon at the usual rates for blocks, AdamW for all else, with warm-up and cosine."""
    inner = {id(p) for name, p in model.named_parameters() if p.ndim == 2 and name.startswith("blocks.")}
    parts = [[p for p in model.parameters() if (id(p) in inner) is chosen] for chosen in (True, False)]
    own = [torch.optim.Muon(parts[0], lr=0.02), torch.optim.AdamW(parts[1], lr=3e-3, betas=(0.9, 0.95))]
    return own, _cosine(steps)


OPTIMIZERS: dict[str, Callable[[nn.Module, int], Scheduled]] = {
    "default": learned("default"),
    "default, CUDA graph": learned("default", graph=True),
    "light": learned("light"),
    "AdamW 6e-4, warm-up + cosine": adamw(6e-4, cosine=True),
    "AdamW 3e-3, warm-up + cosine": adamw(3e-3, cosine=True),
    "AdamW 1e-3": adamw(1e-3, cosine=False),
    "Muon 0.02 + AdamW 3e-3, warm-up + cosine": muon,
}
"""None of them is tuned here."""


def train(name: str, sizes: Decoder, steps: int, sequences: tuple[int, int], device: torch.device) -> dict[str, Any]:
    """Train ``sizes`` from GPT-2's start for ``steps`` steps, each on fresh text.

    sequences: of ``sizes.context`` tokens, a batch, and batches a step.
    Returns losses (means over 5% of the steps, in nats a token) at each fifth of the run, and medians of seconds of
    passes and of optimizers' steps, the device waited for.
    """
    torch.manual_seed(0)
    model = _initial(sizes.model()).to(device)
    optimizers, factor = OPTIMIZERS[name](model, steps)
    rates = [(group, group["lr"]) for optimizer in optimizers for group in optimizer.param_groups]
    batch, batches = sequences
    rows = text(steps * batch * batches * sizes.context, sizes.vocabulary).view(-1, sizes.context)
    rows = rows[torch.randperm(len(rows))].to(device)
    losses, passes, own = [], [], []
    for step, chosen in enumerate(rows.split(batch * batches)):
        for group, rate in rates:
            group["lr"] = rate * factor(step)
        began = _now(device)
        losses.append(_passes(model, chosen.split(batch)))
        halfway = _now(device)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        passes.append(halfway - began)
        own.append(_now(device) - halfway)
    curve = torch.stack(losses).cpu()
    window = max(round(_SHARE * steps), 1)
    seconds = {"passes_seconds": median(passes), "step_seconds": median(own), "step_seconds_mean": sum(own) / steps}
    return {
        "optimizer": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": batch * batches * sizes.context,
        "steps": steps,
        "losses": [float(curve[max(end - window, 0) : end].mean()) for end in _fifths(steps)],
        "threads": torch.get_num_threads(),
        **seconds,
        "time_share": seconds["step_seconds_mean"] / (seconds["step_seconds_mean"] + seconds["passes_seconds"]),
    }


def _fifths(steps: int) -> Iterable[int]:
    return (max(steps * i // 5, 1) for i in range(1, 6))


def _initial(model: Language) -> Language:
    """Draw matrices anew with a deviation of 0.02, as GPT-2's are."""
    for p in model.parameters():
        if is_matrix(tuple(p.shape)):
            nn.init.normal_(p, std=0.02)
    return model


def _passes(model: Language, batches: Iterable[Tensor]) -> Tensor:
    """Leave the mean gradient over batches, and return their mean loss, 0-d."""
    every = tuple(batches)
    losses = []
    for tokens in every:
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=tokens.device.type == "cuda"):
            loss = model(tokens) / len(every)
        loss.backward()
        losses.append(loss.detach())
    return torch.stack(losses).sum()


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
