"""The `goose-mm` command: parsing, the verbs that answer, the verbs that work."""

from goose_mm.cli.main import VERBS, main, parse

__all__ = ["VERBS", "main", "parse"]
