"""The CPU kernels: compiled by the machine's own compiler when first needed, then kept on disk and loaded by ctypes.

Each source file is a library of its own, so that nobody waits for kernels that are not used; a few seconds each.
``L2O_KERNELS=0`` turns them off, ``L2O_KERNELS=1`` makes it an error when they cannot be built. Otherwise one
`RuntimeWarning` says what is missing, and torch's own operations do the work. The compiler is ``$CXX``, else ``c++``;
what it builds is kept in ``$L2O_CACHE_DIR``, ``$XDG_CACHE_HOME/l2o`` or ``~/.cache/l2o``, under ``kernels``.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from l2o import disk
from l2o.types import ConfigurationError, L2OError

SOURCES = Path(__file__).parent
# No -ffast-math: a diverged lane has to show its NaN. libgomp is the thread pool that torch has already loaded.
FLAGS = ["-std=c++17", "-O2", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
LINK = ["-fopenmp", "-shared", "-fPIC"]

_lock = threading.Lock()
_said: set[str] = set()
_loaded: dict[str, ctypes.CDLL | str] = {}
"""By source: the library, or why there is none."""
_compared: set[tuple[str, type[ctypes.Structure]]] = set()
"""Sources, and structures that are known to be laid out as theirs."""


def setting() -> str:
    """Return ``L2O_KERNELS``: 0, 1, or nothing; raises `ConfigurationError` for anything else."""
    value = os.environ.get("L2O_KERNELS", "")
    if value not in ("", "0", "1"):
        raise ConfigurationError(f"L2O_KERNELS={value!r}: expected 0 (off), 1 (required), or nothing")
    return value


def available(*sources: str) -> bool:
    """Say whether the kernels of these files, named without ``.cpp``, can be run; where not, torch has to do.

    What no process has built before is built now, all at once, which takes seconds. Raises `L2OError` with the
    compiler's message under ``L2O_KERNELS=1``.
    """
    if setting() == "0":
        return False
    with _lock:
        missing = [source for source in sources if source not in _loaded]
        if missing:
            with ThreadPoolExecutor(len(missing)) as pool:  # its threads wait for compilers
                _loaded.update(zip(missing, pool.map(_load, missing), strict=True))
    reasons = [loaded for source in sources if isinstance(loaded := _loaded[source], str)]
    if not reasons:
        return True
    if setting() == "1":
        raise L2OError(f"L2O_KERNELS=1, but the CPU kernels cannot be used (0: without them): {reasons[0]}")
    if reasons[0] not in _said:
        _said.add(reasons[0])  # before the warning, which may be raised as an error
        warnings.warn(
            f"l2o's CPU kernels cannot be used: {reasons[0]}. Torch's own operations stand in, several times slower. "
            "L2O_KERNELS=0 silences this.",
            RuntimeWarning,
            stacklevel=2,
        )
    return False


def run(source: str, function: str, *structures: ctypes.Structure) -> int:
    """Call a kernel of ``source``, which has to be `available`, the GIL released.

    Returns its code; raises MemoryError where it has no memory, `L2OError` where a structure is not laid out as there.
    """
    for structure in map(type, structures):
        if (source, structure) not in _compared:
            _compare(source, structure)
    code: int = getattr(_loaded[source], function)(*map(ctypes.byref, structures))
    if code == 1:
        raise MemoryError(f"{function}: no memory to work in")
    return code


def _compare(source: str, structure: type[ctypes.Structure]) -> None:
    """Size and offsets of a structure, and of those it points to, with the library's: else it would write anywhere."""
    name = structure.__name__.removeprefix("_")
    own = [ctypes.sizeof(structure), *(getattr(structure, field[0]).offset for field in structure._fields_)]
    found = (ctypes.c_int64 * (len(own) + 1))(*[-1] * (len(own) + 1))
    getattr(_loaded[source], f"l2o_layout_{name}", lambda _: None)(found)
    if [*own, -1] != list(found):
        raise L2OError(f"{name} of {source}.cpp is laid out as {list(found)}, its mirror in Python as {own}")
    for field in structure._fields_:
        pointed = getattr(field[1], "_type_", None)
        if isinstance(pointed, type) and issubclass(pointed, ctypes.Structure):
            _compare(source, pointed)
    _compared.add((source, structure))


def _load(source: str) -> ctypes.CDLL | str:
    """The library, or why there is none."""
    try:
        return ctypes.CDLL(str(build(source)))
    except (L2OError, OSError) as error:
        return str(error)


def build(source: str) -> Path:
    """Return the path of the compiled kernels of ``source``, which are compiled where no earlier process has done so.

    Raises `L2OError` where there is no compiler, where it fails, or where the folder belongs to somebody else; OSError
    where the folder cannot be written.
    """
    if sys.platform != "linux":
        raise L2OError(f"they are for Linux, this is {sys.platform}")
    compiler = _compiler()
    path = cache_folder() / f"{source}-{_key(compiler, source)}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory() as scratch:
            built = Path(scratch) / "kernels.so"
            _run([*compiler, *FLAGS, *LINK, str(SOURCES / f"{source}.cpp"), "-o", str(built)])
            disk.atomic_write(path, built.read_bytes())
    return path


def cache_folder() -> Path:
    """Return the folder of compiled kernels, ours alone: whoever can write to it decides what runs here."""
    folder = disk.cache_folder() / "kernels"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise L2OError(f"{folder} belongs to or can be written by others; name a folder of your own in L2O_CACHE_DIR")
    return folder


def _compiler() -> list[str]:
    command = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    if shutil.which(command[0]) is None:
        raise L2OError(f"there is no C++ compiler {command[0]!r}; install g++, or name a compiler in CXX")
    return command


def _key(compiler: list[str], source: str) -> str:
    """A hash of all that decides what the compiler makes."""
    digest = hashlib.sha256()
    for file in [SOURCES / f"{source}.cpp", *sorted(SOURCES.glob("*.h"))]:
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    for words in ([*compiler, *FLAGS, *LINK], [_run([*compiler, "--version"])], _processor()):
        digest.update("\0".join(words).encode() + b"\0")
    return digest.hexdigest()[:32]


def _processor() -> list[str]:
    """What -march=native looks at: a home folder may be shared by machines of several kinds."""
    lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").split("\n\n")[0].splitlines()
    named = ("model name", "flags", "Features", "CPU implementer", "CPU part", "cpu family", "model\t")
    return [platform.machine(), *(line for line in lines if line.startswith(named))]


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise L2OError(f"{shlex.join(command)} failed:\n{done.stderr.strip() or done.stdout.strip()}")
    return done.stdout
