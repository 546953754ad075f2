"""The language model: embedding, blocks of one mixer and one MLP, head. Which mixers, the pattern string says.

Shapes: B batch, T tokens, E width, V vocabulary rows, M the first columns, which hold the prefix.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jrt.cache import LayerState, ModelState
from jrt.config import Config
from jrt.mixers import MIXERS, Reading
from jrt.mixers.attention import rotary_angles
from jrt.mixers.mamba import Mamba
from jrt.released.quirks import Quirks


class RMSNorm(nn.Module):
    """Root-mean-square norm of the fp32 residual stream, handed on in the dtype of the weights (arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        # Written out: on a CPU F.rms_norm makes more calls for the same result, and one-token steps are all calls.
        weight, width = self.weight, x.shape[-1]
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = torch.rsqrt(norm * norm * (1 / width) + self.eps)
        return (x * scale * weight).to(weight.dtype)


class MLP(nn.Module):
    """SwiGLU; the first projection has the values in its first half, the gates in its second (arXiv 2002.05202)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.width, 2 * config.mlp_width, bias="mlp.fc1" in config.biases)
        self.fc2 = nn.Linear(config.mlp_width, config.width, bias="mlp.fc2" in config.biases)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(value * F.silu(gate))


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)) where there is an MLP."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.width, config.norm_eps)
        self.mixer = MIXERS[config.pattern[layer]](config, layer)
        if config.mlp_width and config.pattern[layer] != "M":
            self.norm2 = RMSNorm(config.width, config.norm_eps)
            self.mlp = MLP(config)

    def forward(self, x: Tensor, reading: Reading, state: LayerState | None) -> tuple[Tensor, LayerState]:
        y, state = self.mixer(self.norm1(x), reading, state)
        x = x + y
        if hasattr(self, "mlp"):
            x = x + self.mlp(self.norm2(x))
        return x, state


class LanguageModel(nn.Module):
    """Reads tokens into states and gives what comes next; `jrt.modeling_jrt.JRTForCausalLM` wraps it for transformers."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_rows, config.width)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(len(config.pattern)))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.head = nn.Linear(config.width, config.vocab_rows, bias=False)
        if config.decay_const is not None:
            self.register_buffer("log_decay", released_decay(config.decay_const, config.linear_heads))
        if config.tied:
            self.head.weight = self.embedding.weight

    def forward(
        self, input_ids: Tensor, prefix_length: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Logits (B, T, V) of a whole text, read from nothing; arguments as in `read`."""
        hidden, _ = self.read(input_ids, prefix_length=prefix_length, attention_mask=attention_mask)
        return self.head(hidden)

    def read(
        self,
        input_ids: Tensor,
        *,
        state: ModelState | None = None,
        attention_mask: Tensor | None = None,
        prefix_length: Tensor | None = None,
        blank_length: Tensor | None = None,
        quirks: Quirks = Quirks(),
    ) -> tuple[Tensor, ModelState]:
        """Hidden states (B, T, E) before the head, and the state after the last token.

        Args:
            input_ids: (B, T).
            state: what was read before; None starts a text, and only then is a prefix encoded.
            attention_mask: (B, T) bool, False for padding, which must stand to the left; None: no padding.
            prefix_length: (B,) how many of its first own tokens each row's encoder reads; None: what fits enc_length.
            blank_length: (B,) how many of each row's first own tokens are short-prompt pads (`jrt.short_prompts`).
            quirks: what to compute as the release does.

        Raises:
            ValueError: `state` is from another model.
        """
        batch, length = input_ids.shape
        if state is None:
            past = torch.zeros(batch, dtype=torch.long, device=input_ids.device)
        else:
            state.check(self.config, batch)
            past = state.lengths
        reading = self._reading(length, past, attention_mask, prefix_length, blank_length, quirks, starts=state is None)
        x = self.embedding(input_ids)
        x = x.to(torch.promote_types(x.dtype, torch.float32))  # the residual stream is never kept in half precision
        layers = []
        for index, block in enumerate(self.blocks):
            x, layer = block(x, reading, None if state is None else state.layers[index])
            layers.append(layer)
        seen = length + (0 if state is None else state.seen)
        return self.norm(x), ModelState(self.config, layers, seen, reading.positions[:, -1] + 1)

    def _reading(self, length, past, mask, prefix_length, blank_length, quirks, starts) -> Reading:
        """Turns lengths into what the mixers need, as cheaply as the case allows (None wherever everything counts)."""
        columns = torch.arange(length, device=past.device)
        released_mask = None
        if mask is not None and quirks.blank_padding:
            mask, released_mask = None, mask  # the release reads pads as tokens with blanked keys
        if mask is None:
            positions = past[:, None] + columns  # (B, T)
        else:
            positions = past[:, None] + mask.long().cumsum(1) - 1
        own = positions  # counts from a row's first token that is no padding, whether padding is read or not
        if released_mask is not None:
            own = positions - released_mask.long().argmax(1, keepdim=True)
        rotates = self.config.rotary_dim > 0 and self.config.has("AS")
        encodes = starts and self.config.has("P")
        prefix_end, prefix_mask, blank = 0, None, None
        if encodes:
            if prefix_length is None:
                prefix_end = min(self.config.enc_length, length) if mask is None else length
                prefix_mask = None if mask is None else mask & (positions < self.config.enc_length)
            else:
                prefix_end, prefix_mask = length, own < prefix_length[:, None]
                prefix_mask = prefix_mask if mask is None else prefix_mask & mask
                if released_mask is not None:
                    prefix_mask &= positions < self.config.enc_length
            if blank_length is not None and self.config.encoder_mask:
                blank = (own >= 0) & (own < blank_length[:, None])
                blank = blank if mask is None else blank & mask
            elif released_mask is not None and self.config.encoder_mask and length <= self.config.enc_length:
                blank = ~released_mask
        return Reading(
            past=past,
            positions=positions,
            mask=mask,
            blank=blank,
            prefix_end=prefix_end,
            prefix_mask=prefix_mask,
            rotary=rotary_angles(positions, self.config.rotary_dim) if rotates else None,
            log_decay=self.log_decay if self.config.decay_const is not None else None,
            quirks=quirks,
        )

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draws all weights, as the release trained them (original_spec section 5).

        | tensor                                | distribution                                            |
        |---------------------------------------|---------------------------------------------------------|
        | embedding, linear weights             | N(0, 0.02)                                              |
        | out_proj, fc2                         | N(0, 0.02 / sqrt(2 x layers))                           |
        | biases; norms                         | 0; 1                                                    |
        | filters of C                          | uniform, as nn.Conv1d                                   |
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


def released_decay(decay_const: float, heads: int) -> Tensor:
    """log gamma_h = log(1 - 2^(decay_const - h)), fp32 (H,) (original_spec 4.3)."""
    return torch.log(1 - torch.exp2(decay_const - torch.arange(heads, dtype=torch.float32)))


def _init_mamba(mixer: Mamba, layers: int, generator: torch.Generator | None) -> None:
    """The table's last three rows (arXiv 2312.00752, section 3.6; the released settings)."""
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
