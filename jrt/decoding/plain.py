"""A step (one token for each row) in plain PyTorch: for CPUs, and on a GPU for models that the Triton kernels of
`jrt.decoding.fused` cannot run (weights in int8, unsupported sizes).

It computes what `LanguageModel.read` computes for one token, with fewer calls of PyTorch functions. On a CPU, most of a
small model's time goes into these calls. So masks are left out if they hide nothing, and angles and feature indices
come from tables.

Shapes: B rows, E width or channels, K taps, H heads, d query/key size, D value or head size, F features, R ring
columns.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jrt.cache import ModelState
from jrt.decoding.states import ConvolutionInputs, KeyRing, LayerBuffers, LinearSums, MambaSums
from jrt.decoding.step import Step
from jrt.decoding.tables import feature_table
from jrt.mixers import Attention, LinearAttention, Mamba, ShortConvolution
from jrt.model import Block, LanguageModel, RMSNorm

Layer = Callable[[Tensor, "Moment"], Tensor]  # (B, E) -> (B, E)


class Moment:
    """What the layers share in one step: the position of the token, and which earlier keys it may see."""

    def __init__(self, step: PlainStep) -> None:
        self.position, self.whole, self.padded = step.position, step.whole, step.padded
        self.rings: dict[int, tuple[Tensor, Tensor | None]] = {}
        if step.rotary is not None:
            own = self.position.column - self.position.pads  # (B,)
            self.cos, self.sin = (
                table.index_select(0, own)[:, None] for table in (step.rotary.cos, step.rotary.sin)
            )  # (B, 1, D)
            self.partner = step.rotary.partner

    def ring(self, size: int) -> tuple[Tensor, Tensor | None]:
        """The place (1,) of this token's key in a ring buffer of R = size columns, and (B, 1, 1, R) bool, True for the
        keys that it sees; None: it sees all."""
        if size not in self.rings:
            column, seen = self.position.column, None
            place = column % size
            if self.padded:
                past = torch.arange(self.shown(size), device=column.device)
                ages = (column - past) % size  # (R,) how many tokens ago each column was written
                seen = (ages <= column - self.position.pads[:, None])[:, None, None]
            self.rings[size] = place, seen
        return self.rings[size]

    def shown(self, size: int) -> int:
        """How many columns of a ring to read: those in use, or all, if the step is captured in a CUDA graph."""
        return size if self.whole else min(size, self.position.seen + 1)


class PlainStep(Step):
    """A `Step` of PyTorch functions."""

    def __init__(self, model: LanguageModel, rows: int, capacity: int, whole: bool) -> None:
        """Arguments as in `Step`; whole: read all columns of the buffers, as a captured step must, not only those in
        use."""
        super().__init__(model, rows, capacity)
        self.whole = self.padded = whole
        weight = model.embedding.weight
        one_row = rows == 1 and not whole and weight.dtype in (torch.float32, torch.float64)
        self.layers = [
            _block(block, buffers, model, one_row) for block, buffers in zip(self.blocks, self.buffers, strict=True)
        ]
        self.norm, self.head = _norm(model.norm, one_row), _linear(model.head)

    def load(self, state: ModelState) -> None:
        super().load(state)
        self.padded = self.whole or bool(self.position.pads.any())

    def advance(self, ids: Tensor) -> Tensor:
        x = F.embedding(ids, self.model.embedding.weight)
        x = x.to(torch.promote_types(x.dtype, torch.float32))  # (B, E), the residual stream, written in place
        moment = Moment(self)
        for layer in self.layers:
            x = layer(x, moment)
        logits = self.head(self.norm(x))
        self.position.column.add_(1)
        return logits


def _linear(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """The module as a function; for an nn.Linear F.linear itself, without the overhead of a module call."""
    if type(module) is not nn.Linear:
        return module
    weight, bias = module.weight, module.bias
    return lambda x: F.linear(x, weight, bias)  # positional arguments: torchao's int8 weights accept no keywords


def _norm(module: RMSNorm, one_row: bool) -> Callable[[Tensor], Tensor]:
    """The norm as a function. For one row on a CPU its scale is computed as a Python number, in a third of the time."""
    weight, eps, width = module.weight, module.eps, module.weight.shape[0]

    def norm_one(x: Tensor) -> Tensor:
        row = x[0]
        scale = (torch.dot(row, row).item() / width + eps) ** -0.5
        return (x * scale).mul_(weight)

    def norm(x: Tensor) -> Tensor:
        scale = torch.rsqrt((x * x).sum(1, keepdim=True) * (1 / width) + eps)
        return (x * scale * weight).to(weight.dtype)

    return norm_one if one_row else norm


def _block(block: Block, buffers: LayerBuffers, model: LanguageModel, one_row: bool) -> Layer:
    norm1, mixer = _norm(block.norm1, one_row), _mixer(block.mixer, buffers, model)
    if not hasattr(block, "mlp"):
        return lambda x, moment: x.add_(mixer(norm1(x), moment))
    norm2, fc1, fc2 = _norm(block.norm2, one_row), _linear(block.mlp.fc1), _linear(block.mlp.fc2)

    def layer(x: Tensor, moment: Moment) -> Tensor:
        x.add_(mixer(norm1(x), moment))
        value, gate = fc1(norm2(x)).chunk(2, 1)
        return x.add_(fc2(F.silu(gate).mul_(value)))

    return layer


def _mixer(mixer: nn.Module, buffers: LayerBuffers, model: LanguageModel) -> Layer:
    """The one-token function of a mixer, which updates its buffers in place."""
    if isinstance(mixer, ShortConvolution):
        assert isinstance(buffers, ConvolutionInputs)
        return _short_convolution(mixer, buffers)
    if isinstance(mixer, LinearAttention):
        assert isinstance(buffers, LinearSums)
        return _linear_attention(mixer, buffers, model.log_decay if mixer.has_decay else None)
    if isinstance(mixer, Attention):
        assert isinstance(buffers, KeyRing)
        return _attention(mixer, buffers)
    assert isinstance(mixer, Mamba) and isinstance(buffers, MambaSums)
    return _mamba(mixer, buffers)


def _convolved(inputs: Tensor, u: Tensor, taps: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution (B, E) of the last inputs (B, K - 1, E) and the new one, u (B, E); taps: (K, E).

    u replaces the oldest of the inputs, in place."""
    both = torch.cat([inputs, u[:, None]], 1)
    inputs.copy_(both[:, 1:])
    c = (both * taps).sum(1)
    return c if bias is None else c + bias.to(c.dtype)


