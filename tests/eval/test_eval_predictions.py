"""Predictions in files: ours hold any answer, those of others are read as they were put down."""

from __future__ import annotations

import json

import pytest
from test_eval_kept import (
    audioset,
    bits_per_byte,
    esc50,
    lambada,
    mmlu,
    run,
    textvqa,
    vqav2,
)
from test_eval_runs import write

from goose_mm.eval import predictions
from goose_mm.eval.command import open_task
from goose_mm.eval.tasks.task import TaskOptions

SEPARATORS = "a\u2028b\u2029c\x85d\x0b\x0c\x1c\x1d\x1e"


def test_an_answer_may_hold_any_separator(tmp_path):
    textvqa(tmp_path / "data")
    report, _ = run("textvqa", tmp_path / "data", tmp_path / "out", SEPARATORS)
    again = run("textvqa", tmp_path / "data", tmp_path / "out", SEPARATORS)
    assert again == (report, [])
    upload = json.loads((tmp_path / "out" / "upload.json").read_text())
    assert [row["answer"] for row in upload] == [SEPARATORS] * 3


def test_a_line_cut_off_inside_a_character_is_dropped(tmp_path):
    textvqa(tmp_path / "data")
    report, _ = run("textvqa", tmp_path / "data", tmp_path / "out", "鵝")
    lines = tmp_path / "out" / "predictions-0-of-1.jsonl"
    data = lines.read_bytes()
    lines.write_bytes(data[: data.rindex("鵝".encode()) + 1])
    assert run("textvqa", tmp_path / "data", tmp_path / "out", "鵝")[0] == report


def test_a_damaged_line_is_named(tmp_path):
    textvqa(tmp_path / "data")
    run("textvqa", tmp_path / "data", tmp_path / "out")
    lines = tmp_path / "out" / "predictions-0-of-1.jsonl"
    for damage, said in ((b"{}\n", "line 1: Object missing"), (b'{"id\n', "line 1 cannot be read")):
        lines.write_bytes(damage + lines.read_bytes().split(b"\n", 1)[1])
        with pytest.raises(ValueError, match=f"predictions-0-of-1.jsonl, {said}"):
            run("textvqa", tmp_path / "data", tmp_path / "out")


ROWS = [{"question_id": 10 * i + j, "answer": "5"} for i in range(3) for j in range(2)]
JSON_LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(ROWS),
        json.dumps([row | {"answer": 5} for row in ROWS]),
        json.dumps([row | {"answer": 5.0} for row in ROWS]),
        "[\n" + ",\n".join(map(json.dumps, ROWS)) + "\n]\n",
        JSON_LINES + "\n\n",
        JSON_LINES.replace("\n", "\r\n"),
        f"\ufeff{JSON_LINES}",
        f"\ufeff{json.dumps(ROWS)}",
        json.dumps({row["question_id"]: 5 for row in ROWS}, indent=1),
        json.dumps([*ROWS, ROWS[0]]),
        JSON_LINES.replace('"answer"', '"text"').replace("question_id", "questionId"),
        "".join(json.dumps(r | {"answer": "5\u2028"}, ensure_ascii=False) + "\n" for r in ROWS),
    ],
)
def test_predictions_are_read_however_they_are_put_down(text, tmp_path):
    vqav2(tmp_path)
    file = tmp_path / "theirs.json"
    file.write_text(text, newline="")
    found = predictions.read_foreign(file, open_task("vqav2", tmp_path, TaskOptions()))
    assert {key: answer.strip() for key, answer in found.items()} == {
        str(row["question_id"]): "5" for row in ROWS
    }


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"question_id": 0, "answer": None}], "row 1, prediction: Expected `str`, got `null`"),
        ([{"question_id": 0, "answer": True}], "row 1, prediction: Expected `str`, got `bool`"),
        ([{"question_id": 0, "answer": ["5"]}], "row 1, prediction: Expected `str`, got `array`"),
        ([{"question_id": None, "answer": "5"}], "row 1, id: Expected `int | str`, got `null`"),
        ([*ROWS, {"question_id": 0, "answer": "6"}], "row 7: '0' has another prediction"),
        ([*ROWS, {"question_id": 0}], "row 7 has no prediction or answer or text"),
        ([*ROWS, {"answer": "5"}], "row 7 has no id or question_id or questionId"),
        ([*ROWS, [1, "5"]], "row 7: Expected `object`, got `array`"),
        (ROWS[:-1], "lacks 1 of 6 items, as '21'"),
        ([*ROWS, {"question_id": 99, "answer": "5"}], "predicts 1 unknown items, as '99'"),
        ({"0": None}, "theirs.json, 0, prediction: Expected `str`, got `null`"),
        (5, "row 1: Expected `object`, got `int`"),
    ],
)
def test_what_is_wrong_with_predictions_is_named(rows, said, tmp_path):
    vqav2(tmp_path)
    write(tmp_path / "theirs.json", rows)
    with pytest.raises(ValueError) as caught:
        predictions.read_foreign(
            tmp_path / "theirs.json", open_task("vqav2", tmp_path, TaskOptions())
        )
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("make", "answer", "said"),
    [
        (audioset, [1.0], "of length >= 2"),
        (audioset, [1.0, None], "prediction[1]: Expected `float`, got `null`"),
        (esc50, "dog", "Expected `array`, got `str`"),
        (lambada, {"loglikelihood": -1.0}, "missing required field `greedy`"),
        (mmlu, [0.0] * 3, "of length >= 4"),
        (bits_per_byte, {"loglikelihood": -1.0, "tokens": 0}, "tokens: Expected `int` >= 1"),
    ],
)
def test_predictions_have_the_type_of_their_task(make, answer, said, tmp_path):
    make(tmp_path)
    task = open_task(make.__name__, tmp_path, TaskOptions())
    write(tmp_path / "theirs.json", {item.id: answer for item in task.items})
    with pytest.raises(ValueError) as caught:
        predictions.read_foreign(tmp_path / "theirs.json", task)
    assert said in str(caught.value)
