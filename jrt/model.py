"""The language model: embedding, blocks with a mixer and an MLP each, head. The pattern string names the mixers.

Shapes: B batch, T tokens, E width, V vocabulary rows, M columns that the prefix encoder is given, H heads.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from jrt.cache import LayerState, ModelState
from jrt.config import Config
from jrt.mixers import MIXERS, Prefix, TokenBatch
from jrt.mixers.attention import rotary_angles
from jrt.mixers.mamba import Mamba
from jrt.ops import swiglu_linear


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv 1910.07467) of the fp32 residual stream; the result has the dtype of the weights."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        # Faster on a CPU than F.rms_norm, which makes more calls: for one token, calls take more time than arithmetic.
        weight, width = self.weight, x.shape[-1]
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = torch.rsqrt(norm * norm * (1 / width) + self.eps)
        return (x * scale * weight).to(weight.dtype)


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202). The first half of fc1's outputs are the values, the second half the gates."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.width, 2 * config.mlp_width, bias="mlp.fc1" in config.biases)
        self.fc2 = nn.Linear(config.mlp_width, config.width, bias="mlp.fc2" in config.biases)

    def forward(self, x: Tensor) -> Tensor:
        return swiglu_linear(self.fc1(x), self.fc2)


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)) if the block has an MLP.

    The last addition is left to the next block: it is then computed together with that block's norm, in the forward and
    the backward pass, when blocks are compiled.
    """

    def __init__(self, config: Config, mixer: nn.Module) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.width, config.norm_eps)
        self.mixer = mixer
        if config.mlp_width and not isinstance(mixer, Mamba):  # a Mamba layer replaces mixer and MLP
            self.norm2 = RMSNorm(config.width, config.norm_eps)
            self.mlp = MLP(config)

    def forward(
        self, x: Tensor, update: Tensor | None, batch: TokenBatch, state: LayerState | None
    ) -> tuple[Tensor, Tensor, LayerState]:
        """The residual stream is x + update (B, T, E): update is what the block before adds, None in the first block.

        Returns:
            x and update for the next block, and the state after the last token."""
        x = residual(x, update)
        update, state = self.mixer(self.norm1(x), batch, state)
        if hasattr(self, "mlp"):
            x = x + update
            update = self.mlp(self.norm2(x))
        return x, update, state


def residual(x: Tensor, update: Tensor | None) -> Tensor:
    """The sum of the two inputs of a block (B, T, E)."""
    return x if update is None else x + update


