"""What the README shows is run, and what it names is there."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from goose_mm import cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


class Block(NamedTuple):
    """A fenced block; `reason` says why it is not run, "" if it is."""

    reason: str
    language: str
    text: str


FENCED = re.compile(
    r"(?:<!-- not run here: ([^\n]+) -->\n)?^```(bash|python)\n(.*?)^```", re.S | re.M
)
BLOCKS = [Block(*found) for found in FENCED.findall(README)]
RUN = [block for block in BLOCKS if not block.reason]
COMMANDS = [
    line
    for block in BLOCKS
    if block.language == "bash"
    for line in block.text.splitlines()
    if line.startswith("goose-mm ")
]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An empty folder that looks like a checkout to the commands of the README."""
    (tmp_path / "goose_mm").symlink_to(ROOT / "goose_mm")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


@pytest.mark.parametrize("block", RUN, ids=[f"{b.language}{i}" for i, b in enumerate(RUN)])
def test_block_runs(block, folder, capsys):
    if block.language == "python":
        exec(compile(block.text, "README.md", "exec"), {})
        out, err = capsys.readouterr()
    else:
        command = ["bash", "-euo", "pipefail", "-c", block.text]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        out, err = done.stdout, done.stderr
        assert done.returncode == 0, err
    assert out.strip(), "nothing was answered"
    assert err == ""


def test_every_modality_is_shown_in_four_lines():
    shown = [block for block in RUN if block.language == "python"]
    assert [re.findall(r"goose-tiny-\w+", block.text) for block in shown] == [
        ["goose-tiny-text"], ["goose-tiny-vision"], ["goose-tiny-audio"],
    ]  # fmt: skip
    assert all(len(block.text.splitlines()) <= 4 for block in shown)


@pytest.mark.parametrize("command", COMMANDS)
def test_command_line_is_understood(command):
    """Also those that are not run: their verbs, recipes and flags exist."""
    words = shlex.split(command.split("<")[0].split("|")[0])
    assert callable(cli.parse(words[1:]))


def test_the_test_section_says_make_test():
    section = README.split("\n## Test\n")[1].split("\n## ")[0]
    assert [text for _, _, text in FENCED.findall(section)] == ["make test\n"]


def test_paths_named_exist():
    documents = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    pattern = r"\b(?:goose_mm|docs|tests|benchmarks)/[\w./-]+\w"
    for document in documents:
        for name in re.findall(pattern, document.read_text()):
            assert (ROOT / name).exists(), f"{document.name} names {name}"


def test_the_tree_lists_the_package():
    """Every file and folder of the package, and every folder of code inside those."""
    package, parent, listed = ROOT / "goose_mm", "", set()
    for line in README.split("\n## Files\n")[1].split("```")[1].splitlines():
        if line.startswith("  "):
            name = line.split()[0].rstrip("/")
            parent = parent if line.startswith("    ") else ""
            listed.add(f"{parent}{name}")
            parent = parent or f"{name}/"
    rooms = {path.parent for path in package.glob("*/*/__init__.py")}
    there = {path.name for path in package.glob("[!_]*")}
    assert listed == there | {str(room.relative_to(package)) for room in rooms}


def test_tables_are_those_of_the_results():
    sys.path.insert(0, str(ROOT))
    try:
        from benchmarks import report
    finally:
        sys.path.pop(0)
    for page, text in report.pages().items():
        assert page.read_text() == text, f"python benchmarks/report.py would change {page.name}"
