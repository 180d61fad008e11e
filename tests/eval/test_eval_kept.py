"""What a run keeps: predictions of what it read, and none of what has changed since."""

from __future__ import annotations

import io
import json
import os
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from PIL import Image
from test_eval_runs import answers, picture, write

from goose_mm.cli import main
from goose_mm.eval import runner
from goose_mm.eval.command import open_task
from goose_mm.eval.tasks.task import TaskOptions

RATE = 16000
LABELS = ("dog", "rain")
MODEL = SimpleNamespace(
    state_dict=dict, labels=LABELS, config=SimpleNamespace(audio=SimpleNamespace(sample_rate=RATE))
)


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    monkeypatch.setattr("goose_mm.eval.report.draw", lambda *_: None)


def run(name, data, out, answer="yes", shard=(0, 1), skip_bad=False, **options):
    """An evaluation of a model that always says the same; the report, and what it was asked."""
    task, asked = open_task(name, data, TaskOptions(**options)), []

    def says(model, groups, media):
        asked.extend(group[0].group for group in groups)
        return [[answer] * len(group) for group in groups]

    task.predict = says
    if task.kind == "text":
        task.ready = lambda model: None
    report = runner.run(task, MODEL, "one", out, shard, quiet=True, skip_bad=skip_bad)
    return report, asked


def sound(file, seed):
    file.parent.mkdir(parents=True, exist_ok=True)
    noise = 0.1 * np.random.default_rng(seed).standard_normal(4000)
    soundfile.write(file, noise, RATE, format="wav")


