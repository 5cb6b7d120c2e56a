"""The share that an optimizer's step has of a whole training step of a language model, by operations and by time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from l2o.bench.cost import YARDSTICK, step_cost
from l2o.ops.eigenbasis import Whitening, init_basis, whiten
from l2o.ops.moments import Shares
from l2o.ops.orthogonal import matrices, polar
from l2o.optim import LearnedOptimizer
from l2o.rules import Steered

_PER_PARAMETER = 6
"""Operations of a training step for each parameter and token: two forwards, four backwards (Kaplan et al. 2020, arXiv
2001.08361, section 2.1)."""


@dataclass(frozen=True)
class Decoder:
    """The sizes of a language model; those of GPT-2-small (Radford et al. 2019) by default.

    sample: tokens of the forward and backward pass that is timed.
    """

    vocabulary: int = 50257
    context: int = 1024
    width: int = 768
    blocks: int = 12
    heads: int = 12
    sample: int = 512

    def model(self) -> Language:
        """Make a fresh one."""
        return Language(self)


class Language(nn.Module):
    """A causal transformer, normalised before its blocks, whose output is tied to its embedding."""

    def __init__(self, sizes: Decoder) -> None:
        super().__init__()
        width = sizes.width
        self.tokens, self.places = nn.Embedding(sizes.vocabulary, width), nn.Embedding(sizes.context, width)
        layer = nn.TransformerEncoderLayer(
            width, sizes.heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, sizes.blocks, nn.LayerNorm(width), enable_nested_tensor=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the mean loss, 0-d, of each of ``tokens``, int64 ``[batch, length]``, after the first."""
        length = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=tokens.device)
        x = self.tokens(tokens) + self.places(torch.arange(length, device=tokens.device))
        logits = self.blocks(x, mask, is_causal=True) @ self.tokens.weight.T
        return cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def product_flops(rule: Steered, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> int:
    """Count the operations of the products by which a step of ``rule`` finds the directions of tensors of these shapes.

    dtype: of the products, on which their form depends. Those of bases that follow, in rare steps, do not count.
    """
    from torch.utils.flop_counter import FlopCounterMode  # which imports Triton, before it is known how that is to run

    counter, share = FlopCounterMode(display=False), torch.tensor(0.5, dtype=dtype)
    how = Whitening(Shares(share, share), share, due=False)
    with counter, torch.no_grad():
        for shape in shapes:
            x = matrices(torch.empty(1, *shape, dtype=dtype, device="meta"))
            if rule.path(shape) == "orthogonal":
                polar(x, rule.iterations)
            elif rule.path(shape) == "eigenbasis":
                whiten(how, x, {name: t.unsqueeze(0) for name, t in init_basis(x[0], x.shape[1:]).items()})
    return int(counter.get_total_flops())


def measure_share(source: str, tokens: int, sizes: Decoder = Decoder()) -> dict[str, Any]:
    """Measure a record of ``source``, a checkpoint of `l2o.rules.Steered`, in a training step of so many tokens, on the
    CPU.

    Times are of the thread where it is one: of an optimizer's step as it is; of forward and backward passes of
    ``sizes.sample`` tokens in float32, taken to grow as tokens do.
    """
    torch.manual_seed(0)
    model = sizes.model()
    shapes = [tuple(p.shape) for p in model.parameters()]
    entries = sum(p.numel() for p in model.parameters())
    passes = _passes_seconds(model, sizes) * tokens / sizes.sample
    makers = {source: lambda params: LearnedOptimizer(params, source, total_steps=10**6, guard=False)}
    costs = step_cost(makers | {YARDSTICK: lambda params: torch.optim.AdamW(params, fused=True)}, model, rounds=3)
    steps = {name: cost.cpu_seconds or cost.seconds for name, cost in costs.items()}
    rule: Any = LearnedOptimizer(model.parameters(), source, total_steps=1).rule
    flops = {str(t)[6:]: product_flops(rule, shapes, t) for t in (torch.bfloat16, torch.float32)}
    training = _PER_PARAMETER * entries * tokens
    about = {"rule": source, "parameters": entries, "tokens": tokens, "threads": torch.get_num_threads()}
    return {
        **about,
        "sample_tokens": sizes.sample,
        "training_flops": training,
        **{f"step_flops_{name}": count for name, count in flops.items()},
        **{f"flops_share_{name}": count / (training + count) for name, count in flops.items()},
        "training_seconds_extrapolated": passes,
        "step_seconds": steps[source],
        "adamw_step_seconds": steps[YARDSTICK],
        "time_share": steps[source] / (passes + steps[source]),
        "adamw_time_share": steps[YARDSTICK] / (passes + steps[YARDSTICK]),
    }


def _passes_seconds(model: nn.Module, sizes: Decoder, rounds: int = 3) -> float:
    """Of forward and backward passes, the median; the first does not count."""
    tokens = torch.randint(sizes.vocabulary, (1, sizes.sample))
    alone, seconds = torch.get_num_threads() == 1, []
    for _ in range(rounds + 1):
        clock = time.thread_time if alone else time.perf_counter
        began = clock()
        model(tokens).backward()
        seconds.append(clock() - began)
        model.zero_grad()
    return median(seconds[1:])
