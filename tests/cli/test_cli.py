"""The command: quick help, answers alone on stdout, one line and exit code 2 for bad input."""

from __future__ import annotations

import base64
import io
import json
import os
import pickle
import re
import resource
import struct
import subprocess
import sys
import warnings
import wave
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from goose_mm import checkpoint, cli, hub
from goose_mm.audio.model import Tag
from goose_mm.cli import answer, doctor
from goose_mm.config import (
    AudioConfig,
    AudioModel,
    BackboneConfig,
    EncoderSpec,
    TextConfig,
    TextModel,
    VisionConfig,
    VisionModel,
    recipe_names,
)
from goose_mm.kernels import available_kernels
from goose_mm.text.chat import Chat

SMALL = BackboneConfig(dim=32, num_layers=1, head_size=16)
HELP = [[verb, "--help"] for verb in cli.VERBS] + [["train", r, "--help"] for r in recipe_names()]


@pytest.fixture
def complaint(capsys):
    """Run a command that must fail: exit code 2, nothing on stdout, one line on stderr."""

    def run(*argv: object) -> str:
        with warnings.catch_warnings(record=True) as warned:  # they would be lines on stderr
            assert cli.main([*map(str, argv)]) == 2
        assert not warned
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("goose-mm: ") and err.count("\n") == 1, err
        return err

    return run


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """One small model folder of every kind, with random weights."""
    vision = VisionConfig(encoders=(EncoderSpec(source="toy", name="toy", image_size=64),))
    text = TextConfig(tokenizer="world")
    configs = {
        "text": TextModel(backbone=SMALL, text=text),
        "vision": VisionModel(backbone=SMALL, text=text, vision=vision),
        "audio": AudioModel(backbone=SMALL, audio=AudioConfig(labels=("bell", "rain", "wind"))),
    }
    folders = {}
    for kind, config in configs.items():
        folders[kind] = tmp_path_factory.mktemp(kind)
        checkpoint.save_model(folders[kind], config, hub.build_model(config).state_dict())
    return folders


