"""The `goose-mm` command. A verb reads its flags, calls one function of the library and prints.

Answers alone go to stdout, progress and complaints to stderr. Exit codes: 0 done, 1 `doctor`
found something broken, 2 bad input (one line says what and how to mend it), 130 Ctrl-C.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib import resources
from json import dumps, loads
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional, arg

from goose_mm import __version__
from goose_mm.config import load_recipe
from goose_mm.cli.flags import Call, read, read_verb


def ask(
    image: Positional[str],
    question: Positional[str],
    more: Positional[tuple[str, ...]] = (),
    *,
    model: str = "goose-tiny-vision",
    device: str = "",
    json: bool = False,
) -> None:
    """Answer questions about a picture, one line each; the picture is read once.

    Args:
        image: A picture file.
        question: A question, in quotes.
        more: Further questions about the same picture.
        model: A shipped name, a folder, an official .pth or a hub id.
        device: cpu or cuda; cuda when there is one.
        json: Print one JSON object per question.
    """
    _must_exist(image)
    questions = [question, *more]
    answers = _load(model, "vision", device).ask_many(image, questions)
    for asked, answer in zip(questions, answers, strict=True):
        found = {"image": image, "question": asked, "answer": answer}
        print(_json(found) if json else " ".join(answer.split()))


def tag(
    audio: Positional[str],
    more: Positional[tuple[str, ...]] = (),
    *,
    model: str = "goose-tiny-audio",
    top_k: int = 5,
    device: str = "",
    json: bool = False,
) -> None:
    """Name the sounds in recordings: "score  label" lines, likeliest first.

    Args:
        audio: A sound file.
        more: Further sound files.
        model: A shipped name or a folder.
        top_k: How many tags per file.
        device: cpu or cuda; cuda when there is one.
        json: Print one JSON object per file.
    """
    files = [audio, *more]
    for file in files:
        _must_exist(file)
    tagger = _load(model, "audio", device)
    for file in files:
        tags = tagger.tag(file, top_k=top_k)
        if json:
            print(_json({"audio": file, "tags": [t._asdict() for t in tags]}), flush=True)
            continue
        if len(files) > 1:
            print(f"{file}:")
        for found in tags:
            print(f"{found.score:.3f}  {found.label}", flush=True)


def chat(
    *,
    model: str = "goose-tiny-text",
    raw: bool = False,
    max_new_tokens: int = 200,
    temperature: float = 1.0,
    top_p: float = 0.7,
    top_k: int = 0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    stop: tuple[str, ...] = (),
    seed: int | None = None,
    device: str = "",
) -> None:
    """Write on from what you type, or talk; every turn remembers the ones before. Ctrl-D ends.

    Args:
        model: A shipped name, a folder, an official .pth or a hub id.
        raw: Write on instead of answering. Models without the World vocabulary always do.
        max_new_tokens: Longest reply, in tokens.
        temperature: 0 always takes the likeliest token.
        top_p: Draw from the likeliest tokens that reach this probability together.
        top_k: Draw from this many tokens; 0 is off.
        presence_penalty: Against tokens already written.
        frequency_penalty: The same, for every time they were written.
        stop: Texts that end a reply.
        seed: For repeatable replies.
        device: cpu or cuda; cuda when there is one.
    """
    from goose_mm.text.chat import Chat
    from goose_mm.text.generate import Sampling

    sampling = Sampling(
        max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k,
        presence_penalty=presence_penalty, frequency_penalty=frequency_penalty,
        stop=stop, seed=seed,
    )  # fmt: skip
    talk = Chat(_load(model, "text", device), sampling, raw or None)
    for text in _turns(whole=talk.raw):
        if text or talk.raw:
            for piece in talk.say(text):
                print(piece, end="", flush=True)
            print(flush=True)


def _turns(whole: bool) -> Iterator[str]:
    """Every line that comes in, after a prompt on stderr if typed; or a pipe as a `whole`."""
    typed = sys.stdin.isatty()
    if whole and not typed:
        if text := sys.stdin.read().rstrip("\n"):
            yield text
        return
    while True:
        if typed:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        yield line.rstrip("\n")


def train(recipe: Positional[str]) -> None:
    """Train a model. Every field of a recipe is a flag: `goose-mm train RECIPE --help`.

    Args:
        recipe: The name of a shipped recipe, or a .toml file.
    """
    raise AssertionError("parsed by _parse_train")


def _parse_train(name: str, flags: Sequence[str]) -> Call:
    """The flags of `train` are the fields of the recipe that is named first."""
    recipe, out = load_recipe(name), Path("runs") / Path(name).stem
    place = Annotated[Path, arg(help="Folder of the run; one that holds a checkpoint is resumed.")]
    device = Annotated[str, arg(help="cpu or cuda; cuda when there is one.")]
    run = dataclasses.make_dataclass(
        "run",
        [
            ("recipe", Annotated[recipe.__class__, arg(name="")], recipe),
            ("out", place, out),
            ("device", device, ""),
        ],
    )
    chosen = read(tyro.cli, run, flags, f"goose-mm train {name}", f"Train the recipe {name}.")
    return functools.partial(_train, chosen.recipe, chosen.out, chosen.device)


def _train(recipe: Any, out: Path, device: str) -> None:
    from goose_mm.hub import usable_device
    from goose_mm.train.loop import train as run

    for name, value in run(recipe, out, device=usable_device(device)).items():
        print(f"{name} {value:.4f}")


def convert(
    src: Positional[str],
    dst: Positional[str],
    *,
    to: Literal["auto", "goose", "rwkv", "fla"] = "auto",
    force: bool = False,
) -> None:
    """Convert a checkpoint between our folders, official .pth files and fla/HF folders.

    Args:
        src: A model folder or a checkpoint file.
        dst: Where to write; the ending .pth means the official format.
        to: The format to write; auto goes by the name of DST.
        force: Replace what is there.
    """
    from goose_mm import checkpoint

    _must_exist(src)
    checkpoint.convert(src, dst, to=None if to == "auto" else to, force=force)
    print(dst)


def evaluate(
    task: Positional[str],
    *,
    data: Path,
    out: Path,
    model: str = "",
    split: str = "",
    prompt: str = "",
    ocr: bool = False,
    blind: bool = False,
    limit: int = 0,
    shard: str = "0/1",
    predictions: Path | None = None,
    device: str = "",
) -> None:
    """Score a model on a benchmark. Killed, it goes on with the same command.

    Args:
        task: vqav2, textvqa, gqa, scienceqa, audioset, esc50, lambada, bits_per_byte, mmlu, or
            lab for experiments: see `goose-mm eval lab --help`.
        data: Folder of the benchmark's official files.
        out: Folder of the run: predictions, report.md, report.json, figure.svg.
        model: A shipped name, a folder, an official .pth or a hub id.
        split: Part of the data, by the official name.
        prompt: What to ask, with {question} in it.
        ocr: Give TextVQA's OCR tokens with the question.
        blind: Answer without the picture.
        limit: Only this many items, the first.
        shard: I/N: this process does part I of N.
        predictions: Score this file instead of running a model.
        device: cpu or cuda; cuda when there is one.
    """
    from goose_mm.eval import command
    from goose_mm.eval.tasks.task import TaskOptions

    def load(kind: str) -> tuple[str, Any]:
        name = model or f"goose-tiny-{kind}"
        return name, _load(name, kind, device)

    options = TaskOptions(split=split, prompt=prompt, ocr=ocr, blind=blind, limit=limit)
    report = command.evaluate(task, data, out, options, load, shard, predictions)
    if report is not None:
        for name, value in report["scores"].items():
            print(f"{name}  {'not measured' if value is None else f'{value:.4g}'}")
        print(out / "report.md", file=sys.stderr)


def doctor() -> int:
    """Check this installation: versions that fit, devices, kernels, models. Exit 1 if broken."""
    from goose_mm.cli.doctor import examine

    findings = examine()
    for finding in findings:
        print(finding)
    return int(any(finding.broken for finding in findings))


def demo() -> None:
    """Ask the shipped models about the shipped picture and sound."""
    folder = Path(str(resources.files("goose_mm") / "pretrained" / "example"))
    example = loads((folder / "example.json").read_text())
    picture, clip = folder / example["picture"], folder / example["clip"]
    print(f"{picture.name} (goose-tiny-vision)")
    answers = _load("goose-tiny-vision", "vision").ask_many(str(picture), example["questions"])
    for question, answer in zip(example["questions"], answers, strict=True):
        print(f"  {question}  {answer}")
    print(f"{clip.name} (goose-tiny-audio)")
    for found in _load("goose-tiny-audio", "audio").tag(str(clip), top_k=3):
        print(f"  {found.score:.3f}  {found.label}")


VERBS: dict[str, Callable[..., int | None]] = {
    **{f.__name__: f for f in (ask, tag, chat, train, convert, doctor, demo)},
    "eval": evaluate,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; `--help` raises SystemExit(0) as usual."""
    try:
        with warnings.catch_warnings():
            # torch says this of a pickle that is then refused, in one line
            warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)
            code = parse(list(sys.argv[1:] if argv is None else argv))() or 0
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `goose-mm ... | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        return _complain(_explain(error))
    except ImportError as error:
        return _complain(f"{error}; `goose-mm doctor` shows what is missing")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        return _complain(f"torch and torchvision do not fit ({error}); see `goose-mm doctor`")


def parse(argv: list[str]) -> Call:
    """The call a command line asks for. ValueError when there is none."""
    match argv:
        case ["--version"]:
            return functools.partial(print, f"goose-mm {__version__}")
        case ["train", name, *flags] if not name.startswith("-"):
            return _parse_train(name, flags)
        case ["eval", "lab", *flags]:
            from goose_mm.lab.command import VERBS as EXPERIMENTS

            return read_verb(
                EXPERIMENTS, flags, "goose-mm eval lab", "Experiments on the backbone."
            )
    return read_verb(VERBS, argv, "goose-mm", "RWKV-7 Goose for text, pictures and sound.")


def _must_exist(path: str) -> None:
    """Fail before anything slow is imported."""
    if not Path(path).exists():
        raise FileNotFoundError(f"{path}: no such file")


def _load(name: str, kind: str, device: str = "") -> Any:
    from goose_mm.hub import open_model

    return open_model(name, kind, device)


def _json(value: object) -> str:
    return dumps(value, ensure_ascii=False)


def _explain(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, UnicodeDecodeError):
        return f"some input is not UTF-8 text: {error}"
    return str(error) or type(error).__name__


def _complain(message: str) -> int:
    print(f"goose-mm: {' '.join(message.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
