"""Layers that hold the weights of many models. Each row of a batch is computed with the weights of its own model.

Shapes: M models, B rows of each, R = M x B rows in all, T tokens, K asked columns, E width, V vocabulary, H heads, d
query/key size, D value size. The first dimension of stacked weights is M. The rows of one model stand together.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from jrt.mixers.attention import Attention, WindowAttention
from jrt.mixers.conv import ShortConvolution
from jrt.mixers.linear_attention import LinearAttention, PrefixLinearAttention
from synthetics.convolution import gated_convolution
from synthetics.taylor import taylor_attention, weighted_sums

SMALL = 8192  # the gradient of a weight with at most so many numbers is computed in PARTS parts of the batch
PARTS = 16
MOST_ASKED = 16  # most queries of a row in `weighted_sums`


def stacked(copies: Sequence[Any]) -> nn.Module:
    """Returns one layer that replaces its copies, one from each model.

    A mixer is called as usual: (x, batch, state). A subclass of a known mixer is not known: it may compute otherwise."""
    first, kind = copies[0], type(copies[0])
    if kind is nn.Linear:
        return StackedLinear(copies)
    if kind is ShortConvolution:
        return StackedConvolution(copies)
    if kind in (LinearAttention, PrefixLinearAttention) and not hasattr(first, "decay_proj"):
        return StackedLinearAttention(copies)
    if kind in (Attention, WindowAttention):
        module = copy.copy(first)  # it has no weights of its own
        names = list(first._modules)
        module._modules = {name: stacked([each.get_submodule(name) for each in copies]) for name in names}
        return module
    return OneByOne(copies)


def weights(copies: Sequence[nn.Module], name: str) -> nn.Parameter:
    """Returns the parameter `name` of all models, stacked: (M, ...)."""
    return nn.Parameter(torch.stack([each.get_parameter(name).detach() for each in copies]))


class StackedLinear(nn.Module):
    """Linear layers of all models: x (R, ..., in) to (R, ..., out) in the dtype of x."""

    def __init__(self, copies: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.weight = weights(copies, "weight")  # (M, out, in)
        self.bias = None if copies[0].bias is None else weights(copies, "bias")  # (M, out)

    def forward(self, x: Tensor) -> Tensor:
        y = product(x, self.weight)
        return y if self.bias is None else (y.unflatten(0, (len(self.bias), -1)) + _wide(self.bias, y)).flatten(0, 1)


def _wide(bias: Tensor, y: Tensor) -> Tensor:
    """Reshapes bias (M, out) to (M, 1, ..., out), so that it can be added to y after its rows are split by model."""
    return bias.to(y.dtype).view(len(bias), *[1] * (y.ndim - 1), -1)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """Multiplies x (R, ..., in) by weight (M, out, in): (R, ..., out) in the dtype of x."""
    rows = x.reshape(len(weight), -1, x.shape[-1])  # (M, B ..., in)
    y = Product.apply(rows, weight) if x.is_cuda else torch.bmm(rows, weight.mT.to(x.dtype))
    return y.view(*x.shape[:-1], -1)


class Product(torch.autograd.Function):
    """x (M, n, in) by weight (M, out, in), with a faster gradient for small weights.

    The gradient of a small weight has few numbers, and each is a sum over tens of thousands of tokens. The library's
    matrix product would use only a few of the GPU's processors. So the sum is split into PARTS products.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        half = weight.to(x.dtype)
        ctx.save_for_backward(x, half)
        ctx.dtype = weight.dtype
        return torch.bmm(x, half.mT)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        parts = PARTS if weight[0].numel() <= SMALL and x.shape[1] % PARTS == 0 else 1
        dweight = _in_parts(dy, parts).mT @ _in_parts(x, parts)  # (M parts, out, in)
        dweight = dweight.unflatten(0, (-1, parts)).sum(1, dtype=ctx.dtype)
        return torch.bmm(dy, weight), dweight


def _in_parts(x: Tensor, parts: int) -> Tensor:
    """Reshapes (M, n, ...) to (M parts, n / parts, ...)."""
    return x.reshape(len(x) * parts, -1, x.shape[-1])