def vqav2(data, count=3):
    rows = [{"question_id": 10 * i + j, "image_id": i} for i in range(count) for j in range(2)]
    known = {
        "question_type": "is", "answer_type": "yes/no", "multiple_choice_answer": "yes",
        "answers": answers("yes", "10"),
    }  # fmt: skip
    questions = [row | {"question": f"Is it {row['question_id']}?"} for row in rows]
    write(data / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": questions})
    annotations = [row | known for row in rows]
    write(data / "v2_mscoco_val2014_annotations.json", {"annotations": annotations})
    for i in range(count):
        picture(photo(data, i))


def photo(data, i):
    return data / "val2014" / f"COCO_val2014_{i:012d}.jpg"


def textvqa(data):
    rows = [
        {"question_id": i, "image_id": "a", "question": "?", "answers": ["5"] * 10}
        for i in range(3)
    ]
    write(data / "TextVQA_0.5.1_val.json", {"data": rows})
    tokens = [{"image_id": "a", "ocr_tokens": ["5"]}]
    write(data / "TextVQA_Rosetta_OCR_v0.2_val.json", {"data": tokens})
    picture(data / "train_images" / "a.jpg")


def gqa(data):
    row = {
        "question": "?", "answer": "yes", "imageId": "3", "isBalanced": True, "entailed": [],
        "types": {"structural": "query", "semantic": "obj", "detailed": "x"},
        "groups": {"global": None}, "semantic": [],
    }  # fmt: skip
    write(data / "testdev_balanced_questions.json", {"q": row})
    write(data / "testdev_choices.json", {"q": {"valid": ["yes"], "plausible": ["yes"]}})
    picture(data / "images" / "3.jpg")


def scienceqa(data):
    row = {
        "question": "?", "choices": ["a", "b"], "answer": 1, "hint": "", "image": "image.png",
        "subject": "natural science", "grade": "grade2",
    }  # fmt: skip
    write(data / "problems.json", {"q": row})
    write(data / "pid_splits.json", {"test": ["q"]})
    picture(data / "test" / "q" / "image.png")


def audioset(data):
    rows = [f"{i},/m/{i},{label}" for i, label in enumerate(LABELS)]
    write(data / "class_labels_indices.csv", "\n".join(["index,mid,display_name", *rows]))
    write(data / "eval_segments.csv", 'one, 0, 10, "/m/0"\ntwo, 0, 10, "/m/1"\nsix, 0, 9, "/m/1"\n')
    for i, name in enumerate(("one", "two", "six")):
        sound(data / "eval" / f"{name}.wav", i)


def tarred(data):
    """Labels in the files of the clips."""
    audioset(data)
    (data / "eval_segments.csv").unlink()
    told = {"dog": ["/m/0"], "rain": ["/m/1"]}
    with tarfile.open(data / "eval.tar", "w") as tar:
        for i, (name, labels) in enumerate(told.items()):
            sound(data / "eval" / f"{name}.wav", i)
            for ending, content in (
                ("wav", (data / "eval" / f"{name}.wav").read_bytes()),
                ("json", json.dumps({"labels": labels}).encode()),
            ):
                member = tarfile.TarInfo(f"{name}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    for file in (data / "eval").iterdir():
        file.unlink()


def esc50(data):
    write(data / "meta.csv", "filename,fold,label\na/1.wav,1,dog\nb/1.wav,1,rain\n")
    for i, name in enumerate("ab"):
        sound(data / name / "1.wav", i)


def lambada(data):
    write(data / "lambada_test.jsonl", '{"text": "a goose"}\n{"text": "a swan"}\n')


def mmlu(data):
    write(data / "test" / "law_test.csv", "Q,a,b,c,d,A\n")
    write(data / "dev" / "law_dev.csv", "Q,a,b,c,d,A\n" * 5)


def bits_per_byte(data):
    write(data / "a.txt", "the old house")
    write(data / "b.txt", "the new house")


def other_bytes(file):
    """Change a file so that its size and time tell nothing."""
    data, before = bytearray(file.read_bytes()), file.stat()
    at = data.rindex(b"5") if b'"5"' in data else len(data) - 4
    data[at] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def yes_in(file):
    file.write_bytes(file.read_bytes().replace(b"yes", b"yea"))


def goose_in(file):
    file.write_bytes(file.read_bytes().replace(b"goose", b"moose").replace(b"Q", b"R"))


SCORES = [0.0, 1.0]
NATS = {"loglikelihood": -1.0, "greedy": True, "tokens": 3}


@pytest.mark.parametrize(
    ("make", "answer", "file", "change"),
    [
        (vqav2, "yes", "val2014/COCO_val2014_000000000001.jpg", other_bytes),
        (vqav2, "yes", "v2_mscoco_val2014_annotations.json", yes_in),
        (
            vqav2,
            "yes",
            "v2_OpenEnded_mscoco_val2014_questions.json",
            lambda file: file.write_text(file.read_text().replace("Is it 10", "Was it 10")),
        ),
        (textvqa, "yes", "train_images/a.jpg", other_bytes),
        (textvqa, "yes", "TextVQA_Rosetta_OCR_v0.2_val.json", other_bytes),
        (gqa, "yes", "images/3.jpg", other_bytes),
        (gqa, "yes", "testdev_choices.json", yes_in),
        (scienceqa, "A", "test/q/image.png", lambda file: Image.new("L", (9, 9)).save(file)),
        (scienceqa, "A", "pid_splits.json", lambda file: file.write_text('{"test":["q"]}')),
        (audioset, SCORES, "eval/two.wav", other_bytes),
        (audioset, SCORES, "eval_segments.csv", other_bytes),
        (audioset, SCORES, "class_labels_indices.csv", lambda f: f.write_text(f.read_text() + " ")),
        (esc50, SCORES, "b/1.wav", other_bytes),
        (esc50, SCORES, "meta.csv", lambda f: f.write_text(f.read_text().replace(",1,", ",2,"))),
        (lambada, NATS, "lambada_test.jsonl", goose_in),
        (mmlu, [0.0] * 4, "test/law_test.csv", goose_in),
        (mmlu, [0.0] * 4, "dev/law_dev.csv", goose_in),
        (bits_per_byte, NATS, "b.txt", other_bytes),
    ],
)  # fmt: skip
def test_what_changed_is_refused_by_name(make, answer, file, change, tmp_path):
    data, out, name = tmp_path / "data", tmp_path / "out", make.__name__
    make(data)
    options = {"ocr": True} if make is textvqa else {}
    report, _ = run(name, data, out, answer, **options)
    assert report and run(name, data, out, answer, **options) == (report, [])
    before = {one: one.read_bytes() for one in out.iterdir()}
    original = (data / file).read_bytes()
    change(data / file)
    assert (data / file).read_bytes() != original
    called = file.removesuffix(".wav").removeprefix("eval/") if make is audioset else file
    with pytest.raises(ValueError, match=f"{called}.*changed.*choose a new --out"):
        run(name, data, out, answer, **options)
    assert {one: one.read_bytes() for one in out.iterdir()} == before
    (data / file).write_bytes(original)
    assert run(name, data, out, answer, **options)[0] == report


@pytest.mark.parametrize("make", [vqav2, audioset])
def test_a_killed_run_goes_on_with_what_did_not_change(make, tmp_path):
    data, out, name = tmp_path / "data", tmp_path / "out", make.__name__
    make(data)
    answer = "yes" if make is vqav2 else SCORES
    run(name, data, out, answer)
    lines = out / "predictions-0-of-1.jsonl"
    lines.write_bytes(lines.read_bytes()[:-9])
    done, last = data / "eval" / "one.wav", data / "eval" / "two.wav"
    if make is vqav2:
        lines.write_bytes(b"".join(lines.read_bytes().splitlines(keepends=True)[:4]))
        done, last = photo(data, 1), photo(data, 2)
    original = done.read_bytes()
    other_bytes(done)
    with pytest.raises(ValueError, match=r"1 of 3 .* changed after they were predicted"):
        run(name, data, out, answer)
    done.write_bytes(original)
    other_bytes(last)  # of which no prediction is left
    report, asked = run(name, data, out, answer)
    assert report and asked[-1] in (str(last), "two")


def test_labels_told_by_the_clips_are_a_part_of_the_data(tmp_path):
    tarred(tmp_path / "data")
    run("audioset", tmp_path / "data", tmp_path / "out", SCORES)
    file = tmp_path / "data" / "eval.tar"
    file.write_bytes(file.read_bytes().replace(b'"/m/0"', b'"/m/1"'))
    with pytest.raises(ValueError, match=r"eval \(labels\) has changed"):
        run("audioset", tmp_path / "data", tmp_path / "out", SCORES)


def test_a_copy_of_the_data_is_the_same_data(tmp_path):
    """Contents count; names of folders, times and where a picture lies on the disk do not."""
    for name in ("here", "there"):
        vqav2(tmp_path / name)
    report, _ = run("vqav2", tmp_path / "here", tmp_path / "out")
    assert run("vqav2", tmp_path / "there", tmp_path / "out") == (report, [])


def test_a_blind_run_reads_no_pictures(tmp_path):
    vqav2(tmp_path / "data")
    for i in range(3):
        photo(tmp_path / "data", i).unlink()
    assert run("vqav2", tmp_path / "data", tmp_path / "out", blind=True)[0]["score"] == 100


def test_missing_pictures_are_told_together_before_the_first_prediction(tmp_path):
    vqav2(tmp_path / "data", count=5)
    for i in (1, 3, 4):
        photo(tmp_path / "data", i).unlink()
    with pytest.raises(FileNotFoundError, match=r"3 of 5 pictures are missing.*01.jpg.*03.jpg"):
        run("vqav2", tmp_path / "data", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert run("vqav2", tmp_path / "data", tmp_path / "out", limit=2)[0]["score"] == 100


# --- what cannot be decoded ---------------------------------------------------------------------


@pytest.mark.parametrize("broken", [b"", b"\xff\xd8\xff\xe0 no", b"<html>", b"cut"])
def test_bad_pictures_stop_nothing_and_are_told_together(broken, tmp_path):
    data, out = tmp_path / "data", tmp_path / "out"
    vqav2(data, count=5)
    for i in (1, 3):
        good = photo(data, i).read_bytes()
        photo(data, i).write_bytes(good[:200] if broken == b"cut" else broken)
    said = (
        r"2 of 5 pictures \(val2014/.*01.jpg, val2014/.*03.jpg\) could not be decoded.*--skip-bad"
    )
    with pytest.raises(ValueError, match=said):
        run("vqav2", data, out)
    assert not (out / "report.json").exists()
    report, asked = run("vqav2", data, out, skip_bad=True)
    assert (
        not asked
        and report["score"] == 100
        and report["types"]["answer_type"] == {"yes/no": (100.0, 6)}
    )
    assert report["settings"]["left out"].startswith("4 items: 2 of 5 pictures (val2014/")
    assert "| left out | `4 items: 2 of 5 pictures" in (out / "report.md").read_text()
    with pytest.raises(ValueError, match=said):
        run("vqav2", data, out)
    picture(photo(data, 1))
    report, asked = run("vqav2", data, out, skip_bad=True)
    assert asked == [str(photo(data, 1))] and "2 items: 1 of 5" in report["settings"]["left out"]
    picture(photo(data, 3))
    report, asked = run("vqav2", data, out)
    assert asked == [str(photo(data, 3))] and "left out" not in report["settings"]


@pytest.mark.parametrize(
    ("make", "bad"), [(audioset, "eval/two.wav"), (esc50, "b/1.wav"), (tarred, None)]
)
def test_bad_clips_are_left_out_when_asked(make, bad, tmp_path):
    name = "audioset" if make is tarred else make.__name__
    data, out = tmp_path / "data", tmp_path / "out"
    make(data)
    if bad:
        (data / bad).write_bytes(b"no sound")
    else:
        file = data / "eval.tar"
        at = file.read_bytes().index(b"RIFF", 2000)
        file.write_bytes(file.read_bytes()[:at] + b"gone" + file.read_bytes()[at + 4 :])
    with pytest.raises(ValueError, match=r"1 of . clips \(.*\) could not be decoded"):
        run(name, data, out, SCORES)
    report, asked = run(name, data, out, SCORES, skip_bad=True)
    assert not asked and report["settings"]["left out"].startswith("1 items: 1 of")
    shared = tmp_path / "shared"
    for shard in ((0, 2), (1, 2)):
        last, _ = run(name, data, shared, SCORES, shard=shard, skip_bad=True)
    assert last == report


def test_nothing_left_is_no_score(tmp_path):
    esc50(tmp_path)
    for name in "ab":
        (tmp_path / name / "1.wav").write_bytes(b"no sound")
    with pytest.raises(ValueError, match=r"2 of 2 clips \(a/1.wav, b/1.wav\) could not be decoded"):
        run("esc50", tmp_path, tmp_path / "out", SCORES, skip_bad=True)


def test_the_command_leaves_out_what_is_bad(tmp_path, capsys, monkeypatch):
    model = SimpleNamespace(
        state_dict=dict, ask_many=lambda picture, asked, **_: ["yes"] * len(asked)
    )
    monkeypatch.setattr("goose_mm.cli.work.open_model", lambda *_: model)
    data, out = tmp_path / "data", tmp_path / "out"
    vqav2(data)
    photo(data, 2).write_bytes(b"no picture")
    call = ["eval", "vqav2", "--data", str(data), "--out", str(out), "--device", "cpu"]
    assert main(call) == 2
    said = capsys.readouterr().err
    assert "1 of 3 pictures" in said and said.count("\n") == 1
    assert main([*call, "--skip-bad"]) == 0 and "VQA accuracy" in capsys.readouterr().out
    file = out / "predictions-0-of-1.jsonl"
    assert main([*call[:4], "--out", "o", "--predictions", str(file), "--skip-bad"]) == 2
    assert "--predictions needs no model" in capsys.readouterr().err
