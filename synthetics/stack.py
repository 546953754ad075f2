"""Many models of one shape as one model: their rows share a batch, and each row meets the weights of its own model.

A stack is made out of jrt's own modules. Those that hold weights are replaced by ones that hold the weights of all
models; what only mixes tokens sees a larger batch and stays as it is. A mixer that is not known here (Mamba, your own)
is called once for each model. A stack reads whole texts without padding and keeps no states.

Shapes: M models, B rows of each, R = M x B rows in all, T tokens, E width, K taps, V vocabulary. Stacked weights have M
in front; the rows of one model are neighbours.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from jrt.mixers.attention import Attention
from jrt.mixers.conv import ShortConvolution
from jrt.mixers.linear_attention import LinearAttention, PrefixLinearAttention
from jrt.model import MLP, Block, LanguageModel, RMSNorm
from synthetics.fused import fused
from synthetics.taylor import taylor_attention

SHORT = 2048  # tokens: longer texts go through jrt.ops, whose memory is linear in them


def stack(models: Sequence[LanguageModel], dtype: torch.dtype = torch.float32) -> LanguageModel:
    """One model that takes the batches of all models, the first model's rows first.

    Args:
        models: of one configuration.
        dtype: what layers compute in; weights and the residual stream stay in fp32.

    Returns:
        A model whose parameters are those of the models, stacked: (M, ...) each.
    """
    whole = _stacked(models, dtype)
    assert isinstance(whole, LanguageModel)
    if whole.config.tied:
        whole.head.weight = whole.embedding.weight
    return whole


def _stacked(copies: Sequence[Any], dtype: torch.dtype) -> nn.Module:
    """One module in place of its copies, one copy a model."""
    match copies[0]:
        case nn.Linear():
            return StackedLinear(copies)
        case nn.Embedding():
            return StackedEmbedding(copies)
        case RMSNorm():
            return StackedRMSNorm(copies, dtype)
        case ShortConvolution():
            return StackedConvolution(copies)
        case LinearAttention() if not hasattr(copies[0], "decay_proj"):
            return ShortTextAttention(_with_stacked_children(copies, dtype))
        case LanguageModel() | Block() | MLP() | nn.ModuleList() | Attention() | LinearAttention():
            return _with_stacked_children(copies, dtype)
        case _:
            return OneByOne(copies)


def _with_stacked_children(copies: Sequence[nn.Module], dtype: torch.dtype) -> Any:
    """The first copy with other children; it has no weights of its own."""
    module = copy.copy(copies[0])
    module._modules = {
        name: _stacked([each.get_submodule(name) for each in copies], dtype) for name in copies[0]._modules
    }
    return module


def _weights(copies: Sequence[nn.Module], name: str) -> nn.Parameter:
    return nn.Parameter(torch.stack([each.get_parameter(name).detach() for each in copies]))


def _by_model(x: Tensor, models: int) -> Tensor:
    """(R, ...) to (M, B, ...)."""
    return x.unflatten(0, (models, -1))


class StackedLinear(nn.Module):
    """x (R, ..., in) to (R, ..., out) in the dtype of x."""

    def __init__(self, copies: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.weight = _weights(copies, "weight")  # (M, out, in)
        self.bias = None if copies[0].bias is None else _weights(copies, "bias")  # (M, out)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(len(self.weight), -1, x.shape[-1])  # (M, B T, in)
        weight = self.weight.mT.to(x.dtype)
        if self.bias is None:
            y = torch.bmm(rows, weight)
        else:
            y = torch.baddbmm(self.bias[:, None].to(x.dtype), rows, weight)
        return y.view(*x.shape[:-1], -1)


class StackedEmbedding(nn.Module):
    """ids (R, T) to (R, T, E)."""

    def __init__(self, copies: Sequence[nn.Embedding]) -> None:
        super().__init__()
        self.weight = _weights(copies, "weight")  # (M, V, E)

    def forward(self, ids: Tensor) -> Tensor:
        models, _, width = self.weight.shape
        index = _by_model(ids, models).flatten(1)[..., None].expand(-1, -1, width)  # (M, B T, E)
        return self.weight.gather(1, index).view(*ids.shape, width)


class StackedRMSNorm(nn.Module):
    """x (R, ..., E) in fp32 to the same shape in `dtype`."""

    def __init__(self, copies: Sequence[RMSNorm], dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = _weights(copies, "weight")  # (M, E)
        self.eps, self.dtype = copies[0].eps, dtype

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(len(self.weight), -1, x.shape[-1])  # (M, B T, E)
        return rms_norm(rows, self.weight, self.eps, self.dtype).view(x.shape)


@fused
def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """x (M, n, E), weight (M, E)."""
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return (x * scale * weight[:, None]).to(dtype)


class StackedConvolution(nn.Module):
    """`jrt.mixers.conv.ShortConvolution` for the models' rows."""

    def __init__(self, copies: Sequence[ShortConvolution]) -> None:
        super().__init__()
        self.in_proj = StackedLinear([each.in_proj for each in copies])
        self.out_proj = StackedLinear([each.out_proj for each in copies])
        self.filter = nn.Parameter(torch.stack([each.conv.weight[:, 0].detach() for each in copies]))  # (M, E, K)
        self.bias = None if copies[0].conv.bias is None else _weights(copies, "conv.bias")  # (M, E)

    def forward(self, x: Tensor, batch: object, state: None) -> tuple[Tensor, Tensor]:
        u = _by_model(self.in_proj(x), len(self.filter))  # (M, B, T, 2 E)
        y = gated_convolution(u, self.filter, self.bias)
        return self.out_proj(y.flatten(0, 1)), _no_state(x)


