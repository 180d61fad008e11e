"""Whole evaluations: official layouts, hand-checked scores, kills, shards, wrong input."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

import goose_mm
from goose_mm.cli import main
from goose_mm.eval import runner
from goose_mm.eval.command import open_task, parse_shard
from goose_mm.eval.report import write_report
from goose_mm.eval.tasks.task import TaskOptions

OPTIONS = TaskOptions()


def write(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 24), (200, 60, 40)).save(path)


def answers(*given: str) -> list[dict]:
    rows = [(a, n) for a, n in zip(given[::2], given[1::2], strict=True)]
    texts = [text for text, count in rows for _ in range(int(count))]
    return [{"answer": a, "answer_id": i + 1} for i, a in enumerate(texts)]


@pytest.fixture
def vqav2(tmp_path):
    folder = tmp_path / "vqav2"
    rows = [
        (1, 7, "Is it red?", "is it", "yes/no", answers("yes", "10")),
        (2, 7, "How many?", "how many", "number", answers("2", "2", "3", "8")),
        (3, 9, "What is it?", "what is", "other", answers("a dog", "5", "cat", "5")),
    ]
    questions = [{"question_id": q, "image_id": i, "question": text} for q, i, text, *_ in rows]
    known = [
        {
            "question_id": q, "image_id": i, "question_type": t, "answer_type": kind,
            "answers": a, "multiple_choice_answer": a[-1]["answer"],
        }
        for q, i, _, t, kind, a in rows
    ]  # fmt: skip
    write(folder / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": questions})
    write(folder / "v2_mscoco_val2014_annotations.json", {"annotations": known})
    for i in (7, 9):
        picture(folder / "val2014" / f"COCO_val2014_{i:012d}.jpg")
    return folder


def scored(task, predictions, out):
    settings = {"model": "none", **runner.describe(task)}
    out.mkdir(exist_ok=True)
    return write_report(task, settings, predictions, out)


def test_vqav2_by_hand(vqav2, tmp_path):
    task = open_task("vqav2", vqav2, OPTIONS)
    # unanimous yes: 1; two of ten say 2: 0.6; five of ten say (a) dog: 1
    report = scored(task, {"1": "Yes.", "2": "2", "3": "dog"}, tmp_path / "out")
    assert report["score"] == pytest.approx(86.67)
    assert report["types"]["answer_type"]["number"] == (60.0, 1)
    assert "86.67" in (tmp_path / "out" / "report.md").read_text()
    upload = json.loads((tmp_path / "out" / "upload.json").read_text())
    assert upload[0] == {"question_id": 1, "answer": "yes"}


def test_textvqa_by_hand_with_and_without_ocr_tokens(tmp_path):
    rows = [
        {"question_id": 1, "image_id": "a", "question": "brand?", "answers": ["nokia"] * 10},
        {"question_id": 2, "image_id": "a", "question": "when?", "answers": ["5"] * 3 + ["6"] * 7},
    ]
    write(tmp_path / "TextVQA_0.5.1_val.json", {"data": rows})
    write(
        tmp_path / "TextVQA_Rosetta_OCR_v0.2_val.json",
        {"data": [{"image_id": "a", "ocr_tokens": ["NOKIA", "5"]}]},
    )
    picture(tmp_path / "train_images" / "a.jpg")
    plain = open_task("textvqa", tmp_path, OPTIONS)
    ocr = open_task("textvqa", tmp_path, TaskOptions(ocr=True))
    assert "NOKIA" not in plain.items[0].prompt
    assert "Reference OCR token: NOKIA, 5" in ocr.items[0].prompt
    report = scored(plain, {"1": "Nokia", "2": "5."}, tmp_path / "out")
    assert report["score"] == pytest.approx(95.0)  # 1 and 0.9
    assert "no OCR tokens" in report["measure"]


def test_gqa_by_hand(tmp_path):
    def question(text, answer, structural):
        return {
            "question": text, "answer": answer, "imageId": "3", "isBalanced": True,
            "types": {"structural": structural, "semantic": "obj", "detailed": "x"},
            "groups": {"global": None, "local": None}, "entailed": [], "equivalent": [],
            "semantic": [{"operation": "select", "argument": "dog", "dependencies": []}],
        }  # fmt: skip

    rows = {"1": question("Is it?", "yes", "verify"), "2": question("What?", "dog", "query")}
    write(tmp_path / "testdev_balanced_questions.json", rows)
    picture(tmp_path / "images" / "3.jpg")
    report = scored(
        open_task("gqa", tmp_path, OPTIONS), {"1": "Yes.", "2": "cat"}, tmp_path / "out"
    )
    assert report["score"] == 50 and report["scores"]["open"] == 0
    assert report["scores"]["validity"] is None
    assert "| validity | not measured |" in (tmp_path / "out" / "report.md").read_text()


def test_scienceqa_by_hand(tmp_path):
    common = {"task": "t", "topic": "x", "category": "y", "skill": "z", "lecture": "", "hint": ""}
    problem = {"choices": ["a", "b"], "answer": 1, "image": None, "subject": "natural science"}
    problems = {
        "1": common | problem | {"question": "one?", "grade": "grade2"},
        "2": common | problem | {"question": "two?", "grade": "grade9", "image": "image.png"},
    }
    write(tmp_path / "problems.json", problems)
    write(tmp_path / "pid_splits.json", {"test": ["1", "2"]})
    picture(tmp_path / "test" / "2" / "image.png")
    task = open_task("scienceqa", tmp_path, OPTIONS)
    report = scored(task, {"1": "B", "2": "b"}, tmp_path / "out")
    assert report["scores"]["Avg (llava parser)"] == 50
    assert report["scores"]["Avg (lenient parser)"] == 100
    assert report["baselines"]["a choice at random"] == 50


def test_audioset_by_hand(tmp_path):
    write(
        tmp_path / "class_labels_indices.csv",
        'index,mid,display_name\n0,/m/1,"Dog, bark"\n1,/m/2,Rain\n',
    )
    rows = '# a\n# b\n# c\n-abc, 0.0, 10.0, "/m/1,/m/2"\nxyz, 0.0, 10.0, "/m/2"\n'
    rows += 'gone, 0.0, 10.0, "/m/1"\nlast, 0.0, 10.0, "/m/1"\n'
    write(tmp_path / "eval_segments.csv", rows)
    (tmp_path / "eval").mkdir()
    for name in ("Y-abc", "xyz", "last"):
        soundfile.write(tmp_path / "eval" / f"{name}.wav", np.zeros(800), 16000)
    task = open_task("audioset", tmp_path, OPTIONS)
    assert task.settings["clips listed"] == 4 and task.settings["clips found"] == 3
    # dog: positives rank 1 and 3 of 3: (1 + 2/3) / 2; rain: ranks 1 and 2: 1
    scores = {"-abc": [3, 2], "xyz": [2, 3], "last": [1, 1]}
    report = scored(task, scores, tmp_path / "out")
    assert report["score"] == pytest.approx((5 / 6 + 1) / 2)


@pytest.fixture
def lambada(tmp_path):
    folder = tmp_path / "lambada"
    rows = [
        {"text": f"the goose number {i} swam over the river {'far ' * i}home"} for i in range(60)
    ]
    write(folder / "lambada_test.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return folder


def command(data: Path, out: Path, *more: str) -> list[str]:
    call = ["eval", "lambada", "--data", str(data), "--out", str(out), "--device", "cpu", *more]
    return [sys.executable, "-m", "goose_mm", *call]


def report_of(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in ("report.json", "report.md", "figure.svg")}


def test_killed_or_sharded_a_run_gives_the_same_report(lambada, tmp_path, monkeypatch):
    whole, killed, shared = (tmp_path / name for name in ("whole", "killed", "shared"))
    subprocess.run(command(lambada, whole), check=True, capture_output=True)
    process = subprocess.Popen(
        command(lambada, killed), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    lines = killed / "predictions-0-of-1.jsonl"
    while not (lines.exists() and lines.read_bytes().count(b"\n")) and process.poll() is None:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with lines.open("a") as file:
        file.write('{"id": "half a li')
    before = lines.read_bytes().count(b"\n")
    subprocess.run(command(lambada, killed), check=True, capture_output=True)
    ids = [json.loads(line)["id"] for line in lines.read_text().splitlines()]
    assert before > 0 and len(ids) == len(set(ids)) == 60
    both = [
        subprocess.Popen(command(lambada, shared, "--shard", f"{i}/2"), stderr=subprocess.PIPE)
        for i in range(2)
    ]
    assert [p.wait() for p in both] == [0, 0]
    assert report_of(killed) == report_of(whole) == report_of(shared)


def test_wherever_a_run_was_cut_off_the_report_is_the_same(lambada, tmp_path):
    """Also in the middle of a batch: what is left is predicted in the company it had."""
    task, model = open_task("lambada", lambada, OPTIONS), goose_mm.load("goose-tiny-text")
    runner.run(task, model, "tiny", tmp_path / "whole", quiet=True)
    lines = (tmp_path / "whole" / "predictions-0-of-1.jsonl").read_text().splitlines(keepends=True)
    for kept in (1, 21, 59):
        out = tmp_path / str(kept)
        out.mkdir()
        (out / "predictions-0-of-1.jsonl").write_text("".join(lines[:kept]))
        runner.run(task, model, "tiny", out, quiet=True)
        assert report_of(out) == report_of(tmp_path / "whole")


def test_predictions_from_elsewhere(vqav2, tmp_path, capsys):
    file, out = tmp_path / "theirs.json", tmp_path / "out"
    rows = [{"question_id": i, "answer": a} for i, a in ((1, "yes"), (2, "2"), (3, "dog"))]
    write(file, rows)
    call = ["eval", "vqav2", "--data", str(vqav2), "--out", str(out), "--predictions", str(file)]
    assert main(call) == 0 and "86.67" in capsys.readouterr().out
    write(file, rows[:2])
    assert main([*call[:5], str(tmp_path / "other"), *call[6:]]) == 2
    assert "lacks 1 of 3 items" in capsys.readouterr().err


def test_the_shipped_model_answers_and_a_second_run_does_nothing(vqav2, tmp_path, capsys):
    call = ["eval", "vqav2", "--data", str(vqav2), "--out", str(tmp_path / "out")]
    assert main(call) == 0
    first = report_of(tmp_path / "out")
    assert main(call) == 0 and report_of(tmp_path / "out") == first
    assert main([*call, "--blind"]) == 2
    assert "holds another run" in capsys.readouterr().err


def test_wrong_input_is_one_line(vqav2, tmp_path, capsys):
    base = ["--data", str(vqav2), "--out", str(tmp_path / "out")]
    for call, said in {
        ("eval", "nothing"): "there is no task 'nothing'",
        ("eval", "gqa"): "testdev_balanced_questions.json",
        ("eval", "vqav2", "--shard", "2/2"): "--shard is I/N",
        ("eval", "vqav2", "--prompt", "no place"): "{question}",
        ("eval", "vqav2", "--ocr"): "vqav2 has no use for --ocr; it takes split, limit, prompt",
        ("eval", "lambada", "--blind"): "lambada has no use for --blind",
        ("eval", "esc50"): "has neither meta.csv",
    }.items():
        assert main([*call, *base]) == 2
        complaint = capsys.readouterr().err
        assert said in complaint and complaint.count("\n") == 1


def test_shards():
    assert parse_shard("1/3") == (1, 3)
    for text in ("3/3", "a/b", "1", "-1/2"):
        with pytest.raises(ValueError, match="I/N"):
            parse_shard(text)


def test_esc50_scores_the_fold_that_was_kept_out(tmp_path):
    with (tmp_path / "meta.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["filename", "fold", "label"])
        table.writerows([["a.wav", 1, "rain"], ["b.wav", 1, "dog"], ["c.wav", 2, "dog"]])
    for name in "abc":
        soundfile.write(tmp_path / f"{name}.wav", np.zeros(800), 16000)
    task = open_task("esc50", tmp_path, TaskOptions(split="fold1"))
    report = scored(task, {"a.wav": [0, 1], "b.wav": [0, 1]}, tmp_path / "out")
    assert [item.id for item in task.items] == ["a.wav", "b.wav"]
    assert report["score"] == 0.5 and report["baselines"]["one class always"] == 0.5


def test_esc_10_is_the_mean_of_its_five_folds(tmp_path):
    names = ["rain", "dog_bark", "clock_tick"]
    rights = {1: (1, 1), 2: (0, 1), 3: (1, 2), 4: (3, 4), 5: (0, 2)}  # clips right, clips
    rows, predictions = [], {}
    (tmp_path / "meta.csv").write_text("filename,fold,label\n")
    for fold, (right, count) in rights.items():
        for i in range(count):
            name = f"{fold}-{i}.wav"
            label = names[(fold + i) % 3]
            rows.append(f"{name},{fold},{label}\n")
            soundfile.write(tmp_path / name, np.zeros(800), 16000)
            guess = sorted(names).index(label) + (i >= right)
            predictions[name] = [float(c == guess % 3) for c in range(3)]
    with (tmp_path / "meta.csv").open("a") as file:
        file.writelines(rows)
    report = scored(open_task("esc50", tmp_path, OPTIONS), predictions, tmp_path / "out")
    # folds 1, 0, 1/2, 3/4, 0: their mean .45; squares sum to 1.8125; 5 of 10 clips are right
    assert report["measure"] == "mean_of_folds" and report["score"] == pytest.approx(0.45)
    assert report["scores"]["std_of_folds"] == pytest.approx((1.8125 / 5 - 0.45**2) ** 0.5)
    assert report["scores"]["pooled_accuracy"] == 0.5
    assert report["types"]["fold"]["fold 4"] == (0.75, 4)
    assert "| std_of_folds | 0.4 |" in (tmp_path / "out" / "report.md").read_text()
