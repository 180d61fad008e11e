"""AdamW with the parameter groups of the official RWKV-7 recipe, its schedule, averaged weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from goose_mm.config import TrainConfig


def choose_trainable(model: nn.Module, config: TrainConfig) -> dict[str, nn.Parameter]:
    """Freeze everything whose name does not start with one of `trainable`; return the rest."""
    chosen = {}
    for name, parameter in model.named_parameters():
        picked = not config.trainable or name.startswith(config.trainable)
        parameter.requires_grad_(picked and parameter.is_floating_point())
        if parameter.requires_grad:
            chosen[name] = parameter
    if not chosen:
        raise ValueError(f"train.trainable={list(config.trainable)} matches no parameter")
    return chosen


def parameter_group(name: str, parameter: Tensor) -> tuple[float, bool]:
    """(learning-rate factor, weight decay?) of a parameter, by its official name and shape.

    The decay's bias w0 learns twice as fast; matrices named `.weight` decay; nothing else does.
    """
    if name.endswith("att.w0"):
        return 2.0, False
    return 1.0, parameter.squeeze().ndim >= 2 and name.endswith(".weight")


def build_optimizer(
    parameters: dict[str, nn.Parameter], config: TrainConfig
) -> torch.optim.Optimizer:
    """AdamW with one group per (learning-rate factor, decay)."""
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        factor, decays = parameter_group(name, parameter)
        for prefix, scale in config.lr_scale:
            if name.startswith(prefix):
                factor *= scale
        groups.setdefault((factor, decays), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": members,
                "lr_factor": factor,
                "weight_decay": config.weight_decay if decays else 0.0,
            }
            for (factor, decays), members in groups.items()
        ],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=all(p.is_cuda for p in parameters.values()),
    )


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up from 1 %, then a cosine from `lr` to `lr_final`."""
    progress = min(step / max(config.steps, 1), 1.0)
    rate = config.lr_final + (config.lr - config.lr_final) * 0.5 * (
        1 + math.cos(math.pi * progress)
    )
    if step < config.warmup:
        rate *= 0.01 + 0.99 * step / config.warmup
    return rate


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_factor"]


class AveragedWeights:
    """Exponential moving average of the trained parameters; off when `decay` is 0."""

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float) -> None:
        self.decay, self.parameters = decay, parameters
        self.values = {k: p.detach().clone() for k, p in parameters.items()} if decay else {}

    @torch.no_grad()
    def update(self, step: int) -> None:
        if not self.decay:
            return
        decay = min(self.decay, (1 + step) / (10 + step))  # follow quickly at first
        current: list[Tensor] = [self.parameters[k].data for k in self.values]
        torch._foreach_lerp_(list(self.values.values()), current, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the averages into the model for the length of a `with` block."""
        kept = {k: self.parameters[k].detach().clone() for k in self.values}
        self._load(self.values)
        try:
            yield
        finally:
            self._load(kept)

    @torch.no_grad()
    def _load(self, values: dict[str, Tensor]) -> None:
        for k, value in values.items():
            self.parameters[k].copy_(value)
