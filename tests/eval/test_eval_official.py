"""Official files as people have them: what is borne, and what is named by file, row and field."""

from __future__ import annotations

import hashlib
import json
from typing import TypedDict

import numpy as np
import pytest
from test_eval_runs import answers, picture, write

from goose_mm.cli import main
from goose_mm.eval.command import open_task
from goose_mm.eval.tasks.official import Files, digest_of
from goose_mm.eval.tasks.task import TaskOptions

OPTIONS = TaskOptions()
TEXTS = ["the goose", "a\u2028line\u0085that\u2029goes on", "swam"]


class Row(TypedDict):
    text: str


def rows_in(folder, data: bytes):
    (folder / "rows").write_bytes(data)
    return [row["text"] for _, row in Files(folder).rows("rows", Row)]


def lines(ascii: bool = False) -> str:
    return "".join(json.dumps({"text": x, "more": 1}, ensure_ascii=ascii) + "\n" for x in TEXTS)


@pytest.mark.parametrize(
    "text",
    [
        lines(),
        lines(ascii=True),
        lines().replace("\n", "\r\n"),
        lines().replace("\n", "\n\n  \n"),
        lines().rstrip("\n"),
        "[\n" + lines().rstrip().replace("}\n", "},\n") + "\n]\n",
        json.dumps([{"text": text} for text in TEXTS], indent=2),
    ],
)
def test_rows_are_read_however_they_are_put_down(text, tmp_path):
    for data in (text.encode(), b"\xef\xbb\xbf" + text.encode(), text.encode("utf-16")):
        assert rows_in(tmp_path, data) == TEXTS


def test_one_row_is_a_row(tmp_path):
    assert rows_in(tmp_path, b'{"text": "a"}') == ["a"]
    assert rows_in(tmp_path, b"[]") == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"text": "a"}\n{"text": 5}', "rows, line 2, text: Expected `str`, got `int`"),
        ('{"text": "a"}\n\n{"text": null}', "rows, line 3, text: Expected `str`, got `null`"),
        ('[{"text": "a"},\n{"sentence": "a"}]', "rows, row 2: Object missing .* `text`"),
        ('{"text": "a"}\n{"te', "rows, line 2 cannot be read as JSON: .*begins with '{\"te'"),
        ('[{"text": "a"},', "rows cannot be read as JSON"),
        ('{"text": "a", "text": "b"}', "one object has 'text' twice"),
        ("<html>\n", "cannot be read as JSON.*it begins with '<html>"),
        ("", "it is empty"),
        ("[" * 100_000, "cannot be read as JSON"),
    ],
)
def test_what_is_wrong_with_a_row_is_named(text, said, tmp_path):
    with pytest.raises(ValueError, match=said) as caught:
        rows_in(tmp_path, text.encode())
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_other_encodings_are_named_with_their_line(tmp_path):
    with pytest.raises(ValueError, match="rows, line 2: this is not UTF-8 text"):
        rows_in(tmp_path, '{"text": "a"}\n{"text": "\xe4"}'.encode("latin-1"))


def test_a_digest_is_that_of_sha256sum(tmp_path):
    data = bytes(range(256)) * 9000  # more than is held at once
    (tmp_path / "rows").write_bytes(data)
    known = hashlib.sha256(data).hexdigest()[:16]
    assert digest_of(tmp_path / "rows") == digest_of(data) == digest_of(data[:5], data[5:]) == known
    assert digest_of(np.frombuffer(data, np.int16)) == known
    text = Files(tmp_path)
    with pytest.raises(ValueError):
        text.rows("rows", Row)
    assert text.digests == {"rows": known}


# --- tables -------------------------------------------------------------------------------------

CLASSES = 'index,mid,display_name\n0,/m/0,"Dog, bark"\n1,/m/1,Rain\n'
SEGMENTS = '# a, "b\n# c\n-bcdefghijk, 0.000, 10.000, "/m/0,/m/1"\nlmnopqrstuv, 0.0, 9.5, "/m/1"\n'


def spoilt(text: str) -> dict[str, str]:
    """A table of commas as spreadsheets and editors leave it."""
    rows = [row.replace('"', "").split(",", 2) for row in text.split("\n")]
    return {
        "as it is": text,
        "byte order mark": f"\ufeff{text}",
        "CRLF and blank lines": text.replace("\n", "\r\n") + "\r\n \r\n",
        "trailing blanks": text.replace("\n", "  \n"),
        "blank cells": text.replace("\n", ",,\n") + ",,,,\n",
        "semicolons": "\n".join(";".join(row) for row in rows),
        "tabs": "\n".join("\t".join(row) for row in rows),
    }


def audioset(folder, classes=CLASSES, segments=SEGMENTS):
    (folder / "eval").mkdir(parents=True)
    for name in ("-bcdefghijk", "lmnopqrstuv"):
        (folder / "eval" / f"Y{name}.wav").touch()
    (folder / "class_labels_indices.csv").write_text(classes, newline="")
    (folder / "eval_segments.csv").write_text(segments, newline="")
    return open_task("audioset", folder, OPTIONS)


