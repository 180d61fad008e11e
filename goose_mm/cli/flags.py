"""What tyro makes of a command line, with its complaints in one line."""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any

from tyro.conf import FlagCreatePairsOff, PositionalMetavarFromFieldName
from tyro.extras import subcommand_cli_from_dict

Call = Callable[[], "int | None"]
MARKERS = (FlagCreatePairsOff, PositionalMetavarFromFieldName)


def read_verb(verbs: dict[str, Any], argv: Sequence[str], prog: str, about: str) -> Call:
    if argv and not argv[0].startswith("-") and argv[0] not in verbs:
        raise ValueError(f"there is no verb {argv[0]!r}; the verbs are {', '.join(verbs)}")
    calls = {name: deferred(verb) for name, verb in verbs.items()}
    return read(subcommand_cli_from_dict, calls, argv or ["--help"], prog, about)


def read(parse: Callable[..., Any], what: Any, argv: Sequence[str], prog: str, about: str) -> Any:
    """What tyro makes of the flags; its boxed complaints become a ValueError of one line."""
    boxes = io.StringIO()
    try:
        with contextlib.redirect_stderr(boxes):
            return parse(what, args=argv, prog=prog, description=about, config=MARKERS)
    except SystemExit as stop:
        if not stop.code:
            raise
    text = re.sub(r"\x1b\[[\d;]*m", "", boxes.getvalue())
    rows = [line.strip("│╭╮╰╯─ ") for line in text.splitlines()[1:]]  # the first is a title
    said = " ".join(itertools.takewhile(bool, rows))
    verb = f" {argv[0]}" if argv and not argv[0].startswith("-") else ""
    raise ValueError(f"{said.rstrip('.')}; see `{prog}{verb} --help`")


def deferred(verb: Callable[..., Any]) -> Callable[..., Call]:
    """`verb` with its signature, but its call is handed back instead of made."""

    @functools.wraps(verb)
    def bind(*args: Any, **kwargs: Any) -> Any:
        return functools.partial(verb, *args, **kwargs)

    return bind
