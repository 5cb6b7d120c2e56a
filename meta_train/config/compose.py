"""What the commands share: where the configs are, the device, and one-line errors."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
import shlex
import signal
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from l2o.checks import unknown
from l2o.disk import resource
from l2o.types import ConfigurationError, L2OError, WriteError
from meta_train import stop_early

if TYPE_CHECKING:
    from hydra.errors import HydraException
    from omegaconf import DictConfig

EXTRA = ("hydra", "omegaconf", "yaml", "rich", "matplotlib", "sklearn", "wandb", "higher")
"""Packages of the extra ``train`` that a command may find missing."""
INSTALL = "pip install 'l2o[train]'"

TRAINING = ("rule", "task", "estimator", "outer", "schedule", "logger", r"evaluation\.task")
"""Nodes (patterns) that take keys which the YAML does not mention: the fields of what they make."""

_ANEW = "nothing was written; the same command starts anew"
_kept = [_ANEW]


def config_path() -> str:
    """Return the absolute path of the folder of configs: inside the package in a wheel, at the top of an editable
    checkout.

    Choices that have no file there are entered beside it (`meta_train.config.groups`).
    """
    from meta_train.config.groups import enter_classes

    folder = resource(Path(__file__).resolve().parents[1], "configs")
    enter_classes(folder)
    return str(folder)


def composed(name: str, overrides: Sequence[str]) -> DictConfig:
    """Return the configuration ``name`` with overrides, for a command that is not Hydra's own."""
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(config_path(), version_base="1.3"):
        return compose(name, list(overrides))


def open_settings(arguments: Iterable[str], nodes: Sequence[str]) -> list[str]:
    """Return a command line on which settings under ``nodes``, such as ``task.width=3``, need no ``+``.

    What they may be is known by the class that they are for, not by the YAML. A value that begins with ``~``, which
    Hydra does not read, is quoted.
    """
    opened = re.compile(rf"({'|'.join(nodes)})(\.[\w.]+=|={{)")
    quoted = [re.sub(r"^([\w./@]+)=(~[^\"',]*)$", r'\1="\2"', argument) for argument in arguments]
    return [f"++{argument}" if opened.match(argument) else argument for argument in quoted]


def resolve_device(name: str) -> torch.device:
    """Return the device that ``device=name`` means; ``auto`` is the GPU where there is one."""
    if name not in ("auto", "cpu", "cuda"):
        raise ConfigurationError(f"device={name!r}: expected auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError(
            "device='cuda': this machine has no usable CUDA device; take device=auto or device=cpu"
        )
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")  # the current one


def main_guard(command: Callable[[], None]) -> Callable[[], None]:
    """Wrap a command: errors of the user's input become one line on stderr and exit status 2, others keep their trace.

    The environment variable ``HYDRA_FULL_ERROR=1`` shows the trace of all of them. Ctrl-C is a line, too, that of
    `if_interrupted`, and exit status 130.
    """

    @functools.wraps(command)
    def guarded() -> None:
        if signal.getsignal(signal.SIGINT) is stop_early:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if_interrupted(_ANEW)
        os.environ["MPLBACKEND"] = "agg"  # pictures go to files; what is set, for a notebook say, may not exist here
        try:
            with _hydra_raises() as full:
                command()
        except KeyboardInterrupt:
            print(f"\ninterrupted: {_kept[0]}", file=sys.stderr)
            sys.exit(128 + signal.SIGINT)
        except BrokenPipeError:  # whoever read what is printed has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(128 + 13)  # SIGPIPE, which Windows has no name for
        except Exception as error:
            message = _message(error)
            if full or message is None:
                raise
            print(f"error: {message}", file=sys.stderr)
            sys.exit(2)

    return guarded


def if_interrupted(text: str) -> None:
    """Let Ctrl-C say this from now on: what is kept, and how to go on.  It lasts to the end of the command."""
    _kept[0] = text


@contextlib.contextmanager
def writing(what: object) -> Iterator[None]:
    """Turn what the disk says against the file that is written into a `WriteError` with the way out."""
    try:
        yield
    except L2OError:
        raise
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        way_out = "make room, and the same command goes on from there" if full else "make it writable, or name another"
        raise WriteError(
            f"{what} cannot be written ({error.strerror or error}); all that was saved before is whole: {way_out}"
        ) from error


@contextlib.contextmanager
def _hydra_raises() -> Iterator[bool]:
    """Hydra hands its errors on, instead of printing them and exiting; gives whether the user had asked for that."""
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield before == "1"
    finally:
        del os.environ["HYDRA_FULL_ERROR"]
        if before is not None:
            os.environ["HYDRA_FULL_ERROR"] = before


def _message(error: Exception) -> str | None:
    """One line for an error of the user's input; None for any other."""
    if isinstance(error, L2OError):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and str(error.name).split(".")[0] in EXTRA:
        return f"{error.name} is not installed; the commands need: {INSTALL}"
    if "hydra" not in sys.modules:
        return None
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError  # type: ignore[import-untyped]

    if isinstance(error, HydraException):
        return _composition_message(error)
    if isinstance(error, YAMLError):
        return f"a configuration is no YAML: {one_line(error)}; mend the file there"
    return one_line(error) if isinstance(error, OmegaConfBaseException) else None


def _composition_message(error: HydraException) -> str:
    from hydra.errors import MissingConfigException, OverrideParseException

    if isinstance(error, OverrideParseException):
        reason = one_line(error).partition(" See https")[0]
        return f"{error.override!r} cannot be read ({reason}); {_quoting(str(error.override))}"
    if not isinstance(error, MissingConfigException) or error.missing_cfg_file is None:
        return _unknown_key(error.__cause__) or " ".join(one_line(e) for e in (error, error.__cause__) if e)
    group, _, name = error.missing_cfg_file.rpartition("/")
    choices = error.options or [path.stem for path in Path(config_path(), group).glob("*.yaml")]
    # What a command has in a folder of its own, the command line calls by the last name alone.
    return unknown((group or "config").rpartition("/")[2], name, choices)


def _quoting(argument: str) -> str:
    """How to write an argument that Hydra cannot read: its values have a grammar, the shell another."""
    key, _, value = argument.partition("=")
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return "expected key=value; what has one of = # , : ( [ { or spaces in it is quoted twice, as in " + (
        shlex.quote(f'{key}="{escaped or "a name"}"')
    )


def _unknown_key(error: BaseException | None) -> str | None:
    """The message for a setting that the configuration does not have; Hydra's own advises to add it."""
    from omegaconf.errors import ConfigAttributeError, ConfigKeyError

    parent = getattr(error, "parent_node", None)
    if not isinstance(error, ConfigAttributeError | ConfigKeyError) or not parent:
        return None
    return unknown("setting", str(error.key), [str(key) for key in parent if key != "hydra"])


def wrapped(text: str, indent: int = 0) -> str:
    """Return the text in lines of 80 columns, all but the first of which are indented; a word that is longer stays
    whole."""
    spaces = " " * indent
    return textwrap.fill(text, 80, subsequent_indent=spaces, break_long_words=False, break_on_hyphens=False)


def one_line(error: BaseException) -> str:
    """Return the text of an error on one line, without Hydra's advice on how to see its trace."""
    text = str(error).replace(", set env var HYDRA_FULL_ERROR=1 to see chained exception", "")
    return " ".join(text.split()).rstrip(".")