@pytest.mark.parametrize("how", spoilt(CLASSES))
def test_classes_are_read_from_any_spreadsheet(how, tmp_path):
    assert audioset(tmp_path, classes=spoilt(CLASSES)[how]).labels == ("Dog, bark", "Rain")


@pytest.mark.parametrize(
    "segments",
    [
        *(SEGMENTS.replace(", ", mark) for mark in (",", ";", "\t")),
        SEGMENTS.replace(", ", " ; ").replace("0.0", "0,0"),
        SEGMENTS.replace("\n", " \r\n") + "\r\n",
        f"\ufeff{SEGMENTS}",
    ],
)
def test_segments_are_read_from_any_spreadsheet(segments, tmp_path):
    task = audioset(tmp_path, segments=segments)
    assert task.known == {"-bcdefghijk": [0, 1], "lmnopqrstuv": [1]}


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"classes": "index,name\n0,a\n"}, r"indices.csv lacks the columns display_name, mid"),
        ({"classes": CLASSES + "2,/m/2\n"}, r"indices.csv, line 4: .*`display_name`"),
        ({"classes": CLASSES + "2,,Cat\n"}, r"indices.csv, line 4, mid: Expected `str` of length"),
        ({"classes": CLASSES + "x,/m/2,Cat\n"}, r"indices.csv, line 4, index: Expected `int`"),
        ({"classes": CLASSES + "7,/m/2,Cat\n"}, r"indices.csv, line 4, index: 7 instead of 2"),
        ({"classes": CLASSES + "2,/m/1,Cat\n"}, r"indices.csv, line 4: '/m/1' stands in a row"),
        ({"segments": SEGMENTS + "a, 0.0\n"}, r"segments.csv, line 5: expected 4 fields.*'0.0'"),
        ({"segments": SEGMENTS + 'a, 0, 1, ""\n'}, r"segments.csv, line 5: expected 4 fields"),
        ({"segments": SEGMENTS + 'a, 0, 1, "/m/1\n'}, r"segments.csv, line 5: a quote"),
        ({"segments": SEGMENTS + "-bcdefghijk, 0, 1, /m/1\n"}, r"segments.csv, line 5: '-bcde"),
        ({"segments": SEGMENTS + "a" * 200_000}, r"segments.csv, line 5: field larger"),
    ],
)
def test_what_is_wrong_with_a_table_is_named(files, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        audioset(tmp_path, **files)


QUESTION = '"Is 1, or 2? ",x, None,"y, z",w,B\n'


@pytest.mark.parametrize(
    "text",
    [
        QUESTION,
        f"\ufeff{QUESTION}\r\n\r\n",
        QUESTION.replace("B\n", "B \n"),
        QUESTION.replace("B\n", "B,,\n"),
        "Is 1, or 2? ;x; None;y, z;w;B\n",
        "Is 1, or 2? \tx\t None\ty, z\tw\tB\n",
    ],
)
def test_words_of_a_table_are_left_as_they_are(text, tmp_path):
    write(tmp_path / "test" / "law_test.csv", text)
    write(tmp_path / "dev" / "law_dev.csv", "Q,a,b,c,d,A\n" * 5)
    task = open_task("mmlu", tmp_path, OPTIONS)
    asked = "Is 1, or 2? \nA. x\nB.  None\nC. y, z\nD. w\nAnswer:"
    assert [item.prompt for item in task.items] == [asked] and [*task.answers.values()] == ["B"]


# --- every task, before a model is loaded -------------------------------------------------------


def vqav2(folder):
    row = {"question_id": 1, "image_id": 7}
    known = {
        **row, "question_type": "is", "answer_type": "yes/no", "multiple_choice_answer": "yes",
        "answers": answers("yes", "10"),
    }  # fmt: skip
    picture(folder / "val2014" / f"COCO_val2014_{7:012d}.jpg")
    return {
        "v2_OpenEnded_mscoco_val2014_questions.json": {"questions": [row | {"question": "?"}]},
        "v2_mscoco_val2014_annotations.json": {"annotations": [known]},
    }


def textvqa(folder):
    row = {"question_id": 1, "image_id": "a", "question": "?", "answers": ["5"] * 10}
    picture(folder / "train_images" / "a.jpg")
    tokens = {"image_id": "a", "ocr_tokens": ["5"]}
    return {
        "TextVQA_0.5.1_val.json": {"data": [row]},
        "TextVQA_Rosetta_OCR_v0.2_val.json": {"data": [tokens]},
    }


def gqa(folder):
    row = {
        "question": "?", "answer": "yes", "imageId": "3", "isBalanced": True, "entailed": [],
        "types": {"structural": "query", "semantic": "obj", "detailed": "x"},
        "groups": {"global": None}, "semantic": [{"operation": "select", "argument": "dog"}],
    }  # fmt: skip
    picture(folder / "images" / "3.jpg")
    return {
        "testdev_balanced_questions.json": {"q": row},
        "testdev_choices.json": {"q": {"valid": ["yes"], "plausible": ["yes"]}},
    }


def scienceqa(folder):
    row = {
        "question": "?", "choices": ["a", "b"], "answer": 1, "hint": "", "image": "image.png",
        "subject": "natural science", "grade": "grade2",
    }  # fmt: skip
    picture(folder / "test" / "q" / "image.png")
    return {"problems.json": {"q": row}, "pid_splits.json": {"test": ["q"]}}


MAKERS = {f.__name__: f for f in (vqav2, textvqa, gqa, scienceqa)}


def places(value, path=()):
    """Paths of all that stands in a JSON value."""
    if path:
        yield path
    if isinstance(value, dict | list):
        for step, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, (*path, step))


