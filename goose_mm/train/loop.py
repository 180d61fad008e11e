"""One training loop for text, pictures and sound.

A model answers `loss(batch) -> (loss, metrics)`; data answers `batch(step)`, a pure function of
seed and step, and `evaluate(model)`. Randomness inside the model is reseeded from the step too,
so a resumed run repeats an unbroken one bit for bit (on CPU).
"""

from __future__ import annotations

import pickle
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader, Dataset

from goose_mm.checkpoint import dump, made, whole
from goose_mm.config import Recipe, TrainConfig
from goose_mm.train.build import build, save
from goose_mm.train.log import Log
from goose_mm.train.optim import (
    AveragedWeights,
    build_optimizer,
    choose_trainable,
    learning_rate,
    set_learning_rate,
)

RESUME_FILE = "resume.pt"
# Mixed reductions give gradients of wrong shapes, or wrong ones: pytorch#178080, pytorch#193061.
COMPILE: dict[str, Any] = {"dynamic": False, "options": {"triton.mix_order_reduction": False}}


def train(
    recipe: Recipe,
    out: str | Path,
    *,
    device: str | None = None,
    until: int | None = None,
    quiet: bool = False,
) -> dict[str, float]:
    """Run a recipe into the folder `out`; a folder that holds a checkpoint is resumed.

    Stops after `until` steps, at `train.max_minutes`, or on SIGTERM, each time with a checkpoint.
    Returns the last evaluation. ValueError when `out` holds another recipe's run. OSError when the
    disk is full: the last checkpoint is as it was, and the same command goes on from it.
    """
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with made(Path(out)):
        return _train(recipe, Path(out), place, until, quiet)