@fused
def gated_convolution(u: Tensor, taps: Tensor, bias: Tensor | None) -> Tensor:
    """silu(conv(u)) x gate: u (M, B, T, 2 E) holds the input, then the gate; taps (M, E, K), the last one is now."""
    u, gate = u.chunk(2, dim=-1)  # (M, B, T, E) each
    length, count = u.shape[2], taps.shape[2]
    before = torch.nn.functional.pad(u, (0, 0, count - 1, 0))
    taps = taps.permute(2, 0, 1).to(u.dtype).contiguous()[:, :, None, None]  # (K, M, 1, 1, E)
    c = before[:, :, :length] * taps[0]
    for tap in range(1, count):
        c = torch.addcmul(c, before[:, :, tap : tap + length], taps[tap])
    if bias is not None:
        c = c + bias[:, None, None].to(u.dtype)
    return torch.nn.functional.silu(c) * gate


class ShortTextAttention(nn.Module):
    """`LinearAttention` or `PrefixLinearAttention` by `taylor_attention`, where the text is short."""

    def __init__(self, mixer: LinearAttention) -> None:
        super().__init__()
        self.mixer = mixer  # with stacked projections

    def forward(self, x: Tensor, batch: Any, state: None) -> tuple[Tensor, Any]:
        if x.shape[1] > SHORT:
            return self.mixer(x, batch, state)
        mixer = self.mixer
        q, k = (mixer.heads_of(project(x)) * mixer.key_gain for project in (mixer.proj_q, mixer.proj_k))
        prefix = None
        if isinstance(mixer, PrefixLinearAttention):
            # The whole text is the prefix: enc_length is at least as long.
            prefix = mixer.heads_of(mixer.proj_k_enc(x)) * mixer.key_gain, mixer.heads_of(mixer.proj_v_enc(x))
        o = taylor_attention(q, k, mixer.heads_of(mixer.proj_v(x)), prefix)  # (R, T, H, D)
        return mixer.out_proj(o.flatten(2)), _no_state(x)


class OneByOne(nn.Module):
    """Any mixer, called once for each model with its own rows and its own slice of the weights, in fp32."""

    def __init__(self, copies: Sequence[nn.Module]) -> None:
        super().__init__()
        self.names = [name for name, _ in copies[0].named_parameters()]
        self.stacked = nn.ParameterList([_weights(copies, name) for name in self.names])
        self.template = [copies[0]]  # in a list, so that its own weights are no parameters of the stack

    def forward(self, x: Tensor, batch: Any, state: None) -> tuple[Tensor, Tensor]:
        models, outputs = len(self.stacked[0]), []
        for model in range(models):
            part = slice(model * len(x) // models, (model + 1) * len(x) // models)
            weights = {name: each[model] for name, each in zip(self.names, self.stacked, strict=True)}
            wide = x[part].to(self.stacked[0].dtype)
            y, _ = functional_call(self.template[0], weights, (wide, _rows(batch, part, len(x)), None))
            outputs.append(y.to(x.dtype))
        return torch.cat(outputs), _no_state(x)


def _rows(value: Any, part: slice, rows: int) -> Any:
    """The part of everything in `value` that has one entry a row."""
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
