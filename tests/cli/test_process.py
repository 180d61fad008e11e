"""A process among others: streams that are closed, disks that are full, starts that fail."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from goose_mm import cli, hub
from goose_mm.cli import answer

RECIPE = """
model = "text"
[backbone]
dim = 64
num_layers = 1
[text]
tokenizer = "bpe"
vocab_size = 300
[data]
length = 16
[train]
batch_size = 1
save_every = 2
"""


def goose(*argv: object, shell: str = "{}", **options: object) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, inside a line of shell."""
    command = f'"{sys.executable}" -m goose_mm ' + " ".join(f"'{word}'" for word in argv)
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", shell.format(command)],
        capture_output=True, text=True, timeout=120, **options,
    )  # fmt: skip


@contextmanager
def room(size: int) -> Iterator[None]:
    """No file of this process may grow beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def books(tmp_path) -> Path:
    folder = tmp_path / "books"
    folder.mkdir()
    (folder / "one.txt").write_text("Once upon a time there was a goose. " * 40)
    return folder


@pytest.fixture
def recipe(tmp_path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(RECIPE)
    return path


def test_interrupt_is_quiet(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(hub, "open_model", interrupted)
    assert cli.main(["chat"]) == 130
    assert capsys.readouterr() == ("", "")


def test_the_module_is_the_command():
    for module in ("goose_mm", "goose_mm.cli"):
        command = [sys.executable, "-m", module, "tag", "no such file.wav"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2
        assert (done.stdout, done.stderr) == ("", "goose-mm: no such file.wav: no such file\n")


# streams


def test_a_reader_that_leaves_is_no_error():
    code = (
        "import sys; from goose_mm import cli\n"
        "cli.VERBS['doctor'] = lambda: print('x\\n' * 1_000_000)\n"
        "sys.exit(cli.main(['doctor']))"
    )
    command = f'"{sys.executable}" -c "$CODE" | head -1'
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        env={**os.environ, "CODE": code}, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "x\n", "")


@pytest.mark.parametrize("argv", [("--version",), ("--help",), ("tag", "--help"), ("doctor",)])
def test_a_closed_stdout_is_said_at_once(argv):
    done = goose(*argv, shell="{} >&-")
    assert done.returncode == 2
    assert done.stderr == "goose-mm: stdout is closed; send it to a file, or to /dev/null\n"


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("argv", ["--version", "--help"])
def test_answers_that_cannot_be_written_are_no_success(argv, unbuffered):
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    done = goose(argv, shell="{} >/dev/full", env=environment)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "No space left on device" in done.stderr


def test_closed_stdin_and_stderr_are_empty(monkeypatch):
    done = goose("ask", "no such file.png", "What?", shell="{} 2>&-")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")
    monkeypatch.setattr(sys, "stdin", None)
    assert cli.main(["--version"]) == 0
    assert list(answer._turns(whole=False)) == list(answer._turns(whole=True)) == []


# folders of runs


def test_a_failed_start_leaves_no_folder(books, recipe, tmp_path, capsys):
    model = tmp_path / "model.pth"
    model.write_text("Entry not found")
    for flags in (
        ["--data.path", tmp_path / "nowhere"],
        ["--data.path", recipe],
        ["--data.path", books, "--init", model],
        ["--data.path", books, "--init", "goose-tiny-audio"],
        ["--data.path", books, "--train.trainable", "nose"],
        ["--data.path", books, "--data.length", "100000"],
    ):
        for out in (tmp_path / "runs" / "deep" / "er", tmp_path / "mine"):
            (tmp_path / "mine").mkdir(exist_ok=True)  # made by hand, so it stays
            assert cli.main([*map(str, ["train", recipe, "--out", out, *flags])]) == 2, flags
            assert not list((tmp_path / "mine").iterdir())
            assert not (tmp_path / "runs").exists()
    for flags in (
        ["--data", tmp_path / "nowhere"],
        ["--data", books, "--model", model],
        ["--data", books, "--shard", "2/2"],
    ):
        command = ["eval", "bits_per_byte", "--out", tmp_path / "runs" / "e", *flags]
        assert cli.main([*map(str, command)]) == 2, flags
        assert not (tmp_path / "runs").exists()
    assert "Traceback" not in capsys.readouterr().err


def test_a_full_disk_is_one_line(books, recipe, tmp_path, capsys):
    out = tmp_path / "run"
    command = [*map(str, ["train", recipe, "--data.path", books, "--out", out])]
    with room(100_000):
        assert cli.main([*command, "--train.steps", "2"]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("goose-mm")]
    assert len(said) == 1 and "run/resume.pt: File too large; make room and run" in said[0]
    assert [path.name for path in out.iterdir()] == ["metrics.jsonl"]
    with room(100_000):
        assert cli.main(["convert", "goose-tiny-text", str(tmp_path / "x" / "text.pth")]) == 2
    assert "text.pth: File too large" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
