"""Files of other projects: MessagePack, flax, PyTorch and PyLO, read without what wrote them; or one clear error."""

from __future__ import annotations

import hashlib
import pickle
import random
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from msgpack_writer import pack
from originals import linear, velo
from torch import Tensor

from l2o.interop.files import read_foreign
from l2o.interop.msgpack import Ext, unpack
from l2o.interop.pylo import GROUPS, original_names
from l2o.types import CheckpointError

TREE = {
    "momentum_decays": np.arange(3, dtype=np.float32),
    "nn": {"~": {"w0": np.arange(12, dtype=np.float32).reshape(3, 4), "b0": np.zeros(4, np.float32)}},
    "rnn_params": {"rnn/linear": {"w": np.ones((70, 80), np.float32)}},
    "log_lr": np.array(0.5, np.float32),
    "empty": np.zeros((0, 3), np.float32),
}
PATHS = {"momentum_decays", "nn/~/w0", "nn/~/b0", "rnn_params/rnn/linear/w", "log_lr", "empty"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "theta.state"


@pytest.mark.parametrize(
    "data", ["", "c1", "0000", "cd00", "dbffffffff", "ddffffffff", "dfffffffff", "a1ff", "8190c0", "91" * 100_000]
)
def test_what_is_no_messagepack_is_one_kind_of_error(data: str) -> None:
    with pytest.raises(CheckpointError, match="no MessagePack"):
        unpack(bytes.fromhex(data))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("8100c0", "the key 0 is not a string|no MessagePack"),
        ("82a161c0a161c0", "the key 'a' is not a string, or comes twice"),
        ("dd00200000" + "c0" * 2**21, "no MessagePack"),
        ("93" + 3 * ("dd00080000" + "c0" * 2**19), "more than 1048576 values"),
    ],
)
def test_what_no_file_of_flax_has_is_refused(data: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        unpack(bytes.fromhex(data))


def test_without_msgpack_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "msgpack", None)
    with pytest.raises(CheckpointError, match=r"pip install 'l2o\[convert\]'"):
        unpack(b"\x00")


def test_arrays_of_flax_are_read_by_path(path: Path) -> None:
    path.write_bytes(pack(TREE))
    found = read_foreign(path)
    assert found.tensors.keys() == PATHS
    assert found.tensors["nn/~/w0"].tolist() == TREE["nn"]["~"]["w0"].tolist()
    assert found.tensors["empty"].shape == (0, 3)
    assert found.tensors["log_lr"].item() == 0.5
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert found.facts == {
        "file": "theta.state", "format": "flax MessagePack", "size": path.stat().st_size, "sha256": digest,
    }  # fmt: skip


@pytest.mark.parametrize("dtype", ["float16", "float64", "int8", "int16", "int32", "int64", "uint8"])
def test_arrays_of_every_dtype(path: Path, dtype: str) -> None:
    path.write_bytes(pack({"a": np.array([[1, 2], [3, 4]], dtype)}))
    tensor = read_foreign(path).tensors["a"]
    assert str(tensor.dtype) == f"torch.{dtype}"
    assert tensor.tolist() == [[1, 2], [3, 4]]


def test_bfloat16_and_scalars(path: Path) -> None:
    number = struct.pack("<f", 1.5)
    path.write_bytes(
        pack({"a": Ext(1, pack([[1], "bfloat16", number[2:]])), "b": Ext(3, pack([[], "float32", number]))})
    )
    assert [t.tolist() for t in read_foreign(path).tensors.values()] == [[1.5], 1.5]


def test_a_checkpoint_of_a_training_program_is_opened(path: Path) -> None:
    path.write_bytes(pack({"params": TREE, "gen_id": "abcd1234", "step": 7}))
    found = read_foreign(path)
    assert found.tensors.keys() == PATHS
    assert found.facts["beside"] == {"gen_id": "abcd1234", "step": 7}


def test_a_truncated_file_is_an_error_wherever_it_ends(path: Path) -> None:
    small = {**TREE, "rnn_params": {}}
    data = pack(small)
    for end in range(len(data)):
        path.write_bytes(data[:end])
        with pytest.raises(CheckpointError, match=r"theta\.state: cannot be read as"):
            read_foreign(path)