def _short_convolution(mixer: ShortConvolution, state: ConvolutionInputs) -> Layer:
    in_proj, out_proj, conv = _linear(mixer.in_proj), _linear(mixer.out_proj), mixer.conv
    taps, bias = conv.weight[:, 0].mT, conv.bias

    def step(x: Tensor, moment: Moment) -> Tensor:
        u, gate = in_proj(x).chunk(2, 1)
        c = _convolved(state.inputs, u, taps.to(u.dtype), bias)
        return out_proj(F.silu(c).mul_(gate))

    return step


def _linear_attention(mixer: LinearAttention, state: LinearSums, log_decay: Tensor | None) -> Layer:
    q_proj, k_proj, v_proj, out_proj = (_linear(m) for m in (mixer.proj_q, mixer.proj_k, mixer.proj_v, mixer.out_proj))
    gains = _linear(mixer.decay_proj) if mixer.has_decay else None
    S, z, heads, gain = state.S, state.z[:, :, 0], mixer.heads, mixer.key_gain
    d = mixer.proj_q.out_features // heads
    table = feature_table(d, S.device)
    weight = table.weight.to(S.dtype)
    decay = None if log_decay is None else log_decay.to(S.dtype).exp()[:, None, None]

    def step(x: Tensor, moment: Moment) -> Tensor:
        qk = torch.stack([q_proj(x), k_proj(x)])  # (2, B, H d)
        if gain != 1.0:
            qk = qk * gain
        with_one = F.pad(qk.to(S.dtype).view(2, -1, heads, d), (0, 1), value=1.0)
        first, second = with_one.index_select(3, table.row), with_one.index_select(3, table.column)
        phi_q, phi_k = first.mul_(second).mul_(weight)  # (B, H, F) each
        v = v_proj(x)
        if decay is not None:
            S.mul_(decay)
        S.addcmul_(phi_k[..., None], v.to(S.dtype).view(-1, heads, 1, S.shape[3]))
        z.add_(phi_k)
        o = phi_q[:, :, None] @ S  # (B, H, 1, D)
        o = (o / (phi_q[:, :, None] @ z[..., None])).flatten(1).to(v.dtype)
        if gains is not None:
            o = (o.unflatten(1, (heads, -1)) * gains(x)[..., None]).flatten(1)
        return out_proj(o)

    return step


def _attention(mixer: Attention, state: KeyRing) -> Layer:
    qkv_proj, out_proj, heads, scale = _linear(mixer.Wqkv), _linear(mixer.out_proj), mixer.heads, mixer.scale
    keys, values = state.k, state.v
    ring, head_dim = keys.shape[2:]

    def step(x: Tensor, moment: Moment) -> Tensor:
        qk, v = qkv_proj(x).view(-1, 3 * heads, head_dim).split([2 * heads, heads], 1)
        if hasattr(moment, "cos"):
            cos, sin = moment.cos.to(qk.dtype), moment.sin.to(qk.dtype)
            qk = torch.addcmul(qk * cos, qk.index_select(2, moment.partner), sin)
        q, k = qk.split(heads, 1)
        place, seen = moment.ring(ring)
        keys.index_copy_(2, place, k[:, :, None])
        values.index_copy_(2, place, v[:, :, None])
        shown = moment.shown(ring)
        k, v = keys[:, :, :shown], values[:, :, :shown]
        o = F.scaled_dot_product_attention(q[:, :, None], k, v, attn_mask=seen, scale=scale)
        return out_proj(o.flatten(1))

    return step


def _mamba(mixer: Mamba, state: MambaSums) -> Layer:
    in_proj, x_proj, out_proj = _linear(mixer.in_proj), _linear(mixer.x_proj), _linear(mixer.out_proj)
    taps, conv_bias = mixer.conv1d.weight[:, 0].mT, mixer.conv1d.bias
    sizes, h = [mixer.rank, mixer.states, mixer.states], state.h
    wide = h.dtype

    def step(x: Tensor, moment: Moment) -> Tensor:
        u, gate = in_proj(x).chunk(2, 1)
        u = F.silu(_convolved(state.inputs, u, taps.to(u.dtype), conv_bias))
        rank, B, C = x_proj(u).split(sizes, 1)
        delta = F.softplus(F.linear(rank, mixer.dt_proj.weight).to(wide) + mixer.dt_proj.bias)  # (B, E)
        A = -mixer.A_log.to(wide).exp()
        wide_u = u.to(wide)
        h.mul_(torch.exp(delta[..., None] * A)).addcmul_((delta * wide_u)[..., None], B.to(wide)[:, None])
        y = (h @ C.to(wide)[..., None])[..., 0] + mixer.D.to(wide) * wide_u
        return out_proj(y.to(u.dtype) * F.silu(gate))

    return step
