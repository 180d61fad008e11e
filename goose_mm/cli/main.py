"""Parses a command line, runs one verb and tells how it ended.

Answers alone go to stdout, progress and complaints to stderr. Exit codes: 0 done, 1 `doctor`
found something broken, 2 bad input (one line says what and how to mend it), 130 Ctrl-C.
"""

from __future__ import annotations

import errno
import functools
import gc
import os
import sys
import warnings
from collections.abc import Callable, Sequence

from goose_mm import __version__
from goose_mm.cli.answer import ask, chat, demo, tag
from goose_mm.cli.flags import Call, read_verb
from goose_mm.cli.work import convert, doctor, evaluate, parse_train, train

VERBS: dict[str, Callable[..., int | None]] = {
    **{f.__name__: f for f in (ask, tag, chat, train, convert, doctor, demo)},
    "eval": evaluate,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; `--help` raises SystemExit(0) as usual."""
    gc.set_threshold(100_000, 20, 20)  # imports make a million objects, and none of them is garbage
    _open_closed_streams()
    if sys.stdout is None:
        return _complain("stdout is closed; send it to a file, or to /dev/null")
    try:
        with warnings.catch_warnings():
            # torch says this of a pickle that is then refused, in one line
            warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)
            try:
                return parse(list(sys.argv[1:] if argv is None else argv))() or 0
            finally:
                _flush_output()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `goose-mm ... | head`: the reader has seen enough
        return 0
    except (ValueError, OSError) as error:
        return _complain(_explain(error))
    except ImportError as error:
        return _complain(f"{error}; `goose-mm doctor` shows what is missing")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        return _complain(f"torch and torchvision do not fit ({error}); see `goose-mm doctor`")


def parse(argv: list[str]) -> Call:
    """The call a command line asks for. ValueError when there is none."""
    match argv:
        case ["--version"]:
            return functools.partial(print, f"goose-mm {__version__}")
        case ["train", name, *flags] if not name.startswith("-"):
            return parse_train(name, flags)
        case ["eval", "lab", *flags]:
            from goose_mm.lab.command import VERBS as EXPERIMENTS

            return read_verb(
                EXPERIMENTS, flags, "goose-mm eval lab", "Experiments on the backbone."
            )
    return read_verb(VERBS, argv, "goose-mm", "RWKV-7 Goose for text, pictures and sound.")


def _explain(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        cure = "; make room and run the same command again" if full else ""
        return f"{where}{error.strerror}{cure}"
    if isinstance(error, UnicodeDecodeError):
        return f"some input is not UTF-8 text: {error}"
    return str(error) or type(error).__name__


def _complain(message: str) -> int:
    print(f"goose-mm: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _open_closed_streams() -> None:
    """A process may start without stdin or stderr: the one has ended, nobody reads the other."""
    for name, mode in (("stdin", "r"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115


def _flush_output() -> None:
    """OSError when what was answered cannot be written; it is not tried again as Python ends."""
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        error.filename = "stdout"
        raise