def changed(value, path, how):
    """A copy in which what stands at a path is gone, null, a number, or has something beside it."""
    copy = json.loads(json.dumps(value))
    inner = copy
    for step in path[:-1]:
        inner = inner[step]
    if how == "gone":
        del inner[path[-1]]
    elif how == "extra" and isinstance(inner, dict):
        inner["another"] = [None]
    elif how != "extra":
        inner[path[-1]] = {"null": None, "number": 7, "text": "7"}[how]
    return copy


@pytest.mark.parametrize("name", MAKERS)
def test_any_change_of_any_field_is_read_or_named(name, tmp_path):
    """Missing, null, numeric and extra fields, each at every place of every official file."""
    files = MAKERS[name](tmp_path)
    options = TaskOptions(ocr=name == "textvqa")
    refused = 0
    for file, value in files.items():
        for other, right in files.items():
            write(tmp_path / other, right)
        for path in places(value):
            for how in ("gone", "null", "number", "text", "extra"):
                write(tmp_path / file, changed(value, path, how))
                try:
                    task = open_task(name, tmp_path, options)
                except ValueError as error:
                    said = str(error)
                    assert "\n" not in said and len(said) < 400
                    assert any(str(tmp_path / one) in said for one in files) or "no items" in said
                    refused += 1
                else:  # what was read can be scored
                    task.score({item.id: "7" for item in task.items})
                    task.baselines()
    assert refused > 20


@pytest.mark.parametrize(
    ("name", "file", "path", "how", "said"),
    [
        ("vqav2", 0, ("questions", 0, "image_id"), "gone", "questions[0]: Object missing"),
        ("vqav2", 0, ("questions", 0, "question"), "null", "questions[0], question: Expected"),
        ("vqav2", 1, ("annotations", 0, "answers", 3, "answer"), "number", "answers[3].answer"),
        ("vqav2", 1, ("annotations", 0), "gone", "lacks '1'"),
        ("textvqa", 0, ("data", 0, "answers", 0), "gone", "data[0], answers: Expected `array`"),
        ("gqa", 0, ("q", "types", "semantic"), "null", "q, types.semantic: Expected `str`"),
        ("scienceqa", 0, ("q", "answer"), "number", "q, answer: 7 is none of 2 choices"),
        ("scienceqa", 1, ("test", 0), "text", "lacks '7'; it has ['q']"),
    ],
)
def test_the_command_names_file_row_and_field(name, file, path, how, said, tmp_path, capsys):
    data, out = tmp_path / "data", tmp_path / "out"
    files = MAKERS[name](data)
    for i, (other, value) in enumerate(files.items()):
        write(data / other, changed(value, path, how) if i == file else value)
    assert main(["eval", name, "--data", str(data), "--out", str(out)]) == 2
    complaint = capsys.readouterr().err
    assert said in complaint and complaint.count("\n") == 1 and not out.exists()


def test_nothing_stands_twice(tmp_path):
    files = vqav2(tmp_path)
    for file, value in files.items():
        write(tmp_path / file, value)
    for file, value in files.items():
        write(tmp_path / file, {key: rows * 2 for key, rows in value.items()})
        with pytest.raises(ValueError, match=r"\[1\]: 1 stands in a row before, too"):
            open_task("vqav2", tmp_path, OPTIONS)
        write(tmp_path / file, value)
    files = scienceqa(tmp_path)
    write(tmp_path / "problems.json", files["problems.json"])
    write(tmp_path / "pid_splits.json", {"test": ["q", "q"]})
    with pytest.raises(ValueError, match=r"test\[1\]: 'q' stands in a row before, too"):
        open_task("scienceqa", tmp_path, OPTIONS)


def test_a_passage_needs_a_last_word(tmp_path):
    for text in ("", "word", "two words ", " word"):
        write(tmp_path / "lambada_test.jsonl", json.dumps({"text": text}) + "\n")
        with pytest.raises(ValueError, match="row 1, text: it must end in a word"):
            open_task("lambada", tmp_path, OPTIONS)


def test_how_many_items_is_a_whole_number(tmp_path, capsys):
    for number in ("-1", "-999", "1.5", "nan", "x"):
        call = ["eval", "vqav2", "--data", str(tmp_path), "--out", str(tmp_path / "out")]
        assert main([*call, "--limit", number]) == 2
        assert "--limit" in capsys.readouterr().err