def _train(
    recipe: Recipe, out: Path, place: torch.device, until: int | None, quiet: bool
) -> dict[str, float]:
    config = recipe.train
    torch.manual_seed(config.seed)
    model, data = build(recipe, out)
    model.to(place)
    parameters = choose_trainable(model, config)
    optimizer = build_optimizer(parameters, config)
    averaged = AveragedWeights(parameters, config.ema)
    step = resume(out, recipe, model, optimizer, averaged)
    if config.compile:
        for module in model.modules():
            if type(module).__name__ == "Block":
                module.compile(**COMPILE)

    last = config.steps if until is None else min(until, config.steps)
    scores: dict[str, float] = {}
    deadline = time.monotonic() + 60 * config.max_minutes if config.max_minutes else float("inf")
    batches = prefetch(data, range(step * config.accumulate, last * config.accumulate), recipe)
    with Log(out / "metrics.jsonl", step, config.steps, quiet) as log, stop_requested() as stop:
        while True:
            ended = step >= config.steps
            if step and (ended or _every(config.eval_every, step)):
                with averaged.applied():
                    scores = evaluate(model, data)
                log.evaluation(step, scores)
            leaving = ended or step >= last or stop() or time.monotonic() > deadline
            if leaving or (step and _every(config.save_every, step)):
                checkpoint(out, recipe, model, optimizer, averaged, step)
            if leaving:
                break

            torch.manual_seed(config.seed * 1_000_003 + step)
            set_learning_rate(optimizer, learning_rate(step, config))
            metrics = accumulate(model, batches, config, place)
            grad_norm = clip_grad_norm_(parameters.values(), config.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            averaged.update(step)
            step += 1
            values = torch.stack([*metrics.values(), grad_norm.to(place)]).tolist()
            log.step(step, dict(zip([*metrics, "grad_norm"], values, strict=True)))
        if not ended:
            log.say(f"stopped at step {step} of {config.steps}; run the same command to go on")
    return scores


def accumulate(
    model: nn.Module, batches: Iterator[dict[str, Tensor]], config: TrainConfig, place: torch.device
) -> dict[str, Tensor]:
    """Gradients of `accumulate` batches; the mean of their metrics."""
    model.train()
    total: dict[str, Tensor] = {}
    for _ in range(config.accumulate):
        batch = {k: t.to(place, non_blocking=True) for k, t in next(batches).items()}
        with torch.autocast(place.type, torch.bfloat16, enabled=config.precision == "bf16"):
            loss, metrics = model.loss(batch)  # type: ignore[operator]
        (loss / config.accumulate).backward()
        for name, value in metrics.items():
            total[name] = total.get(name, 0) + value.detach().float() / config.accumulate
    return total


@torch.no_grad()
def evaluate(model: nn.Module, data: Any) -> dict[str, float]:
    """The data's own scores of the model, in evaluation mode, full precision and not compiled:
    lengths vary too much for that."""
    model.eval()
    with torch.compiler.set_stance("force_eager"):
        return data.evaluate(model)


class _Steps(Dataset):
    """`data.batch(step)` as a dataset, so that worker processes can run ahead."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.data.batch(index)


def prefetch(data: Any, steps: range, recipe: Recipe) -> Iterator[dict[str, Tensor]]:
    """Batches in order of step, made ahead of time where the recipe asks for workers."""
    workers = getattr(recipe.data, "workers", 0)
    loader = DataLoader(
        _Steps(data),
        batch_size=None,
        sampler=list(steps),
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        pin_memory=torch.cuda.is_available(),
    )
    return iter(loader)


def checkpoint(
    out: Path,
    recipe: Recipe,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    averaged: AveragedWeights,
    step: int,
) -> None:
    """Write the model folder (averaged weights, if any) and what resuming needs, or nothing."""
    trained = {k: p.detach() for k, p in averaged.parameters.items()}
    kept = {
        "step": step,
        "recipe": repr(_settled(recipe)),
        "parameters": trained,
        "averaged": averaged.values,
        "optimizer": optimizer.state_dict(),
    }
    with whole(out / RESUME_FILE) as part:  # which takes its place behind the model's files
        dump(kept, part)
        with averaged.applied():
            save(model, out)


def resume(
    out: Path,
    recipe: Recipe,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    averaged: AveragedWeights,
) -> int:
    """Restore a run in place and return its step; 0 when the folder holds none."""
    path = out / RESUME_FILE
    if not path.exists():
        return 0
    try:
        kept = torch.load(path, map_location="cpu", weights_only=True)
    except (EOFError, RuntimeError, pickle.UnpicklingError):
        raise ValueError(f"{path} is damaged; remove it to begin anew") from None
    if kept["recipe"] != repr(_settled(recipe)):
        raise ValueError(f"{out} holds a run of another recipe; choose a new --out folder")
    with torch.no_grad():
        for name, parameter in averaged.parameters.items():
            parameter.copy_(kept["parameters"][name])
            if name in averaged.values:
                averaged.values[name].copy_(kept["averaged"][name])
    optimizer.load_state_dict(kept["optimizer"])
    return kept["step"]


def _settled(recipe: Recipe) -> tuple[Any, ...]:
    """What must not change between a run and its continuation: all but where and how long."""
    train = {k: v for k, v in vars(recipe.train).items() if k not in _MAY_CHANGE}
    data = {k: v for k, v in vars(recipe.data).items() if k not in _MAY_CHANGE}
    return recipe.backbone, data, train


_MAY_CHANGE = {"eval_every", "save_every", "max_minutes", "compile", "workers", "skip_bad"}


@contextmanager
def stop_requested() -> Iterator[Any]:
    """A function that turns true on SIGTERM or Ctrl-C, so that the step in hand is finished."""
    asked = []
    handled = [signal.SIGTERM, signal.SIGINT]
    try:
        before = [signal.signal(s, lambda *_: asked.append(True)) for s in handled]
    except ValueError:  # not the main thread: nothing can be caught
        handled, before = [], []
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in zip(handled, before, strict=True):
            signal.signal(number, handler)


def _every(interval: int, step: int) -> bool:
    return bool(interval) and step % interval == 0
