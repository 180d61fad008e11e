"""What a command line asks for: tyro reads the flags of one verb, and complains in one line."""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import itertools
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tyro
from tyro.conf import FlagCreatePairsOff, PositionalMetavarFromFieldName

Call = Callable[[], "int | None"]
MARKERS = (FlagCreatePairsOff, PositionalMetavarFromFieldName)


def read_verb(verbs: Mapping[str, Any], argv: Sequence[str], prog: str, about: str) -> Call:
    """The call that a verb and its flags ask for. ValueError when there is none.

    Only that verb's signature is looked at: to look at all of them takes longer than the rest.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(overview(verbs, prog, about))
        raise SystemExit(0)
    verb, *flags = argv
    if verb.startswith("-"):
        raise ValueError(f"{verb} is no option of {prog}, whose verb comes first; see `{prog} -h`")
    if verb not in verbs:
        raise ValueError(f"there is no verb {verb!r}; the verbs are {', '.join(verbs)}")
    return read(deferred(verbs[verb]), flags, f"{prog} {verb}")


def overview(verbs: Mapping[str, Any], prog: str, about: str) -> str:
    """What each verb is for, by the first sentences of its docstring."""
    wide = max(map(len, verbs)) + 4
    rows = [
        textwrap.fill(
            (inspect.getdoc(verb) or "").split("\n\n")[0],
            initial_indent=f"  {name:<{wide - 2}}",
            subsequent_indent=" " * wide,
            width=100,
        )
        for name, verb in verbs.items()
    ]
    ends = [f"`{prog} VERB --help` tells what each takes."]
    return "\n".join([f"usage: {prog} VERB ...\n", f"{about}\n", *rows, "", *ends])


def read(what: Any, argv: Sequence[str], prog: str, about: str | None = None) -> Any:
    """What tyro makes of the flags; its boxed complaints become a ValueError of one line."""
    boxes = io.StringIO()
    try:
        with contextlib.redirect_stderr(boxes):
            return tyro.cli(what, args=argv, prog=prog, description=about, config=MARKERS)
    except SystemExit as stop:
        if not stop.code:
            raise
    text = re.sub(r"\x1b\[[\d;]*m", "", boxes.getvalue())
    rows = [line.strip("│╭╮╰╯─ ") for line in text.splitlines()[1:]]  # the first is a title
    said = " ".join(itertools.takewhile(bool, rows))
    raise ValueError(f"{said.rstrip('.')}; see `{prog} --help`")


def deferred(verb: Callable[..., Any]) -> Callable[..., Call]:
    """`verb` with its signature, but its call is handed back instead of made."""

    @functools.wraps(verb)
    def bind(*args: Any, **kwargs: Any) -> Any:
        return functools.partial(verb, *args, **kwargs)

    return bind