def test_a_damaged_file_is_read_or_an_error_and_nothing_else(path: Path) -> None:
    data = pack({**TREE, "rnn_params": {}})
    rng = random.Random(0)
    refused = 0
    for at in range(len(data)):
        damaged = bytearray(data)
        damaged[at] ^= rng.randrange(1, 256)
        path.write_bytes(bytes(damaged))
        try:
            read_foreign(path)
        except CheckpointError:
            refused += 1
    assert 0 < refused < len(data)  # a changed number cannot be noticed


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a": Ext(1, pack([[2], "float32", bytes(4)]))}, "'a' is .*expected shape"),
        ({"a": Ext(1, pack([[2], "float32"]))}, "expected shape"),
        ({"a": Ext(1, pack([2, "float32", bytes(8)]))}, "expected shape"),
        ({"a": Ext(1, pack([[2], "complex64", bytes(16)]))}, "one of float16"),
        ({"a": Ext(1, pack([[2], "object", bytes(16)]))}, "one of float16"),
        ({"a": Ext(1, b"\x93")}, "no MessagePack"),
        ({"a": Ext(1, pack([[0, 2**32 - 1, 2**32 - 1, 2**32 - 1], "int8", b""]))}, ""),
        ({"a": Ext(2, pack([[1], "float32", bytes(4)]))}, "of type 2"),
        ({"a": {"b": "text"}}, "'a/b' is 'text', expected a tensor"),
        ([1], "its content is"),
        ({}, "no tensors"),
        ({"params": {}, "step": 1}, "no tensors"),
    ],
)
def test_what_is_no_theta_is_named(path: Path, tree: object, message: str) -> None:
    path.write_bytes(pack(tree))
    with pytest.raises(CheckpointError, match=rf"theta\.state: cannot be read as flax MessagePack: .*{message}"):
        read_foreign(path)


@pytest.mark.parametrize("legacy", [False, True])
def test_files_of_torch(path: Path, legacy: bool) -> None:
    torch.save(
        {"torch_params": {"input.weight": torch.ones(2, 3)}, "epoch": 3},
        path,
        _use_new_zipfile_serialization=not legacy,
    )
    found = read_foreign(path)
    assert found.tensors["input.weight"].shape == (2, 3)
    assert (found.facts["format"], found.facts["beside"]) == ("PyTorch", {"epoch": 3})


def test_safetensors(path: Path) -> None:
    safetensors.torch.save_file({"a.weight": torch.ones(2)}, path)
    assert read_foreign(path).tensors["a.weight"].tolist() == [1, 1]


def test_safetensors_whose_header_has_a_length_like_the_beginning_of_a_pickle(path: Path) -> None:
    """640 is 80 02 00 ... in the file, and 80 02 is how what torch wrote before 1.6 begins."""
    safetensors.torch.save_file({"a": torch.ones(2)}, path, {"pad": "x" * 554})
    assert path.read_bytes()[:8] == (640).to_bytes(8, "little")
    assert read_foreign(path).tensors["a"].tolist() == [1, 1]


class Trap:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("sprung"),))


@pytest.mark.parametrize("write", [torch.save, lambda trap, path: path.write_bytes(pickle.dumps(trap, 2))])
def test_nothing_is_unpickled(here: Path, write: object) -> None:
    """Nor does the error, one line, advise to: PyTorch's own does."""
    write({"a": Trap()}, here / "theta.pt")  # type: ignore[operator]
    with pytest.raises(
        CheckpointError, match=r"cannot be read as PyTorch: it asks for '[^\n]*save the state_dict\(\)"
    ) as e:
        read_foreign(here / "theta.pt")
    assert "weights_only" not in str(e.value)
    assert not (here / "sprung").exists()


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(1).expand(2**20, 2**20),
        torch.eye(2).to_sparse(),
        torch.ones(2, device="meta"),
    ],
    ids=["a view that is larger than the file", "sparse", "without content"],
)
def test_tensors_that_are_none_to_compute_with(path: Path, tensor: Tensor) -> None:
    torch.save({"a": tensor}, path)
    with pytest.raises(CheckpointError, match=r"'a' is a tensor .*, expected a plain one"):
        read_foreign(path)


def test_a_file_of_torch_that_is_damaged(path: Path) -> None:
    torch.save({"a": torch.ones(1)}, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"cannot be read as PyTorch: .*; expected a theta\.state of flax, or"):
        read_foreign(path)


