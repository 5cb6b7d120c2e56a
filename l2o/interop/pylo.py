"""State dicts of PyLO (https://github.com/Belilovsky-Lab/pylo), under the paths and in the layout of the JAX originals.

PyLO took its weights from there: a ``torch.nn.Linear`` has the transposed matrix, ``[out, in]``, a bare parameter of
CELO2 the original's, ``[in, out]``, and one of VeLO ``[inits, out, in]``. Which it is follows from the name.

The networks become the originals' optimizers, from which PyLO's own steps differ in two places: its VeLO takes rows for
columns in tensors whose largest axes are equal, and the Adam beside its CELO2 corrects the bias of its moments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import count, takewhile

from torch import Tensor

from l2o.types import CheckpointError, Theta

GROUPS = (1, 1, 1, 3, 1, 3, 1, 3, 1, 3, 3, 3, 3, 3)
"""Channels of each group of inputs of the per-parameter network of VeLO, Celo and Celo2: ``w0__0`` to ``w0__13``."""

_RNN = {
    "mix_layer1": "linear",
    "mix_layer2": "linear_1",
    "final_mix_layer": "linear_2",
    "lstm.linear": "rnn/linear",
    "rnn_to_controls": "rnn_to_controls",
    "step_size": "step_size",
}
"""The layers of ``VeLORNN``, each with its name in the original's ``rnn_params``."""


STEP_MULT = 0.01
DECAYS = {
    "momentum_decays": (0.15216392, 0.14245212, 0.06812963),
    "rms_decays": (0.01079706,),
    "adafactor_decays": (0.18621896, -0.10864615, -0.06185547),
}
"""Defaults of ``AdafacLO_naive`` and ``AdafacLO_cuda``: meta-parameters and a hyperparameter of small_fc that PyLO
keeps in its code, not in the files of the network."""


def original_names(tensors: Mapping[str, Tensor]) -> Theta:
    """Return the tensors of state dicts, their networks under the original's paths; the rest, and shapes but for
    transposed layers, stay as they are.

    Known are ``MetaMLP`` (small_fc, µLO, ELO), ``VeLORNN`` and ``VeLOMLP``, ``CELO2MLP``, and ``Celo2MLP`` before it.
    Raises `CheckpointError`, naming the tensor, where one of these networks is not whole.
    """
    rest = dict(tensors)
    found: Theta = {}
    for network, (mark, convert) in _NETWORKS.items():
        if mark in tensors:
            try:
                found |= convert(rest)
            except (KeyError, RuntimeError) as error:
                raise CheckpointError(f"{mark!r} is of PyLO's {network}, which is not whole: {error}") from error
    return found | rest


def assumed(tensors: Mapping[str, Tensor]) -> dict[str, float | tuple[float, ...]]:
    """Return meta-parameters and hyperparameters, by name, that PyLO has for a network of these tensors beside its
    file. Only names count, not shapes."""
    return {**DECAYS, "step_mult": STEP_MULT} if _NETWORKS["MetaMLP"][0] in tensors else {}


def _meta_mlp(rest: Theta) -> Theta:
    layers = ["network.input", *_numbered(rest, "network.linear_{}", ".weight"), "network.output"]
    return {f"nn/~/{kind}{i}": t for i, layer in enumerate(layers) for kind, t in _linear(rest, layer).items()}


def _velo_rnn(rest: Theta) -> Theta:
    found = {f"lstm_init_state/{path}": rest.pop(f"lstm_init_state.{i}") for i, path in enumerate(("hidden", "cell"))}
    for name, path in _RNN.items():
        found |= {f"rnn_params/{path}/{kind}": tensor for kind, tensor in _linear(rest, name).items()}
    return found


def _velo_mlp(rest: Theta) -> Theta:
    hidden = len(_numbered(rest, "hidden_weights_.{}"))
    layers = [("input", ""), *(("hidden", f".{i}") for i in range(hidden)), ("output", "")]
    found: Theta = {}
    for i, (layer, number) in enumerate(layers):
        found[f"w{i}"] = rest.pop(f"{layer}_weights_{number}").mT
        found[f"b{i}"] = rest.pop(f"{layer}_bias_{number}")
        for kind in ("weights", "bias"):  # the mixture of them that was in use last
            rest.pop(f"{layer}_{kind}{number}", None)
    return _stack(found)


def _celo2(rest: Theta) -> Theta:
    found = {name.replace(".", "__"): rest.pop(name) for name in _numbered(rest, "w0.{}")}
    found["b0"] = rest.pop("b0")
    for i, name in enumerate(_numbered(rest, "dense_w.{}")):
        found[f"w{i + 1}"], found[f"b{i + 1}"] = rest.pop(name), rest.pop(name.replace("_w", "_b"))
    return _stack(found)


def _early_celo2(rest: Theta) -> Theta:
    layers = ("first_layer", "hidden", "output")
    return _stack({f"{kind}{i}": t for i, layer in enumerate(layers) for kind, t in _linear(rest, layer).items()})


_NETWORKS: dict[str, tuple[str, Callable[[Theta], Theta]]] = {
    "MetaMLP": ("network.input.weight", _meta_mlp),
    "VeLORNN": ("mix_layer1.weight", _velo_rnn),
    "VeLOMLP": ("input_weights_", _velo_mlp),
    "CELO2MLP": ("w0.0", _celo2),
    "Celo2MLP": ("first_layer.weight", _early_celo2),
}
"""Each network by a tensor that no other has. What converts it takes the tensors out of the dict that it is given."""
ORIGINALS = {
    "MetaMLP": "AdafacMLPLOpt",
    "VeLORNN": "HyperV2",
    "VeLOMLP": "HyperV2",
    "CELO2MLP": "celo2_optax.scale_by_celo2",
    "Celo2MLP": "celo2_optax.scale_by_celo2",
}
"""The name, in `l2o.interop.references`, of what each network is of."""


def _numbered(tensors: Theta, name: str, end: str = "") -> list[str]:
    """``name`` with 0, 1, ... in it, as long as there are such tensors; ``end`` is not part of what is returned."""
    return list(takewhile(lambda each: each + end in tensors, map(name.format, count())))


def _linear(rest: Theta, name: str) -> Theta:
    return {"w": rest.pop(f"{name}.weight").mT, "b": rest.pop(f"{name}.bias")}


def _stack(layers: Theta) -> Theta:
    """``ff_mod_stack`` of the original, where the first layer has a matrix for each group of inputs."""
    if "w0" in layers:
        groups = layers.pop("w0").split(GROUPS, -2)
        layers |= {f"w0__{j}": group for j, group in enumerate(groups)}
    return {f"ff_mod_stack/~/{name}": tensor for name, tensor in layers.items()}