class StackedEmbedding(nn.Module):
    """Embeddings of all models: ids (R, T) to (R, T, E)."""

    def __init__(self, copies: Sequence[nn.Embedding]) -> None:
        super().__init__()
        self.weight = weights(copies, "weight")  # (M, V, E)

    def forward(self, ids: Tensor) -> Tensor:
        models, _, width = self.weight.shape
        rows = self.weight.gather(1, ids.reshape(models, -1, 1).expand(-1, -1, width))  # (M, B T, E)
        return rows.view(*ids.shape, width)


class StackedConvolution(nn.Module):
    """`jrt.mixers.conv.ShortConvolution` of all models, without the bias of its output projection (see `late_bias`)."""

    def __init__(self, copies: Sequence[ShortConvolution]) -> None:
        super().__init__()
        self.in_proj = StackedLinear([each.in_proj for each in copies])
        self.out_proj = StackedLinear([each.out_proj for each in copies])
        self.filter = nn.Parameter(torch.stack([each.conv.weight[:, 0].detach() for each in copies]))  # (M, E, K)
        self.bias = None if copies[0].conv.bias is None else weights(copies, "conv.bias")  # (M, E)

    def forward(self, x: Tensor, batch: object, state: None) -> tuple[Tensor, Tensor]:
        u = product(x, self.in_proj.weight)  # (R, T, 2 E)
        in_bias, bias = self.in_proj.bias, self.bias
        in_bias = self.filter.new_zeros(len(self.filter), u.shape[-1]) if in_bias is None else in_bias
        bias = self.filter.new_zeros(self.filter.shape[:2]) if bias is None else bias
        y = gated_convolution(u, in_bias, self.filter, bias)  # (R, T, E)
        return product(y, self.out_proj.weight), _no_state(x)


def late_bias(mixer: nn.Module) -> nn.Parameter | None:
    """Returns the bias (M, E) that the mixer has not added yet, or None. The residual sum adds it at no extra cost."""
    return mixer.out_proj.bias if isinstance(mixer, StackedConvolution) else None


