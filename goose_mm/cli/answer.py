"""The verbs that answer: ask, tag, chat, demo."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import resources
from json import dumps, loads
from pathlib import Path

from tyro.conf import Positional

from goose_mm.cli.inputs import must_exist, open_model, read_stdin


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
        image: A picture file, a data: address, or - for a picture on stdin.
        question: A question, in quotes.
        more: Further questions about the same picture.
        model: A shipped name, a folder, an official .pth or a hub id.
        device: cpu or cuda; cuda when there is one.
        json: Print one JSON object per question.
    """
    if image != "-" and not image.startswith("data:"):
        must_exist(image)
    from goose_mm.vision.decode import load_image

    picture = load_image(read_stdin() if image == "-" else image)
    questions = [question, *more]
    answers = open_model(model, "vision", device).ask_many(picture, questions)
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
) -> int:
    """Name the sounds in recordings: "score  label" lines, likeliest first.

    A recording that cannot be read is named on stderr, and the others are tagged all the same.

    Args:
        audio: A sound file, or - for one on stdin.
        more: Further sound files.
        model: A shipped name or a folder.
        top_k: How many tags per file.
        device: cpu or cuda; cuda when there is one.
        json: Print one JSON object per file.
    """
    files = [audio, *more]
    if not more and audio != "-":
        must_exist(audio)
    tagger = open_model(model, "audio", device)
    from goose_mm.cli.recordings import complain, remarks, watched

    code = 0
    for file in files:
        try:
            with remarks(), watched(file) as recording:
                tags = tagger.tag(recording, top_k=top_k)
        except (ValueError, OSError) as error:
            code = 2
            complain(str(error))
            if json:
                print(_json({"audio": file, "error": str(error)}), flush=True)
            continue
        if json:
            print(_json({"audio": file, "tags": [t._asdict() for t in tags]}), flush=True)
            continue
        if len(files) > 1:
            print(f"{_plain(file)}:")
        for found in tags:
            print(f"{found.score:.3f}  {found.label}", flush=True)
    return code


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
    talk = Chat(open_model(model, "text", device), sampling, raw or None)
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


def demo() -> None:
    """Ask the shipped models about the shipped picture and sound."""
    folder = Path(str(resources.files("goose_mm") / "pretrained" / "example"))
    example = loads((folder / "example.json").read_text())
    picture, clip = folder / example["picture"], folder / example["clip"]
    print(f"{picture.name} (goose-tiny-vision)")
    answers = open_model("goose-tiny-vision", "vision").ask_many(str(picture), example["questions"])
    for question, answer in zip(example["questions"], answers, strict=True):
        print(f"  {question}  {answer}")
    print(f"{clip.name} (goose-tiny-audio)")
    for found in open_model("goose-tiny-audio", "audio").tag(str(clip), top_k=3):
        print(f"  {found.score:.3f}  {found.label}")


def _json(value: object) -> str:
    return _plain(dumps(value, ensure_ascii=False))


def _plain(text: str) -> str:
    """Bytes of a file name that are not UTF-8 come as lone surrogates: escaped, as JSON does."""
    return text.encode(errors="backslashreplace").decode()
