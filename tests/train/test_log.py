"""The log of a run keeps its lines, whatever they hold."""

from __future__ import annotations

import json

from goose_mm.train.log import Log


def test_a_resumed_log_drops_later_steps_alone(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": step, "note": f"a\u2028b\u2029c\x85{step}"} for step in range(1, 5)]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    with Log(path, 2, 9, quiet=True) as log:
        log.step(3, {"loss": 1.0})
    kept = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    assert kept == [*rows[:2], {"step": 3, "loss": 1.0}]
