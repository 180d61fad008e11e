"""Questions about pictures: what VQAv2, TextVQA, GQA and ScienceQA have in common.

The official score comes first. What a harness would print of the same answers stands beside it
under the harness's name; harnesses score answers as the model gave them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from goose_mm.eval.tasks.official import Files
from goose_mm.eval.tasks.task import SHORT_ANSWER, Item, Task, TaskOptions, grouped

MAX_NEW_TOKENS = 128


class PictureTask(Task):
    """Greedy answers of a vision model; the picture of a group is read once."""

    kind = "vision"
    takes = ("split", "limit", "prompt", "blind")
    default_prompt = SHORT_ANSWER

    def __init__(self, data: Path, options: TaskOptions, split: str) -> None:
        self.official = Files(data)
        self.options = options
        self.prompt = options.prompt or self.default_prompt
        if "{question}" not in self.prompt:
            raise ValueError(f"--prompt must contain {{question}}, it is {self.prompt!r}")
        self.settings = {
            "split": split,
            "prompt": self.prompt,
            "blind": options.blind,
            "decoding": f"greedy, at most {MAX_NEW_TOKENS} tokens",
        }

    def ready(self, model: Any) -> None:
        files = [file for group in grouped(self.items) if (file := self.source(group))]
        if missing := sorted(str(file) for file in files if not file.is_file()):
            raise FileNotFoundError(
                f"{len(missing)} of {len(files)} pictures are missing, such as "
                f"{', '.join(missing[:3])}; unpack them there"
            )

    def source(self, group: Sequence[Item]) -> Path | None:
        file = group[0].group
        return None if self.options.blind or not file else Path(file)

    def decode(self, source: Path | None, model: Any) -> Any:
        from goose_mm.vision.decode import load_image

        return None if source is None else load_image(source)

    def predict(
        self, model: Any, groups: Sequence[Sequence[Item]], media: Sequence[Any]
    ) -> list[list[Any]]:
        return [
            model.ask_many(picture, [item.prompt for item in group], max_new_tokens=MAX_NEW_TOKENS)
            for group, picture in zip(groups, media, strict=True)
        ]

    def ask(self, question: str) -> str:
        return self.prompt.replace("{question}", question)


def plain(text: str) -> str:
    """Lower case without the final stop, as LLaVA converts answers before they are uploaded."""
    return text.strip().rstrip(".").lower()


def percent(scores: Iterable[float]) -> float | None:
    found = list(scores)
    return 100 * sum(found) / len(found) if found else None
