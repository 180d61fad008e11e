"""The official evaluators, and what two harnesses make of the same answers."""
