"""What every test shares: a seed, a thread, no uploads, and the folder of golden traces."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from server import Server, running

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = Path(os.environ.get("L2O_GOLDEN_DIR", ROOT.parent / "shared" / "golden"))


def pytest_configure(config: pytest.Config) -> None:
    """Settings of the process, which subprocesses inherit where they are environment variables.

    ``torch.use_deterministic_algorithms`` stays off on purpose: what is claimed to be deterministic has to be so for
    users, who do not turn it on.
    """
    os.environ["WANDB_MODE"] = "offline"  # nobody's account receives the runs of tests
    if not (torch.cuda.is_available() and config.getoption("markexpr") == "cuda"):
        os.environ["TRITON_INTERPRET"] = "1"  # before anything, torch for one, imports Triton
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Modules under test initialise themselves from the global generator; l2o itself never draws from it."""
    torch.manual_seed(0)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The test runs in this empty folder of its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def sgd(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test runs in a folder of its own that has a checkpoint ``sgd``, and commands leave no trace."""
    from l2o.checkpoints import store  # after `pytest_configure`
    from l2o.rules import SGD

    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    store.save("sgd", SGD(), SGD().init_theta(torch.Generator()))


@pytest.fixture(params=[1, 2], ids="{}-threads".format)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """The test runs on one thread of torch, and on two."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of traces recorded from the reference implementations. It is not part of the repository."""
    if not GOLDEN.is_dir():
        pytest.skip(f"no golden traces in {GOLDEN}; name their folder in L2O_GOLDEN_DIR")
    return GOLDEN


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """An HTTP server on this machine with no pages yet, and an empty cache for what is downloaded from it."""
    monkeypatch.setenv("L2O_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with running() as server:
        yield server
