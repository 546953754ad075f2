"""AdamW's settings: the learning rate schedule, which weights decay, and a moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from jrt.training.settings import check_fields

DECAYED = ("matrices", "released")


@dataclass(frozen=True)
class Schedule:
    """AdamW's settings.

    The learning rate rises linearly from `start` to `peak` in `warmup` steps. Then it falls to `floor` along half a
    cosine until step `steps`. `clip` is the largest norm of the gradient.
    """

    steps: int
    peak: float = 2e-3
    floor: float = 2e-4
    start: float = 1e-6
    warmup: int = 100
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    decayed: str = "matrices"  # one of DECAYED; see parameter_groups
    clip: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self, "schedule")
        if self.decayed not in DECAYED:
            raise ValueError(f"schedule.decayed is {self.decayed!r}: expected one of {', '.join(DECAYED)}")
        if self.steps < 1:
            raise ValueError(f"schedule.steps is {self.steps}: expected at least 1")
        for name in ("peak", "floor", "start", "warmup", "weight_decay", "eps"):
            if getattr(self, name) < 0:
                raise ValueError(f"schedule.{name} is {getattr(self, name)}: expected a number of at least 0")
        if self.warmup > self.steps:
            raise ValueError(
                f"schedule.warmup is {self.warmup}, but the schedule ends after {self.steps} steps, before the rate "
                "has risen to its peak: give fewer (task.schedule.warmup), or more steps"
            )
        for name in ("floor", "start"):
            if getattr(self, name) > self.peak:
                raise ValueError(
                    f"schedule.{name} is {getattr(self, name)}, above schedule.peak, which is {self.peak}: lower it as well"
                )
        if self.clip <= 0:  # 0 would make all gradients 0
            raise ValueError(f"schedule.clip is {self.clip}: expected a number above 0, a large one for no clipping")

    def rate(self, step: int) -> float:
        """Learning rate of step `step`, counted from 0."""
        if step < self.warmup:
            return self.start + (self.peak - self.start) * step / self.warmup
        done = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        return self.floor + 0.5 * (self.peak - self.floor) * (1 + math.cos(math.pi * done))

    def optimizer(self, model: nn.Module, fused: bool) -> torch.optim.AdamW:
        groups = parameter_groups(model, self.weight_decay, self.decayed)
        return torch.optim.AdamW(groups, lr=self.rate(0), betas=self.betas, eps=self.eps, fused=fused)


def parameter_groups(model: nn.Module, weight_decay: float, decayed: str = "matrices") -> list[dict]:
    """Returns AdamW's two parameter groups, with and without weight decay.

    decayed "matrices": projections decay; embeddings, biases, norms, convolution filters and Mamba's A_log and D do
    not. decayed "released": norms and convolution filters decay as well, as in the released training code.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    chosen: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        last = name.rsplit(".", 1)[-1]
        never = id(parameter) in embeddings or last in ("bias", "A_log", "D")
        decays = not never and (decayed == "released" or parameter.ndim == 2)
        (chosen if decays else others).append(parameter)
    return [{"params": chosen, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


class MovingAverage:
    """Exponential moving average of the weights.

    At each step the new average is `decay` times the old one plus (1 - `decay`) times the weights.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"ema is {decay}: expected a share between 0 and 1")
        self.decay = decay
        self.parameters = list(parameters)
        self.values: list[Tensor] = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        torch._foreach_lerp_(self.values, [p.detach() for p in self.parameters], 1 - self.decay)

    @torch.no_grad()
    def restart(self) -> None:
        """Begins again at the present weights."""
        torch._foreach_copy_(self.values, [p.detach() for p in self.parameters])

    @torch.no_grad()
    def exchange(self) -> None:
        """Swaps the model's weights and the averages. A second call swaps them back."""
        for parameter, value in zip(self.parameters, self.values, strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(value)
            value.copy_(kept)