@pytest.fixture
def picture(tmp_path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    path = tmp_path / "picture.png"
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def clip(tmp_path) -> Path:
    return write_wav(tmp_path / "clip.wav", np.random.default_rng(0).normal(0, 3000, 16000))


def write_wav(path: Path, samples: np.ndarray) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(samples.astype("<i2").tobytes())
    return path


# help


@pytest.mark.parametrize("argv", [["--help"], *HELP], ids=" ".join)
def test_help_is_printed_on_stdout(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert not stop.value.code
    out, err = capsys.readouterr()
    assert "usage: goose-mm" in out and err == ""


@pytest.mark.parametrize("argv", [[], ["eval"], ["train", "text_tiny"], ["ask"]], ids=" ".join)
def test_help_imports_no_torch_and_is_quick(argv):
    code = (
        "import sys, goose_mm.cli\n"
        f"try: goose_mm.cli.main({[*argv, '--help']})\n"
        "finally: assert not {'torch', 'numpy', 'PIL'} & set(sys.modules), sorted(sys.modules)"
    )

    def seconds() -> float:  # of work, whatever else the machine does
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    times = []
    for _ in range(3):
        before = seconds()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        times.append(seconds() - before)
        assert done.returncode == 0, done.stderr
        assert " ".join(["usage: goose-mm", *argv]) in done.stdout
    assert min(times) < 1.0


def test_help_lists_every_verb_with_what_it_is_for(capsys):
    for argv in ([], ["-h"], ["--help"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(argv)
        assert stop.value.code == 0
        out, err = capsys.readouterr()
        assert err == "" and all(len(line) <= 100 for line in out.splitlines())
        for verb, function in cli.VERBS.items():
            assert re.search(rf"^  {verb} +{function.__doc__[:20]}", out, re.M)


# wrong command lines


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["asq"], "the verbs are ask, tag"),
        (["--bogus"], "--bogus"),
        (["ask"], "IMAGE"),
        (["ask", "x.png", "What?", "--modl", "y"], "--modl"),
        (["ask", "x.png", "What?"], "x.png: no such file"),
        (["tag", "x.wav"], "x.wav: no such file"),
        (["tag", "x.wav", "--top-k", "many"], "--top-k"),
        (["convert", "x", "y"], "x: no such file"),
        (["convert", "x", "y", "--to", "keras"], "keras"),
        (["chat", "--temperature", "-1"], "temperature must be 0 or more, got -1.0"),
        (["chat", "--model", "goose-huge"], "goose-tiny"),
        (["chat", "--model", "nobody/nothing"], "hub"),
        (["chat", "--device", "tpu"], "--device tpu"),
        (["train", "nope"], "shipped recipes: "),
        (["train", "nope.toml"], "not found: nope.toml"),
        (["train", "text_tiny", "--train.stepz", "3"], "--train.stepz"),
        (["train", "text_tiny", "--train.steps", "x"], "--train.steps"),
        (["train", "text_tiny", "--backbone.dim", "65"], "multiple of head_size=64"),
        (["train", "text_tiny"], "--data.path"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_wrong_command_line(argv, said, complaint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert said in complaint(*argv)


def test_wrong_recipe_key_names_the_known_ones(complaint, tmp_path):
    recipe = tmp_path / "mine.toml"
    recipe.write_text('model = "text"\n[train]\nlearning_rate = 1e-3\n')
    assert "known keys: steps, batch_size" in complaint("train", recipe)
    recipe.write_text("model = text")
    assert "not valid TOML" in complaint("train", recipe)


def test_a_model_of_another_kind_is_refused(complaint, models, picture):
    said = complaint("ask", picture, "What is this?", "--model", models["text"])
    assert "is a model for text" in said and "goose-tiny-vision" in said


# broken input


def truncated_png(path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:2000])


def huge_png(path: Path) -> None:
    """A header that promises 40,000 x 40,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (truncated_png, "damaged"),
        (huge_png, "million pixels"),
        (lambda path: path.write_bytes(b""), "no image"),
        (lambda path: path.write_text("I am a text file."), "no image"),
        (lambda path: path.mkdir(), "folder"),
    ],
    ids=["truncated", "40000x40000", "empty", "text file", "folder"],
)
def test_broken_picture(make, said, complaint, models, tmp_path):
    path = tmp_path / "x.png"
    make(path)
    err = complaint("ask", path, "What is this?", "--model", models["vision"])
    assert said in err and "x.png" in err


def test_a_bad_picture_is_named_before_anything_slow_begins(tmp_path):
    page = tmp_path / "x.png"
    page.write_text("<!DOCTYPE html><html>")
    code = (
        "import sys; from goose_mm import cli\n"
        f"code = cli.main(['ask', {str(page)!r}, 'What?', '--model', 'no such model'])\n"
        "sys.exit(code if 'torch' not in sys.modules else 1)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and "x.png is no image but a web page" in done.stderr


def nan_wav(path: Path) -> None:
    """A float WAV (format 3) with one NaN in it."""
    samples = np.zeros(1600, "<f4")
    samples[7] = np.nan
    form = struct.pack("<HHIIHH", 3, 1, 16000, 64000, 4, 32)
    body = b"WAVEfmt " + struct.pack("<I", len(form)) + form
    body += b"data" + struct.pack("<I", samples.nbytes) + samples.tobytes()
    path.write_bytes(b"RIFF" + struct.pack("<I", len(body)) + body)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: path.write_bytes(b""), "empty"),
        (lambda path: path.write_text("I am a text file."), "x.wav"),
        (nan_wav, "NaN"),
        (lambda path: write_wav(path, np.zeros(0)), "no samples"),
        (lambda path: path.mkdir(), "folder"),
    ],
    ids=["empty", "text file", "NaN", "no samples", "folder"],
)
def test_broken_sound(make, said, complaint, models, tmp_path):
    path = tmp_path / "x.wav"
    make(path)
    err = complaint("tag", path, "--model", models["audio"])
    assert said in err and "x.wav" in err


def test_corrupt_weights(complaint, models, tmp_path, clip):
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((models["audio"] / name).read_bytes())
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for broken in (whole[: len(whole) // 2], whole[:4], b"", b"\xff" * 100):
        weights.write_bytes(broken)
        assert "model.safetensors" in complaint("tag", clip, "--model", folder)
    weights.write_bytes(whole)
    (folder / "config.json").write_text('{"model": "audio", "colour": 1}')
    assert "unknown key 'colour'" in complaint("tag", clip, "--model", folder)


class Evil:
    """Unpickling this would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_a_pickle_is_not_run(complaint, tmp_path):
    path, trace = tmp_path / "model.pth", tmp_path / "trace"
    path.write_bytes(pickle.dumps({"emb.weight": Evil(trace)}))
    assert "model.pth" in complaint("chat", "--model", path)
    assert "model.pth" in complaint("convert", path, tmp_path / "out")
    assert not trace.exists() and not (tmp_path / "out").exists()


def test_convert_does_not_overwrite_unasked(complaint, models, tmp_path, capsys):
    out = tmp_path / "copy.pth"
    assert cli.main(["convert", str(models["text"]), str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    before = out.read_bytes()
    assert "--force" in complaint("convert", models["text"], out)
    assert out.read_bytes() == before


# answers


def test_ask_prints_one_line_per_question(models, picture, capsys):
    questions = ["What is this?", "Is it red?", "How many?"]
    command = ["ask", str(picture), *questions, "--model", str(models["vision"])]
    assert cli.main(command) == 0
    plain, err = capsys.readouterr()
    assert plain.count("\n") == 3 and err == ""
    assert cli.main([*command, "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["question"] for row in rows] == questions
    assert all(row["image"] == str(picture) for row in rows)
    assert [" ".join(row["answer"].split()) for row in rows] == plain.splitlines()


def test_ask_takes_a_picture_from_stdin_or_an_address(
    models, picture, capsys, complaint, monkeypatch
):
    def ask(image: str, stdin: bytes = b"") -> str:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        assert cli.main(["ask", image, "What is this?", "--model", str(models["vision"])]) == 0
        return capsys.readouterr().out

    data = picture.read_bytes()
    address = "data:image/png;base64," + base64.b64encode(data).decode()
    assert ask(str(picture)) == ask("-", data) == ask(address)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert "an empty file" in complaint("ask", "-", "What is this?")
    monkeypatch.setattr(sys, "stdin", None)  # closed: nothing more comes
    assert "an empty file" in complaint("ask", "-", "What is this?")
    for given in (address[:-5], address[22:], "x" * 5000 + ".png"):
        assert len(complaint("ask", given, "What is this?")) < 300


def test_tag_prints_scores_and_labels(models, clip, capsys):
    command = ["tag", str(clip), "--model", str(models["audio"]), "--top-k", "2"]
    assert cli.main(command) == 0
    plain, err = capsys.readouterr()
    lines = plain.splitlines()
    assert len(lines) == 2 and err == ""
    assert cli.main([*command, "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["audio"] == str(clip)
    assert [f"{t['score']:.3f}  {t['label']}" for t in row["tags"]] == lines
    assert cli.main([*command[:2], *command[1:]]) == 0
    assert capsys.readouterr().out.splitlines() == [f"{clip}:", *lines] * 2


def test_train_prints_the_scores(tmp_path, capsys):
    books = tmp_path / "books"
    books.mkdir()
    for name in ("one", "two"):
        (books / f"{name}.txt").write_text(f"Once upon a time there was number {name}. " * 20)
    recipe = tmp_path / "small.toml"
    recipe.write_text(
        'model = "text"\n[backbone]\ndim = 32\nnum_layers = 1\nhead_size = 16\n'
        '[text]\ntokenizer = "bpe"\nvocab_size = 300\n[data]\nlength = 16\nheld_out = ["two"]\n'
        "[train]\nsteps = 4\nbatch_size = 2\n"
    )
    out = tmp_path / "run"
    command = ["train", str(recipe), "--data.path", str(books), "--out", str(out)]
    assert cli.main([*command, "--train.lr", "1e-3"]) == 0
    first, err = capsys.readouterr()
    assert first.startswith("bits_per_byte ") and first.count("\n") == 1
    assert "4/4" in err  # progress
    assert (out / "model.safetensors").exists()
    assert cli.main([*command, "--train.lr", "1e-3"]) == 0  # a finished run is scored again
    assert capsys.readouterr().out == first
    assert cli.main(command) == 2  # another learning rate: another run
    assert "another recipe" in capsys.readouterr().err


def test_demo_shows_names_questions_answers_and_tags(monkeypatch, capsys, tmp_path):
    folder = tmp_path / "pretrained" / "example"
    folder.mkdir(parents=True)
    example = {"picture": "p.png", "questions": ["What is this?"], "clip": "c.wav"}
    (folder / "example.json").write_text(json.dumps(example))

    class Seer:
        def ask_many(self, image, questions):
            assert image == str(folder / "p.png")
            return ["a goose"] * len(questions)

        def tag(self, clip, top_k):
            return [Tag("rain", 0.75)]

    monkeypatch.setattr(hub, "open_model", lambda *_: Seer())
    monkeypatch.setattr(answer.resources, "files", lambda _: tmp_path)
    assert cli.main(["demo"]) == 0
    out = capsys.readouterr().out
    for part in ("p.png", "c.wav", "What is this?", "a goose", "0.750  rain"):
        assert part in out


def test_doctor_reports_every_kernel(capsys):
    code = cli.main(["doctor"])
    out = capsys.readouterr().out
    assert code == int("\nbroken " in out)
    assert "torch 2" in out and "cpu" in out
    assert all(f"kernel {name}" in out for name in available_kernels())


def test_doctor_names_the_cure_of_a_broken_pair(monkeypatch, capsys):
    def broken(name: str) -> None:
        if name == "torchvision":
            raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    assert cli.main(["doctor"]) == 1
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("broken"))
    assert "torchvision::nms" in line and "requirements.lock" in line


def test_chat_reads_a_pipe(models, monkeypatch, capsys):
    command = ["chat", "--model", str(models["text"]), "--max-new-tokens", "3", "--seed", "1"]
    for flags, text, replies in [
        ([], "Hello\n\nWhat now?\n", 2),  # questions line by line
        (["--raw"], "One line\n\nand another\n", 1),  # one text
        ([], "", 0),
        (["--raw"], "", 0),
    ]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        monkeypatch.setattr(Chat, "say", lambda self, text: iter(["re", "ply"]))
        assert cli.main([*command, *flags]) == 0
        out, err = capsys.readouterr()
        assert out == "reply\n" * replies and err == ""
