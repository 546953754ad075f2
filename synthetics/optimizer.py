"""AdamW for a stack of models. Each model has its own learning rate and its own gradient norm.

Shapes: M models, P parameters of each.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

BETAS = (0.9, 0.999)
EPS = 1e-8
WEIGHT_DECAY = 0.1  # paper appendix B.1
LARGEST_NORM = 1.0


class StackedAdamW:
    """Does for each model of a stack what `torch.nn.utils.clip_grad_norm_` and then `torch.optim.AdamW` do.

    The module's parameters are replaced by views of one table (M, P). All updates are in place, so that a CUDA graph
    can replay them.
    """

    def __init__(self, module: nn.Module, learning_rates: list[float], weight_decay: float = WEIGHT_DECAY) -> None:
        self.parameters = list(module.parameters())
        self.weights = torch.cat([each.detach().flatten(1) for each in self.parameters], dim=1)  # (M, P)
        # Rates and bias corrections are computed in fp64, as torch.optim does: 1 - 0.999^1 keeps 4 digits in fp32.
        wide = {"dtype": torch.float64, "device": self.weights.device}
        self.peak = torch.tensor(learning_rates, **wide)[:, None]  # (M, 1)
        self.weight_decay = weight_decay
        self.factor = torch.ones((), **wide)  # of the schedule
        self.steps = torch.zeros((), **wide)
        self.first, self.second = torch.zeros_like(self.weights), torch.zeros_like(self.weights)
        self._attach()

    def _attach(self) -> None:
        """Makes each parameter a view of its columns of the table."""
        start = 0
        for each in self.parameters:
            shape, end = each.shape[1:], start + each[0].numel()
            each.grad = None
            each.data = self.weights[:, start:end].unflatten(1, shape)
            start = end

    @torch.no_grad()
    def step(self) -> None:
        """Updates the weights and drops the gradients."""
        found = [torch.zeros_like(each) if each.grad is None else each.grad for each in self.parameters]
        gradients = torch.cat([each.flatten(1) for each in found], dim=1)  # (M, P)
        for each in self.parameters:
            each.grad = None  # so that the next gradient is stored without an addition
        self.steps += 1
        if self.weights.is_cuda:
            self._step_by_kernels(gradients)
        else:
            self._step(gradients)

    def _step_by_kernels(self, gradients: Tensor) -> None:
        from synthetics import optimizer_kernels

        tables = (self.weights, self.first, self.second, gradients, self.peak, self.factor, self.steps)
        optimizer_kernels.step(*tables, betas=BETAS, eps=EPS, weight_decay=self.weight_decay, largest_norm=LARGEST_NORM)

    def _step(self, g: Tensor) -> None:
        norm = torch.linalg.vector_norm(g, dim=1, keepdim=True)  # (M, 1)
        g.mul_((LARGEST_NORM / (norm + 1e-6)).clamp(max=1))
        rate = self.peak * self.factor
        step_size = rate / (1 - BETAS[0] ** self.steps)
        correction = (1 - BETAS[1] ** self.steps).sqrt()  # a scalar, which leaves the dtype of tables alone
        self.weights.mul_((1 - rate * self.weight_decay).to(g.dtype))
        self.first.lerp_(g, 1 - BETAS[0])
        self.second.mul_(BETAS[1]).addcmul_(g, g, value=1 - BETAS[1])
        self.weights.sub_(self.first / (self.second.sqrt() / correction + EPS) * step_size.to(g.dtype))

    def keep(self, models: list[int]) -> None:
        """Removes all models of the stack except these (their numbers in the stack)."""
        index = torch.tensor(models, device=self.weights.device)
        for name in ("weights", "first", "second", "peak"):
            setattr(self, name, getattr(self, name)[index])
        self._attach()

    def state_dict(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in ("weights", "first", "second", "peak", "steps")}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Loads weights, moments and step count of the same models."""
        for name, value in state.items():
            setattr(self, name, value.to(self.weights.device))
        self._attach()
