"""One model learns one task from fresh texts, then meets longer ones than it was trained on.

RWKV-7 "Goose" (arXiv:2503.14456), its experiments on state tracking, associative recall and MAD.
`run` is one experiment, `compare` several of them side by side, `draw` their picture:

    compare({"task": "A5"}, "runs/a5", layers=(1, 2, 3), device="cuda", workers=6)
"""

from __future__ import annotations

import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from goose_mm.config import BackboneConfig, ConfigError, TrainConfig, from_dict
from goose_mm.lab.baselines import Mixer, SequenceModel
from goose_mm.lab.groups import Words, group
from goose_mm.lab.sequence import TASKS, Texts
from goose_mm.train.log import Log
from goose_mm.train.loop import accumulate
from goose_mm.train.optim import build_optimizer, learning_rate, set_learning_rate

# B texts, T tokens

Task = Callable[[int, int, torch.Generator], tuple[Tensor, Tensor]]
CHECK_EVERY = 20  # steps between looks at the accuracy: each look waits for the device
SOLVED = 0.9999  # accuracy at full length from which on the learning rate only has to come down
TEST_BATCH = 64
MIXERS: tuple[tuple[Mixer, float], ...] = (
    ("rwkv7", 2.0), ("rwkv7", 1.0), ("transformer", 1.0), ("diagonal", 1.0),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A task, a model, and how the one learns the other.

    Training starts on texts of `first_length`, which is `length` halved as often as it goes without
    falling below `start_length`, or the next longer ones of which the task has any. It doubles that
    whenever the accuracy reaches `grow_at`; by half of the steps every run has come to `length`. A
    tenth of the steps after it is solved there, training ends.
    """

    task: str = "S5"  # a group (see groups.group) or one of sequence.TASKS
    options: dict = field(default_factory=dict)  # of groups.Words or of the function in TASKS
    mixer: Mixer = "rwkv7"
    a_max: float = 2.0  # eigenvalues of the recurrence lie in (1 - a_max, 1)
    layers: int = 2
    dim: int = 128
    head_size: int = 64
    length: int = 64
    start_length: int = 8
    grow_at: float = 0.99
    tested: tuple[int, ...] = (1, 2, 4)  # times `length`
    test_texts: int = 1024
    steps: int = 10_000
    batch_size: int = 512
    lr: float = 2e-3
    weight_decay: float = 0.01
    precision: Literal["fp32", "bf16"] = "fp32"

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ConfigError(f"length={self.length} tokens; give 1 or more")

    @property
    def first_length(self) -> int:
        length = self.length
        while length % 2 == 0 and length // 2 >= self.start_length:
            length //= 2
        return length

    @property
    def name(self) -> str:
        """What tells it from others of its task."""
        return self.mixer if self.mixer == "transformer" else f"{self.mixer}, a_max {self.a_max:g}"

    def build(self, device: torch.device) -> tuple[SequenceModel, Task]:
        if self.task in TASKS:
            task = Texts(self.task, **self.options)
        else:
            try:
                group(self.task)
            except ValueError as error:
                raise ConfigError(f"{error}; or a task: {', '.join(TASKS)}") from None
            task = Words(self.task, device, **self.options)
        backbone = BackboneConfig(
            dim=self.dim, num_layers=self.layers, head_size=self.head_size, a_max=self.a_max
        )
        return SequenceModel(self.mixer, backbone, task.vocab_size).to(device), task

    def training(self) -> TrainConfig:
        return TrainConfig(
            steps=self.steps, lr=self.lr, lr_final=self.lr / 100, warmup=min(100, self.steps // 10),
            weight_decay=self.weight_decay, precision=self.precision,
        )  # fmt: skip

    def shortest(self, progress: float) -> int:
        """The length that a run must have reached after this share of its steps."""
        doublings = round(math.log2(self.length / self.first_length))
        return self.first_length * 2 ** min(doublings, int(2 * progress * doublings))


def run(
    experiment: Experiment | dict[str, Any],
    out: str | Path,
    device: str = "cpu",
    seed: int = 0,
    max_minutes: float = 0.0,
    quiet: bool = False,
) -> dict[str, Any]:
    """Train, test, and write result.json and metrics.jsonl into the folder `out`.

    `max_minutes` ends the training early, its learning rate brought down in time; 0: no limit.
    """
    e = from_dict(Experiment, experiment) if isinstance(experiment, dict) else experiment
    out, place = Path(out), torch.device(device)
    torch.manual_seed(seed)
    model, task = e.build(place)
    for times in e.tested:  # a task that cannot be so long says so before the training
        task(1, times * e.length, torch.Generator(place))
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with Log(out / "metrics.jsonl", 0, e.steps, quiet) as log:
        steps = fit(model, task, e, seed, 60 * max_minutes or math.inf, log)
    seconds = time.monotonic() - began
    unseen = torch.Generator(place).manual_seed(seed + 1_000_003)
    result = {
        "experiment": asdict(e),
        "name": e.name,
        "seed": seed,
        "device": torch.cuda.get_device_name(place) if place.type == "cuda" else place.type,
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": steps,
        "seconds": round(seconds, 1),
        "tests": [evaluate(model, task, times * e.length, e, unseen) for times in e.tested],
    }
    part = out / "result.json.part"
    part.write_text(json.dumps(result))
    os.replace(part, out / "result.json")
    return json.loads(json.dumps(result))  # lists for tuples, as whoever reads the file sees it


def fit(
    model: SequenceModel, task: Task, e: Experiment, seed: int, seconds: float, log: Log
) -> int:
    """Train on texts drawn afresh for each step; returns the number of steps."""
    config, place = e.training(), model.emb.weight.device
    parameters = dict(model.named_parameters())
    optimizer = build_optimizer(parameters, config)
    generator = torch.Generator(place).manual_seed(seed)
    began, last, step, progress = time.monotonic(), e.steps, 0, 0.0
    length = shortest_texts(task, e, generator)
    seen: list[dict[str, Tensor]] = []

    def batches() -> Iterator[dict[str, Tensor]]:
        while True:
            ids, targets = task(e.batch_size, length, generator)
            yield {"ids": ids, "targets": targets}

    stream = batches()
    while progress < 1:
        set_learning_rate(optimizer, learning_rate(round(progress * e.steps), config))
        seen.append(accumulate(model, stream, config, place))
        clip_grad_norm_(parameters.values(), config.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        progress = max(step / last, (time.monotonic() - began) / seconds)
        if len(seen) == CHECK_EVERY:
            mean = {k: torch.stack([m[k] for m in seen]).mean().item() for k in seen[0]}
            log.step(step, {**mean, "length": length})
            seen.clear()
            if length == e.length and mean["accuracy"] >= SOLVED:
                last = min(last, step + e.steps // 10)
            grown = 2 * length if mean["accuracy"] >= e.grow_at else length
            length = min(e.length, max(grown, e.shortest(progress)))
    return step


def shortest_texts(task: Task, e: Experiment, generator: torch.Generator) -> int:
    """The first length for which the task has texts."""
    length = e.first_length
    while length < e.length:
        try:
            task(1, length, generator.clone_state())
        except ValueError:  # too short for it, or not whole elements
            length *= 2
        else:
            break
    return length


@torch.no_grad()
def evaluate(
    model: SequenceModel, task: Task, length: int, e: Experiment, generator: torch.Generator
) -> dict[str, Any]:
    """Scores on `test_texts` texts of this length, in full precision."""
    model.eval()
    right, due = [], []
    for start in range(0, e.test_texts, TEST_BATCH):
        ids, targets = task(min(TEST_BATCH, e.test_texts - start), length, generator)
        right.append(model(ids).argmax(-1) == targets)
        due.append(targets >= 0)
    return {"length": length, **scores(torch.cat(right), torch.cat(due))}


def scores(right: Bool[Tensor, "B T"], due: Bool[Tensor, "B T"]) -> dict[str, Any]:
    """`token`: the share of right answers; `text`: of texts without a wrong one.

    `at` has the first for each position (None where nothing is due), `up_to` the second for the
    texts cut off after each position.
    """
    at = right.sum(0) / due.sum(0)
    up_to = (right | ~due).int().cumprod(1).double().mean(0)
    return {
        "token": (right.sum() / due.sum()).item(),
        "text": up_to[-1].item(),
        "at": [None if math.isnan(share) else round(share, 5) for share in at.tolist()],
        "up_to": [round(share, 5) for share in up_to.tolist()],
    }


def compare(
    experiment: dict[str, Any],
    out: str | Path,
    *,
    mixers: Sequence[tuple[Mixer, float]] = MIXERS,
    layers: Sequence[int] = (1, 2),
    seeds: Sequence[int] = (0,),
    device: str = "cpu",
    max_minutes: float = 0.0,
    workers: int = 1,
) -> list[dict[str, Any]]:
    """Run each (mixer, a_max) with each number of layers, `workers` at a time, and draw them."""
    out = Path(out)
    calls = []
    for (mixer, a_max), depth, seed in itertools.product(mixers, layers, seeds):
        e = from_dict(Experiment, {**experiment, "mixer": mixer, "a_max": a_max, "layers": depth})
        folder = out / f"{mixer}-{a_max:g}-L{depth}-{seed}"
        calls.append((e, folder, device, seed, max_minutes, workers > 1))
    if workers == 1:
        results = [run(*call) for call in calls]
    else:
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:  # CUDA cannot be forked
            results = list(pool.map(run, *zip(*calls, strict=True)))
    draw(results, out / "accuracy.svg")
    return results


def draw(results: Sequence[dict[str, Any]], path: str | Path) -> None:
    """Accuracy at each position of the longest test: a panel per depth, a line per run."""
    from matplotlib.figure import Figure

    depths = sorted({r["experiment"]["layers"] for r in results})
    names = list(dict.fromkeys(r["name"] for r in results))
    figure = Figure(figsize=(4 * len(depths), 3.2), layout="constrained")
    panels = figure.subplots(1, len(depths), squeeze=False, sharey=True)[0]
    for axes, depth in zip(panels, depths, strict=True):
        shown = [r for r in results if r["experiment"]["layers"] == depth]
        for r in shown:
            curve = enumerate(r["tests"][-1]["at"], 1)
            places = [(t, share) for t, share in curve if share is not None]
            axes.plot(*zip(*places, strict=True), color=f"C{names.index(r['name'])}")
        e = shown[0]["experiment"]
        axes.axvline(e["length"], color="grey", linestyle=":")
        axes.set(title=f"{e['task']}, layers: {depth}", xlabel="position", ylim=(0, 1.02))
    for i, name in enumerate(names):
        panels[0].plot([], color=f"C{i}", label=name)
    panels[0].set_ylabel("accuracy (dotted: training length)")
    figure.legend(loc="outside lower center", ncols=len(names), frameon=False)
    figure.savefig(path)
