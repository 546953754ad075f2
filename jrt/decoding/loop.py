"""transformers' loop of greedy and sampled decoding, with the steps of `jrt.decoding` in place of `forward` calls.

It returns what `GenerationMixin._sample` returns: the same tokens, scores and cache. If the choice of tokens is
captured in the CUDA graph, the host reads end tokens only every `session.RUN` steps. Tokens decoded after the end are
dropped.

Shapes: B rows, T prompt columns, L the most columns of the text, V vocabulary rows.
"""

from __future__ import annotations

import logging
from typing import Any, cast

import torch
from torch import Tensor
from transformers.generation import (
    EosTokenCriteria,
    GenerateDecoderOnlyOutput,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from jrt.decoding.choice import Choice
from jrt.decoding.session import RUN, CapturedSession, Sessions
from jrt.decoding.step import filled_columns
from jrt.mixers import MIXERS
from jrt.model import LanguageModel
from jrt.recurrent_cache import CACHE
from jrt.short_prompts import PADDED_MIXERS

FEWEST = 16  # with fewer new tokens, capturing a CUDA graph takes longer than it saves
MOST = 1 << 18  # columns: full attention's buffers are allocated for the limit, which often means "until an end token"
STEPPED = {*MIXERS.values(), *PADDED_MIXERS.values()}  # the mixers that a `Step` can compute

log = logging.getLogger(__name__)


def unsupported(
    model: LanguageModel,
    sessions: Sessions,
    input_ids: Tensor,
    criteria: StoppingCriteriaList,
    config: GenerationConfig,
    model_kwargs: dict[str, Any],
    synced_gpus: bool,
) -> str | None:
    """The reason why transformers' own loop has to run this call of `_sample`; None if `decode` can.

    model: the language model inside; sessions: its prepared steps; the other arguments are those of `_sample`."""
    length = criteria.max_length
    if length is None:
        return "no limit to the length: states of a fixed size need one"
    if length > MOST:
        return f"a limit of {length} columns, and states of a fixed size have at most {MOST}"
    if not model_kwargs.get("use_cache"):
        return "use_cache is off"
    if synced_gpus or config.is_assistant or config.prefill_chunk_size is not None:
        return "synced GPUs, an assistant model or a prefill in chunks"
    if config.output_hidden_states or config.output_attentions:
        return "hidden states or attentions are wanted: a step keeps none"
    if input_ids.device != model.embedding.weight.device or input_ids.device.type not in ("cpu", "cuda"):
        return f"input_ids on {input_ids.device}, the model on {model.embedding.weight.device}"
    if torch.is_autocast_enabled(input_ids.device.type):
        return "autocast is on: a step computes in the dtype of the weights"
    if len({tensor.device for tensor in model.parameters()}) > 1:
        return "the model is spread over several devices"
    for block in model.blocks:
        if type(block.mixer) not in STEPPED:
            return f"no step for {type(block.mixer).__name__}"
    if any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()):
        return "a module has forward hooks"
    few = input_ids.is_cuda and length - input_ids.shape[1] < FEWEST
    if few and sessions.find(model, input_ids.shape[0], length) is None:
        return f"fewer than {FEWEST} new tokens: capturing a step would take longer"
    return None


def decode(
    wrapper: Any,
    model: LanguageModel,
    sessions: Sessions,
    input_ids: Tensor,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    config: GenerationConfig,
    streamer: BaseStreamer | None,
    model_kwargs: dict[str, Any],
) -> GenerateDecoderOnlyOutput | Tensor:
    """Does what `GenerationMixin._sample` does, for calls for which `unsupported` returns None.

    Args:
        wrapper: the transformers model, a GenerationMixin, which reads the prompt.
        model: the language model inside, which decodes.
        sessions: the steps that earlier calls prepared for this model.
        input_ids: (B, T).
        processors, criteria, config, streamer, model_kwargs: the arguments of `_sample`.

    Returns:
        The ids (B, T + new), or with `config.return_dict_in_generate` transformers' output class.
    """
    text = Text(input_ids, processors, criteria, config, streamer)
    is_given = model_kwargs.get(CACHE) is not None
    outputs = wrapper._prefill(input_ids, config, model_kwargs, is_first_iteration=True)
    cache, logits = outputs[CACHE], outputs.logits[:, -1].to(copy=True, dtype=torch.float32)
    del outputs
    text.add(logits)
    is_kept = is_given or config.return_dict_in_generate
    if not text.is_done():
        rows, length = input_ids.shape[0], text.ids.shape[1] + filled_columns(cache.state)
        session = sessions.find(model, rows, length) or sessions.make(model, rows, length)
        waits = "the cache is wanted" if is_kept else text.reason_to_wait()
        runs_ahead = isinstance(session, CapturedSession) and waits is None
        if isinstance(session, CapturedSession):
            if waits is not None:
                log.debug("the host chooses each token: %s", waits)
            session.prepare(text.choice if runs_ahead else None)
        session.start(cache.state)
        if not is_kept:
            cache.state = None  # frees its memory: the session has a copy
        if isinstance(session, CapturedSession) and runs_ahead:
            text.run(session)
        else:
            while not text.is_done():
                text.add(session.read(text.last()).float())
        if is_kept:
            cache.state = session.step.export()
    if streamer is not None:
        streamer.end()
    if not config.return_dict_in_generate:
        return text.sequences().contiguous()
    fields: dict[str, Any] = {"sequences": text.sequences().contiguous(), "scores": text.scores, "logits": text.logits}
    return GenerateDecoderOnlyOutput(**fields, **{CACHE: cache})