@contextlib.contextmanager
def recorded(blocks: Iterable[nn.Module]) -> Iterator[list[Tensor]]:
    """Inside the context, appends the input of each block, the residual stream (B, T, E), to the list."""
    residuals: list[Tensor] = []

    def record(block: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        """The block goes on from the recorded tensor itself, so that gradients reach it."""
        x, update, *rest = given
        residuals.append(residual(x, update))
        return residuals[-1], None, *rest

    with contextlib.ExitStack() as hooks:
        for block in blocks:
            hooks.enter_context(block.register_forward_pre_hook(record))
        yield residuals


class LanguageModel(nn.Module):
    """Turns tokens into logits, and into the state from which reading continues.

    `jrt.modeling_jrt.JRTForCausalLM` wraps it for transformers. The code never waits for the GPU: no branch depends on
    the contents of a tensor.

    Args:
        config: the architecture.
        mixers: the class for each letter of the pattern.
    """

    def __init__(self, config: Config, mixers: Mapping[str, type[nn.Module]] = MIXERS) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_rows, config.width)
        layers = enumerate(config.pattern)
        self.blocks = nn.ModuleList(Block(config, mixers[letter](config, layer)) for layer, letter in layers)
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.head = nn.Linear(config.width, config.vocab_rows, bias=False)
        self.log_decay: Tensor | None
        self.register_buffer("log_decay", None)
        if config.decay_const is not None:
            self.log_decay = fixed_decay(config.decay_const, config.linear_heads)
        if config.tied:
            self.head.weight = self.embedding.weight

    def forward(
        self, input_ids: Tensor, prefix_length: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Logits (B, T, V) of a whole text; arguments as in `read`."""
        hidden, _ = self.read(input_ids, prefix_length=prefix_length, attention_mask=attention_mask)
        return self.head(hidden)

    def read(
        self,
        input_ids: Tensor,
        *,
        state: ModelState | None = None,
        attention_mask: Tensor | None = None,
        prefix_length: Tensor | None = None,
    ) -> tuple[Tensor, ModelState]:
        """Hidden states (B, T, E) before the head, and the state after the last token.

        Args:
            input_ids: (B, T).
            state: the state after earlier tokens; None at the start of a text. Only then a prefix is encoded.
            attention_mask: (B, T) bool, False for padding, which must stand on the left; None: no padding.
            prefix_length: (B,) how many of a row's first own tokens (those that are not padding) the encoder reads, at
                most enc_length; None: as many as there are, up to enc_length.

        Raises:
            ValueError: `state` is from another model, or has another number of rows.
        """
        batch = self.token_batch(input_ids, state, attention_mask, prefix_length)
        return self.read_batch(input_ids, batch, state)

    def token_batch(
        self, input_ids: Tensor, state: ModelState | None, mask: Tensor | None, prefix_length: Tensor | None
    ) -> TokenBatch:
        """The `TokenBatch` that the mixers get with these tokens; arguments as in `read`."""
        rows, length = input_ids.shape
        if state is not None:
            state.check(self.config, rows)
        columns = torch.arange(length, device=input_ids.device)
        positions = columns.expand(rows, -1) if mask is None else mask.long().cumsum(1) - 1  # (B, T)
        if state is not None:
            positions = positions + state.lengths[:, None]
        encodes = state is None and self.config.has("P")
        rotates = self.config.rotary_dim > 0 and self.config.has("AS")
        return TokenBatch(
            positions=positions,
            mask=mask,
            prefix=self._prefix(positions, mask is not None, prefix_length) if encodes else None,
            rotary=rotary_angles(positions, self.config.rotary_dim) if rotates else None,
            log_decay=self.log_decay,
        )

    def _prefix(self, positions: Tensor, is_padded: bool, prefix_length: Tensor | None) -> Prefix:
        """The prefix of each row: its first own tokens, in M = min(enc_length, T) columns."""
        length = min(self.config.enc_length, positions.shape[1])  # M
        index = torch.arange(length, device=positions.device)
        own = positions[:, -1:] + 1  # (B, 1) own tokens of each row
        columns = (positions.shape[1] - own + index).clamp(max=positions.shape[1] - 1) if is_padded else None
        if prefix_length is not None:
            return Prefix(length, columns, index < prefix_length[:, None])
        return Prefix(length, columns, index < own if is_padded else None)

    def read_batch(self, input_ids: Tensor, batch: TokenBatch, state: ModelState | None) -> tuple[Tensor, ModelState]:
        """As `read`, with the `TokenBatch` given."""
        x = self.embedding(input_ids)
        x = x.to(torch.promote_types(x.dtype, torch.float32))  # (B, T, E), the residual stream: at least fp32
        layers, update = [], None
        for index, block in enumerate(self.blocks):
            x, update, layer = block(x, update, batch, None if state is None else state.layers[index])
            layers.append(layer)
        seen = input_ids.shape[1] + (0 if state is None else state.seen)
        return self.last(x, update), ModelState(self.config, layers, seen, batch.positions[:, -1] + 1)

    def last(self, x: Tensor, update: Tensor | None) -> Tensor:
        """Hidden states (B, T, E) before the head, from what the last block returns."""
        return self.norm(residual(x, update))

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draws all weights from the distributions with which the published models were initialised.

        | tensor                                | distribution                                            |
        |---------------------------------------|---------------------------------------------------------|
        | embedding, linear weights             | N(0, 0.02)                                              |
        | out_proj, fc2                         | N(0, 0.02 / sqrt(2 x layers))                           |
        | biases; norms                         | 0; 1                                                    |
        | filters of C and of Mamba             | uniform, as nn.Conv1d                                   |
        | Mamba: A_log; D                       | log(1..N) in each channel; 1                            |
        | Mamba: dt_proj weight; bias           | uniform(+- R^-1/2); softplus^-1 of log-uniform 1e-3..0.1 |
        | Mamba: other linear weights; out_proj | uniform, as nn.Linear; that / sqrt(layers)              |
        """
        layers = len(self.config.pattern)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                residual = name.endswith(("out_proj", "fc2"))
                module.weight.normal_(0, 0.02 / math.sqrt(2 * layers) if residual else 0.02, generator=generator)
            if isinstance(module, nn.Conv1d):
                bound = 1 / math.sqrt(module.kernel_size[0])
                module.weight.uniform_(-bound, bound, generator=generator)
            if isinstance(module, RMSNorm):
                module.weight.fill_(1)
            if isinstance(module, nn.Linear | nn.Conv1d) and module.bias is not None:
                module.bias.zero_()
        for block in self.blocks:
            if isinstance(block.mixer, Mamba):
                _init_mamba(block.mixer, layers, generator)


def fixed_decay(decay_const: float, heads: int) -> Tensor:
    """log gamma_h = log(1 - 2^(decay_const - h)), fp32 (H,): in Based, head h's numerator is multiplied by gamma_h each
    token."""
    return torch.log(1 - torch.exp2(decay_const - torch.arange(heads, dtype=torch.float32)))


def _init_mamba(mixer: Mamba, layers: int, generator: torch.Generator | None) -> None:
    """The last three rows of the table in `init_weights` (arXiv 2312.00752, section 3.6)."""
    for linear, shrink in ((mixer.in_proj, 1), (mixer.x_proj, 1), (mixer.out_proj, math.sqrt(layers))):
        bound = 1 / math.sqrt(linear.in_features) / shrink
        linear.weight.uniform_(-bound, bound, generator=generator)
    bound = 1 / math.sqrt(mixer.rank)
    mixer.dt_proj.weight.uniform_(-bound, bound, generator=generator)
    low, high = math.log(1e-3), math.log(0.1)
    dt = torch.exp(torch.rand(mixer.dt_proj.bias.shape, generator=generator) * (high - low) + low).clamp(min=1e-4)
    mixer.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus of this is dt
    mixer.A_log.copy_(torch.arange(1, mixer.states + 1, dtype=torch.float32).log().expand_as(mixer.A_log))
    mixer.D.fill_(1)