@pytest.mark.parametrize("data", [b"", b"<!DOCTYPE html>", b"version https://git-lfs.github.com/spec/v1", b"{}"])
def test_what_came_instead_of_a_file_is_told_what_is_expected(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"expected a theta\.state of flax, or a state dict of PyLO"):
        read_foreign(path)


def test_files_that_are_missing_or_too_large(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match=r"cannot be read \(No such file"):
        read_foreign(path)
    path.write_bytes(pack(TREE))
    monkeypatch.setattr("l2o.interop.files.MAX_BYTES", 100)
    with pytest.raises(CheckpointError, match="more than 100 bytes"):
        read_foreign(path)


def run(theta: dict[str, Tensor], root: str, x: Tensor) -> Tensor:
    """The original's MLP: matrices ``[in, out]``, the first one in groups or whole."""
    groups = [theta[name] for j in range(len(GROUPS)) if (name := f"{root}/w0__{j}") in theta]
    weights = [torch.cat(groups) if groups else theta[f"{root}/w0"], theta[f"{root}/w1"], theta[f"{root}/w2"]]
    for i, weight in enumerate(weights):
        x = x @ weight + theta[f"{root}/b{i}"]
        x = x.relu() if i < 2 else x
    return x


def sequential(state: dict[str, Tensor], x: Tensor, *layers: str) -> Tensor:
    for layer in layers:
        x = torch.nn.functional.linear(x, state[f"{layer}.weight"], state[f"{layer}.bias"])
        x = x.relu() if layer != layers[-1] else x
    return x


def test_the_mlps_of_pylo_compute_what_the_originals_layout_does() -> None:
    """Matrices that are square, too: which way round they are follows from the network that they are in."""
    x = torch.randn(7, 39)
    names = ("network.input", "network.linear_0", "network.output")
    small_fc = linear(names[0], 39, 5) | linear(names[1], 5, 5) | linear(names[2], 5, 2)
    torch.testing.assert_close(run(original_names(small_fc), "nn/~", x), sequential(small_fc, x, *names))
    x = x[:, :30]
    early = linear("first_layer", 30, 8) | linear("hidden", 8, 8) | linear("output", 8, 3)
    found = original_names(early)
    torch.testing.assert_close(run(found, "ff_mod_stack/~", x), sequential(early, x, "first_layer", "hidden", "output"))
    celo2 = {f"w0.{j}": found[f"ff_mod_stack/~/w0__{j}"] for j in range(len(GROUPS))} | {
        "b0": early["first_layer.bias"]
    }
    for i, layer in enumerate(("hidden", "output")):
        celo2 |= {f"dense_w.{i}": early[f"{layer}.weight"].T, f"dense_b.{i}": early[f"{layer}.bias"]}
    again = original_names(celo2)
    assert again.keys() == found.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in found.items())


def test_velo_of_pylo_is_the_originals() -> None:
    state = velo()
    found = original_names(state)
    for layer, path in (("mix_layer1", "linear"), ("mix_layer2", "linear_1"), ("final_mix_layer", "linear_2")):
        assert torch.equal(found[f"rnn_params/{path}/w"].T, state[f"{layer}.weight"])
        assert torch.equal(found[f"rnn_params/{path}/b"], state[f"{layer}.bias"])
    assert torch.equal(found["rnn_params/rnn/linear/w"], state["lstm.linear.weight"].T)
    assert torch.equal(found["lstm_init_state/hidden"], state["lstm_init_state.0"])
    assert torch.equal(found["ff_mod_stack/~/w1"], state["hidden_weights_.0"].mT)
    groups = [found[f"ff_mod_stack/~/w0__{j}"] for j in range(len(GROUPS))]
    assert [tuple(group.shape) for group in groups] == [(2, n, 4) for n in GROUPS]
    assert torch.equal(torch.cat(groups, 1), state["input_weights_"].mT)
    assert len(found) == 6 * 2 + 2 + 14 + 2 + 3


@pytest.mark.parametrize("missing", ["mix_layer2.weight", "input_bias_", "output_weights_", "lstm_init_state.1"])
def test_a_network_of_pylo_that_is_not_whole(missing: str) -> None:
    state = velo()
    del state[missing]
    with pytest.raises(CheckpointError, match=f"is of PyLO's VeLO.*not whole: '{missing}'"):
        original_names(state)


def test_what_pylo_does_not_know_stays() -> None:
    assert original_names({"nn/~/w0": torch.ones(1)}) == {"nn/~/w0": torch.ones(1)}