class Text:
    """A batch of texts, to which each step adds a token a row."""

    def __init__(
        self,
        input_ids: Tensor,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        config: GenerationConfig,
        streamer: BaseStreamer | None,
    ) -> None:
        rows, self.columns = input_ids.shape
        self.prompt = self.columns
        assert criteria.max_length is not None
        self.limit: int = criteria.max_length
        length = max(self.limit, self.columns + 1)
        self.ids = torch.zeros(rows, length, dtype=torch.long, device=input_ids.device)  # (B, L)
        self.ids[:, : self.columns] = input_ids
        self.choice = Choice.of(processors, criteria, config, input_ids.device)
        self.criteria, self.streamer = criteria, streamer
        self.unfinished = torch.ones(rows, dtype=torch.bool, device=input_ids.device)
        wants = config.return_dict_in_generate
        self.scores: tuple[Tensor, ...] | None = () if wants and config.output_scores else None
        self.logits: tuple[Tensor, ...] | None = () if wants and config.output_logits else None
        # If only end tokens and the length end a text, the host need not check after each step.
        self.ends_simply = all(type(criterion) in (MaxLengthCriteria, EosTokenCriteria) for criterion in criteria)

    def reason_to_wait(self) -> str | None:
        """The reason why the host has to see each token before the next step; None if it need not."""
        if self.streamer is not None:
            return "a streamer gets each token"
        if self.scores is not None or self.logits is not None:
            return "scores or logits are wanted"
        if not self.ends_simply:
            return "a stopping criterion of the caller's"
        if self.choice.key() is None:
            return "a logits processor that may look at the host"
        return None

    def add(self, logits: Tensor) -> None:
        """Chooses the next token of each row from logits (B, V) fp32, which may be overwritten."""
        if self.logits is not None:
            self.logits += (logits.clone(),)
        scores = self.choice.processors(cast(torch.LongTensor, self.sequences()), cast(torch.FloatTensor, logits))
        if self.scores is not None:
            self.scores += (scores,)
        tokens = self.choice.padded(self.choice.pick(scores), self.unfinished)
        self.ids[:, self.columns] = tokens
        self.columns += 1
        if self.streamer is not None:
            self.streamer.put(tokens.cpu())
        if not self.ends_simply or self.choice.end_tokens is not None:
            self.unfinished = self.unfinished & ~self.criteria(self.sequences(), self.scores)

    def run(self, session: CapturedSession) -> None:
        """Decodes to the end; the host checks for end tokens after every RUN steps."""
        while not self.is_done():
            steps = min(RUN, self.limit - self.columns)
            tokens, self.unfinished = session.run(self.choice, self.last(), self.unfinished, steps)
            self.ids[:, self.columns : self.columns + steps] = tokens
            self.columns += steps
        if self.choice.end_tokens is not None:
            new = self.ids[:, self.prompt : self.columns]
            ends = torch.isin(new, self.choice.end_tokens)  # (B, new)
            first = torch.where(ends.any(1), ends.int().argmax(1) + 1, new.shape[1])  # (B,) new tokens of each row
            self.columns = self.prompt + int(first.max())

    def is_done(self) -> bool:
        """Whether all rows have ended, or the length limit is reached."""
        if self.columns >= self.limit:
            return True
        may_end = not self.ends_simply or self.choice.end_tokens is not None
        return may_end and not bool(self.unfinished.any())

    def last(self) -> Tensor:
        """(B,) the newest tokens."""
        return self.ids[:, self.columns - 1]

    def sequences(self) -> Tensor:
        """(B, columns) prompts and new tokens."""
        return self.ids[:, : self.columns]
