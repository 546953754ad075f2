"""How the next token of each row is chosen: as in transformers' greedy and sampled decoding, without waiting for the
device.

Shapes: B rows, T columns so far, V vocabulary rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import generation
from transformers.generation import EosTokenCriteria, GenerationConfig, LogitsProcessorList, StoppingCriteriaList

# Processors that a CUDA graph may contain: they use the scores only, never read a value back to the host, and their
# attributes are numbers, which identify a captured graph.
CAPTURED = (
    generation.EpsilonLogitsWarper,
    generation.LogitNormalization,
    generation.MinPLogitsWarper,
    generation.TemperatureLogitsWarper,
    generation.TopKLogitsWarper,
    generation.TopPLogitsWarper,
    generation.TypicalLogitsWarper,
)


@dataclass
class Choice:
    """The rule by which one `generate` call chooses tokens."""

    processors: LogitsProcessorList
    do_sample: bool
    pads: bool  # whether rows that have ended are continued with the pad token
    end_tokens: Tensor | None  # (n,) int64 ids that end a row; None: no id does
    pad_token: Tensor | None  # int64 id

    @classmethod
    def of(
        cls,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        config: GenerationConfig,
        device: torch.device,
    ) -> Choice:
        """The rule for the given arguments of `_sample`."""
        ends = [torch.as_tensor(c.eos_token_id).flatten().to(device) for c in criteria if type(c) is EosTokenCriteria]
        pads = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        pad_token = config._pad_token_tensor
        pad_token = pad_token.to(device) if pads and pad_token is not None else None
        return cls(processors, bool(config.do_sample), pads, torch.cat(ends) if ends else None, pad_token)

    def is_of_the_likeliest(self) -> bool:
        """Whether the choice is simply the token with the largest logit."""
        return not self.do_sample and len(self.processors) == 0

    def pick(self, scores: Tensor) -> Tensor:
        """The chosen tokens (B,): the most likely ones, or drawn at random; scores: (B, V)."""
        if self.do_sample:
            return torch.multinomial(torch.softmax(scores, dim=-1), num_samples=1).squeeze(1)
        return torch.argmax(scores, dim=-1)

    def padded(self, tokens: Tensor, unfinished: Tensor) -> Tensor:
        """The tokens (B,), replaced by the pad token in rows that have ended; unfinished: (B,) bool."""
        if not self.pads:
            return tokens
        assert self.pad_token is not None
        return torch.where(unfinished, tokens, self.pad_token)

    def key(self) -> tuple | None:
        """Identifies the CUDA graphs that serve this choice. None: a processor may use the host, so no graph can
        contain it."""
        ends = 0 if self.end_tokens is None else self.end_tokens.shape[0]
        parts: list[object] = [self.do_sample, self.pads, ends]
        for processor in self.processors:
            if type(processor) not in CAPTURED and not getattr(processor, "looks_at_scores_only", False):
                return None
            parts.append((type(processor), tuple(sorted(vars(processor).items()))))
        return tuple(parts)
