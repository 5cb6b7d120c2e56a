"""Weights as others write them, small and random: files of flax, and state dicts of PyLO's networks."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from msgpack_writer import pack
from torch import Tensor

from l2o.interop.pylo import GROUPS
from l2o.rules import AdafacMLP, Celo, Celo2, CeloAdam, VeLO


def linear(name: str, fan_in: int, fan_out: int) -> dict[str, Tensor]:
    """A ``torch.nn.Linear`` of a state dict."""
    return {f"{name}.weight": torch.randn(fan_out, fan_in), f"{name}.bias": torch.randn(fan_out)}


def velo(hidden: int = 6, inits: int = 2) -> dict[str, Tensor]:
    """The state dicts of both networks of PyLO's VeLO."""
    state = linear("lstm.linear", 2 * hidden, 4 * hidden) | linear("rnn_to_controls", hidden, inits)
    state |= linear("step_size", hidden, 1)
    for layer in ("mix_layer1", "mix_layer2", "final_mix_layer"):
        state |= linear(layer, 30, hidden)
    state |= {f"lstm_init_state.{i}": torch.randn(1, hidden) for i in range(2)}
    for layer, end, fan_in, fan_out in (("input", "", 30, 4), ("hidden", ".0", 4, 4), ("output", "", 4, 3)):
        for kind, shape in (("weights", (fan_out, fan_in)), ("bias", (fan_out,))):
            state[f"{layer}_{kind}_{end}"] = torch.randn(inits, *shape)
            state[f"{layer}_{kind}{end}"] = torch.randn(shape)  # the mixture in use, which is no meta-parameter
    return state


Shapes = dict[str, tuple[int, ...]]


def stack(units: int, *inits: int) -> Shapes:
    """The networks of VeLO, Celo (``inits`` of them) and Celo2 (one)."""
    shapes: Shapes = {f"ff_mod_stack/~/w0__{j}": (*inits, n, units) for j, n in enumerate(GROUPS)}
    for i, (fan_in, fan_out) in enumerate(((0, units), (units, units), (units, 3))):
        shapes |= {f"ff_mod_stack/~/w{i}": (*inits, fan_in, fan_out)} if i else {}
        shapes |= {f"ff_mod_stack/~/b{i}": (*inits, fan_out)}
    return shapes


def scheduler(inputs: int, hidden: int, inits: int = 0) -> Shapes:
    """The LSTM of VeLO and Celo, and what reads its state."""
    shapes: Shapes = {f"lstm_init_state/{name}": (1, hidden) for name in ("hidden", "cell")}
    layers = {"linear": (inputs, hidden), "linear_1": (inputs, hidden), "linear_2": (inputs, hidden)}
    layers |= {"rnn/linear": (2 * hidden, 4 * hidden), "step_size": (hidden, 1)}
    layers |= {"rnn_to_controls": (hidden, inits)} if inits else {}
    for name, shape in layers.items():
        shapes |= {f"rnn_params/{name}/w": shape, f"rnn_params/{name}/b": shape[1:]}
    return shapes


def adafac(*sizes: int) -> Shapes:
    shapes: Shapes = {f"{name}_decays": (n,) for name, n in (("momentum", 3), ("rms", 1), ("adafactor", 3))}
    for i, (fan_in, fan_out) in enumerate(pairwise(sizes)):
        shapes |= {f"nn/~/w{i}": (fan_in, fan_out), f"nn/~/b{i}": (fan_out,)}
    return shapes


CASES = {
    "AdafacMLPLOpt": (adafac(39, 4, 4, 2), AdafacMLP(hidden=(4, 4))),
    "AdafacMLPLOpt, three hidden layers": (adafac(39, 7, 7, 7, 2), AdafacMLP(hidden=(7, 7, 7))),
    "HyperV2": ({**stack(4, 3), **scheduler(30, 8, 3)}, VeLO(lstm_hidden=8, inits=3)),
    "celo.optimizers.celo.Celo": ({**stack(4, 1), **scheduler(18, 8, 1)}, Celo(lstm_hidden=8)),
    "celo.optimizers.celo.Celo, a mixture": ({**stack(4, 5), **scheduler(18, 8, 5)}, Celo(lstm_hidden=8, inits=5)),
    "celo.optimizers.celo_adam.Celo": (scheduler(18, 8), CeloAdam(lstm_hidden=8)),
    "celo2_optax.scale_by_celo2": (stack(8), Celo2(hidden=(8, 8))),
}


def tree(shapes: Shapes) -> dict[str, Any]:
    """Random arrays, nested as flax nests them."""
    rng, nested = np.random.default_rng(0), {}
    for path, shape in shapes.items():
        *folders, leaf = path.replace("rnn/linear", "rnn|linear").split("/")
        node = nested
        for folder in folders:
            node = node.setdefault(folder.replace("|", "/"), {})
        node[leaf] = rng.standard_normal(shape, dtype=np.float32)
    return nested


def write(path: Path, shapes: Shapes) -> Path:
    path.write_bytes(pack(tree(shapes)))
    return path