class StackedLinearAttention(nn.Module):
    """`LinearAttention` or `PrefixLinearAttention` of all models, for whole texts.

    The models may have different d. Smaller queries and keys are filled up with zeros, which change no score. The
    weights that give these zeros are zero and stay zero, because their gradient is zero.
    """

    scales: Tensor  # (M, 1, 1), of the scores

    def __init__(self, copies: Sequence[LinearAttention]) -> None:
        super().__init__()
        first = copies[0]
        self.heads, self.values = first.heads, first.proj_v.out_features // first.heads
        sizes = [each.proj_q.out_features // each.heads for each in copies]
        self.keys = max(sizes)
        scales = [each.key_gain**2 * size**-0.5 for each, size in zip(copies, sizes, strict=True)]
        self.register_buffer("scales", torch.tensor(scales)[:, None, None])
        for name, _ in first.named_children():
            linears = [each.get_submodule(name) for each in copies]
            if name in ("proj_q", "proj_k", "proj_k_enc"):
                linears = [_filled_up(each, self.heads, self.keys) for each in linears]
            setattr(self, name, StackedLinear(linears))
        # Projections to keys and values: those of the text, then those of the prefix, which is the whole text here.
        self.read = [("proj_k", "proj_v")]
        if isinstance(first, PrefixLinearAttention):
            self.read.append(("proj_k_enc", "proj_v_enc"))

    def forward(self, x: Tensor, batch: object, state: None) -> tuple[Tensor, Tensor]:
        others = [self.get_submodule(name).get_parameter("weight") for pair in self.read for name in pair]
        projected = product(x, torch.cat([self._scaled_queries(), *others], dim=1))
        o = taylor_attention(projected, self.heads, self.keys, self.values)  # (R, T, H D)
        return self.out_proj(o), _no_state(x)

    def _scaled_queries(self) -> Tensor:
        """Returns the weight of proj_q (M, H d, E) times the scale of the scores."""
        return self.proj_q.get_parameter("weight") * self.scales.to(self.proj_q.weight.dtype)

    def can_answer(self, asked: Tensor) -> bool:
        """Whether `answer` can compute so many columns."""
        return asked.shape[1] * self.heads <= MOST_ASKED

    def answer(self, x: Tensor, x_asked: Tensor, asked: Tensor) -> Tensor:
        """Computes `forward` at the asked columns only, without keys and values of all tokens.

        A score is q (W_k x) = (W_k^T q) x, and a weighted sum of values is W_v (the weighted sum of x). So the
        projections W_k and W_v are applied once for each query, not once for each token.

        Args:
            x: (R, T, E).
            x_asked: (R, K, E), x at the asked columns.
            asked: (R, K), at most MOST_ASKED / H columns.

        Returns:
            (R, K, E).
        """
        (rows, length, width), count = x.shape, asked.shape[1]
        models = len(self.proj_q.weight)
        q = product(x_asked, self._scaled_queries())  # (R, K, H d)
        q = q.view(models, -1, self.heads, self.keys).transpose(1, 2)  # (M, H, B K, d)
        ends = asked, asked.new_full((), length - 1).expand_as(asked)  # of the text, of the prefix
        numerator, denominator = [], []
        for (key, value), end in zip(self.read, ends, strict=False):
            by_head = (self.get_submodule(name).weight.unflatten(1, (self.heads, -1)) for name in (key, value))
            key_weight, value_weight = (each.to(x.dtype) for each in by_head)  # (M, H, d or D, E)
            queries = (q @ key_weight).transpose(1, 2).reshape(rows, -1, width)  # (R, K H, E)
            sums, totals = weighted_sums(queries, x, end.repeat_interleave(self.heads, dim=1))
            sums = sums.view(models, -1, self.heads, width).transpose(1, 2)  # (M, H, B K, E)
            numerator.append((sums @ value_weight.mT).transpose(1, 2))  # (M, B K, H, D)
            denominator.append(totals.view(models, -1, self.heads, 1))
        o = (sum(numerator) / sum(denominator)).to(x.dtype)
        return self.out_proj(o.reshape(rows, count, -1))


def _filled_up(linear: nn.Linear, heads: int, size: int) -> nn.Linear:
    """Returns the layer with `size` outputs for each head. The added outputs are 0."""
    weight = linear.weight.detach().unflatten(0, (heads, -1))  # (H, d, E)
    weight = torch.nn.functional.pad(weight, (0, 0, 0, size - weight.shape[1])).flatten(0, 1)
    filled = nn.Linear(linear.in_features, len(weight), bias=False, dtype=weight.dtype)
    filled.weight = nn.Parameter(weight)
    return filled


class OneByOne(nn.Module):
    """Any other mixer.

    It is called once for each model, with the model's own rows, weights and buffers, in the weights' dtype (fp32
    without weights)."""

    def __init__(self, copies: Sequence[nn.Module]) -> None:
        super().__init__()
        self.names = [name for name, _ in copies[0].named_parameters()]
        self.stacked = nn.ParameterList([weights(copies, name) for name in self.names])
        self.copies = list(copies)  # in a list, so that their own weights are no parameters of the stack
        self.dtype = self.stacked[0].dtype if self.names else torch.float32

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OneByOne:
        """Moves the copies, which have the buffers, to the same device."""
        for each in self.copies:
            each._apply(fn)
        return super()._apply(fn, recurse)

    def forward(self, x: Tensor, batch: Any, state: None) -> tuple[Tensor, Tensor]:
        models, outputs = len(self.copies), []
        for model, mixer in enumerate(self.copies):
            part = slice(model * len(x) // models, (model + 1) * len(x) // models)
            own = {name: each[model] for name, each in zip(self.names, self.stacked, strict=True)}
            y, _ = functional_call(mixer, own, (x[part].to(self.dtype), _rows(batch, part, len(x)), None))
            outputs.append(y.to(x.dtype))
        return torch.cat(outputs), _no_state(x)


def _rows(value: Any, part: slice, rows: int) -> Any:
    """Cuts tensors with one entry for each row to `part`, inside tuples and dataclasses as well."""
    if isinstance(value, Tensor):
        return value[part] if value.ndim > 1 and len(value) == rows else value
    if isinstance(value, tuple):
        parts = [_rows(each, part, rows) for each in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if dataclasses.is_dataclass(value):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return type(value)(**{name: _rows(each, part, rows) for name, each in fields.items()})
    return value


def _no_state(x: Tensor) -> Tensor:
    return x.new_empty(0)
