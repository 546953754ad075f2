"""The model class for transformers: `forward` and `generate`. Importing this module registers the class with
AutoModelForCausalLM, and the first `JRTConfig` imports it (`jrt.configuration_jrt`).

Shapes: B batch, T tokens of a call, V vocabulary rows.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.generation import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import CausalLMOutputWithPast

from jrt.cache import ModelState
from jrt.configuration_jrt import IN_PACKAGE, JRTConfig
from jrt.decoding.loop import decode, unsupported
from jrt.decoding.session import Sessions
from jrt.inputs import (
    check_counts,
    check_going_on,
    check_ids,
    check_labels,
    check_lengths,
    check_sizes,
    check_tensor,
    check_unknown,
    own_mask,
)
from jrt.mixers import TokenBatch
from jrt.model import LanguageModel, recorded
from jrt.packed_rows import DESCRIPTIONS, LONGEST, documents_of
from jrt.recurrent_cache import CACHE, RecurrentCache, one_cache, state_of
from jrt.released.quirks import Quirks
from jrt.short_prompts import PADDED_MIXERS, Prompt, check_short_prompt, fill_short_prompts, padded
from jrt.training.objective import IGNORED, mean_loss

log = logging.getLogger(__name__)


class VocabularyRows(LogitsProcessor):
    """Forbids decoding to choose the embedding's padding rows, which stand for no token."""

    looks_at_scores_only = True  # tells `jrt.decoding.choice` that a CUDA graph may contain it

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.index_fill(1, torch.arange(self.tokens, scores.shape[1], device=scores.device), float("-inf"))


class JRTForCausalLM(PreTrainedModel, GenerationMixin):
    """Any `jrt.Config` as a transformers causal language model.

    A row's output never depends on its padding (which must stand on the left) or on the other rows. Reading a prompt
    and decoding equals one forward call on the whole text with the same `prefix_length`. If the configuration has
    `quirks`, the object is of a subclass, `jrt.released.modeling.ReleasedForCausalLM`, for which this need not hold.
    """

    config_class = JRTConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _is_stateful = True
    _tied_weights_keys = {"model.head.weight": "model.embedding.weight"}  # noqa: RUF012 (transformers declares it so)
    _no_split_modules = ["Block"]  # noqa: RUF012
    computes_quirks: ClassVar[bool] = False
    mixers: ClassVar[Mapping[str, type[nn.Module]]] = PADDED_MIXERS

    def __new__(cls, config: JRTConfig | None = None) -> Self:
        """Chooses the subclass that computes quirks if the configuration has any."""
        if config is None or cls.computes_quirks or not Quirks.from_dict(config.quirks).active():
            return super().__new__(cls)
        found = next((subclass for subclass in cls.__subclasses__() if subclass.computes_quirks), None)
        if found is None:
            raise ValueError(f"{cls.__name__} computes no quirks: expected none, got {config.quirks}")
        return super().__new__(found)

    def __init__(self, config: JRTConfig) -> None:
        super().__init__(config)
        self.core = config.core
        self.quirks = Quirks.from_dict(config.quirks)
        self.token_rows = config.vocab_tokens  # `generate` chooses from the first so many rows of the vocabulary
        # transformers ties the head itself after loading, and overlooks a head that is tied already.
        self.model = LanguageModel(dataclasses.replace(self.core, tied=False), self.mixers)
        self.model.config = self.core
        self.sessions = Sessions()  # prepared decoding steps
        self.post_init()
        if self.model.embedding.weight.device.type != "meta":  # on meta, from_pretrained fills in the weights
            self.model.init_weights()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.model.embedding

    def set_input_embeddings(self, value: torch.nn.Module) -> None:
        """An embedding with another number of rows changes the vocabulary; a tied head goes with it, any other head is set
        by `set_output_embeddings`. The width is not checked, as in transformers: the next forward pass needs the model's.

        Raises ValueError for a module without a table of weights."""
        weight = getattr(value, "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim != 2:
            raise ValueError(f"expected an embedding with a table of weights, got {type(value).__name__}")
        self.model.embedding = value
        if len(weight) != self.core.vocab_rows:
            self.config.vocab_size = self.config.vocab_tokens = self.token_rows = len(weight)
            self.core = self.model.config = self.config.core
            if self.core.tied:
                self.tie_weights()

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.model.head

    def set_output_embeddings(self, value: torch.nn.Module) -> None:
        """Raises ValueError for a head with a bias, which a saved model would lose."""
        if getattr(value, "bias", None) is not None:
            raise ValueError("expected a head without bias")
        self.model.head = value

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> torch.nn.Embedding:
        """As in transformers; afterwards `generate` may choose any of the `new_num_tokens` tokens."""
        check_sizes(new_num_tokens=new_num_tokens, pad_to_multiple_of=pad_to_multiple_of)
        tokens = self.token_rows if new_num_tokens is None else new_num_tokens
        embedding = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        self.config.vocab_tokens = self.token_rows = tokens
        self.core = self.model.config = self.config.core
        return embedding

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: RecurrentCache | None = None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        prefix_length: Tensor | None = None,
        blank_length: Tensor | None = None,
        short_prompt: str | None = None,
        prompt_columns: int | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: RecurrentCache | None = None,
        output_hidden_states: bool | None = None,
        num_items_in_batch: int | Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits of the tokens `input_ids`, which continue the text in `past_key_values` if there is one.

        Args:
            input_ids: (B, T).
            attention_mask: (B, T) or (B, columns seen + T); 0 is padding, which stands on the left of a row's tokens.
            past_key_values: the cache that an earlier call returned; it is updated in place.
            use_cache: return a cache; None: only outside training.
            labels: (B, T) ids as in `input_ids`, -100 where none counts; they are shifted here. Padding and each row's
                first token do not count, nor do tokens inside a prefix, because the encoder has read them.
            prefix_length: (B,) how many of each row's first own tokens the prefix encoder reads in the first call, at
                most enc_length; None: as many as there are, up to enc_length.
            blank_length: (B,) how many of each row's first own tokens are pads of the rule "pad" (`jrt.short_prompts`).
            short_prompt, prompt_columns: set by `generate`. The first `prompt_columns` columns are the prompt; it is
                filled up by this rule before it is read, and the logits are those of the filled text.
            logits_to_keep: compute the logits of the last so many tokens only; 0: of all.
            cache: `past_key_values` under its name from transformers 5.24 on.
            output_hidden_states: also return the residual stream before each block and, last, the head's input.
            num_items_in_batch: number of labels in the whole batch of which these rows are a part. The loss is then the
                sum over these rows divided by it, so that the losses of all parts add up to that of the whole batch.
            return_dict: False returns a tuple.
            **kwargs: `position_ids` (B, T), `cu_seq_lens_q` (N + 1,) or `seq_idx` (B, T) say where documents begin if
                rows hold several (`jrt.packed_rows`); each is then read by itself. `cu_seq_lens_k`, `max_length_q` and
                `max_length_k` must agree with them. Other arguments raise an error unless they are None, False, or
                without effect on these models (`jrt.inputs.HARMLESS`).

        Returns:
            logits (B, T, V), loss and cache. V includes the padding rows of the vocabulary.

        Raises:
            ValueError: the inputs do not fit; the message says what was expected.
        """
        check_counts(num_items_in_batch, logits_to_keep, labels)
        packing = {name: kwargs.pop(name, None) for name in (*DESCRIPTIONS, *LONGEST)}
        check_unknown(kwargs)
        cache = one_cache(past_key_values, cache)
        state = state_of(cache)
        input_ids = check_ids(input_ids, self.core.vocab_rows, is_step=state is not None)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        documents = documents_of(input_ids, attention_mask, None if state is None else state.lengths, packing)
        if documents is not None:
            if state is not None or use_cache:
                raise ValueError("rows of several documents leave no cache to go on from: pass use_cache=False")
            if blank_length is not None or short_prompt is not None or logits_to_keep != 0:
                raise ValueError("rows of several documents: expected no rule for prompts and all logits")
            alone = self.forward(
                documents.apart(input_ids, 0),
                documents.apart(torch.ones_like(input_ids), 0),
                use_cache=False,
                labels=None if labels is None else documents.apart(labels, IGNORED),
                prefix_length=prefix_length,
                output_hidden_states=output_hidden_states,
                num_items_in_batch=num_items_in_batch,
                return_dict=True,
            )
            assert isinstance(alone, CausalLMOutputWithPast) and alone.logits is not None
            alone.logits = documents.together(alone.logits, len(input_ids))
            if alone.hidden_states is not None:
                alone.hidden_states = tuple(documents.together(each, len(input_ids)) for each in alone.hidden_states)
            return alone.to_tuple() if return_dict is False else alone
        prompt = Prompt(input_ids, attention_mask, prefix_length, blank_length)
        if short_prompt is not None and state is None:
            prompt = self._filled(prompt, short_prompt, prompt_columns)
        batch = self.token_batch(prompt, state)
        with recorded(self.model.blocks if output_hidden_states else ()) as residuals:
            hidden, after = self.model.read_batch(prompt.input_ids, batch, state)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.model.head(hidden[:, kept])  # (B, T, V); slice(0, None) keeps all
        loss = None if labels is None else self._loss(logits, labels, prompt.prefix_length, after, num_items_in_batch)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        states = (*residuals, hidden) if output_hidden_states else None
        output = CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=states)
        if use_cache:
            cache = RecurrentCache() if cache is None else cache
            if state is None:
                # Columns by which a short prompt was filled up are not counted: `generate` does not know of them.
                after.seen = input_ids.shape[1]
            cache.state = after
            output[CACHE] = cache
        return output.to_tuple() if return_dict is False else output

    def token_batch(self, prompt: Prompt, state: ModelState | None) -> TokenBatch:
        """The `TokenBatch` that the layers get with this call's tokens; raises ValueError for inputs that do not
        fit."""
        mask = own_mask(prompt.attention_mask, prompt.input_ids, 0 if state is None else state.seen)
        if state is None:
            self.check_lengths(prompt, mask)
        batch = self.model.token_batch(prompt.input_ids, state, mask, prompt.prefix_length)
        if prompt.blank_length is None or batch.prefix is None or not self.core.encoder_mask:
            return batch
        return padded(batch, prompt.blank_length)

    def check_lengths(self, prompt: Prompt, mask: Tensor | None) -> None:
        """Raises ValueError for a length that exceeds the number of its row's own tokens; mask: (B, T) bool, or
        None."""
        most = self.core.enc_length if self.core.has("P") else None
        check_lengths("prefix_length", prompt.prefix_length, prompt.input_ids, mask, most)
        check_lengths("blank_length", prompt.blank_length, prompt.input_ids, None)

    def _filled(self, prompt: Prompt, rule: str, columns: int | None) -> Prompt:
        """The text, with the prompt in its first `columns` columns filled up by the rule; None: all columns are
        prompt."""
        ids, own = prompt.input_ids, own_mask(prompt.attention_mask, prompt.input_ids, seen=0)
        own = torch.ones_like(ids, dtype=torch.bool) if own is None else own  # (B, T)
        end = ids.shape[1] if columns is None else columns
        enc_length, pad = self.core.enc_length, self.config.short_prompt_token
        if rule == "pad" and not 0 <= pad < self.core.vocab_rows:
            raise ValueError(f"short_prompt_token {pad} is outside the vocabulary of {self.core.vocab_rows} rows")
        filled = fill_short_prompts(ids[:, :end], own[:, :end], enc_length, rule, pad)
        return filled.followed_by(ids[:, end:], own[:, end:])

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        attention_mask: Tensor | None = None,
        short_prompt: str | None = None,
        prefix_length: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' `generate`; prompts shorter than the prefix encoder are filled up before they are read.

        Args:
            inputs: (B, T) prompt ids, padded on the left; `input_ids` is another name for it.
            attention_mask: (B, T); 0 is padding; None: no padding.
            short_prompt: a key of `jrt.short_prompts.SHORT_PROMPTS`; None takes the model's own rule. Models without a
                prefix encoder accept "none" only.
            prefix_length: (B,) how many tokens of each row the prefix encoder reads; the prompt is then not filled up.
            **kwargs: as in transformers. With `past_key_values`, the prompt is the whole text: its first columns are
                those that the cache has read, and at least one more follows.

        Returns:
            What transformers returns; tokens that were filled in are not part of it.

        Raises:
            ValueError: the inputs do not fit; the message says what was expected.
        """
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        if input_ids is None:
            raise ValueError("generate needs input_ids (B, T): an empty prompt has nothing to go on from")
        past = one_cache(kwargs.pop("past_key_values", None), kwargs.pop("cache", None))
        if past is not None:
            kwargs[CACHE] = past
        goes_on, encodes = state_of(past) is not None, self.core.has("P")
        check_ids(input_ids, self.core.vocab_rows, is_step=goes_on)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        check_tensor("attention_mask", mask, "a tensor (B, T)")
        if mask.shape != input_ids.shape:
            raise ValueError(f"attention_mask has shape {tuple(mask.shape)}; expected {tuple(input_ids.shape)}")
        if self.token_rows < self.core.vocab_rows:
            processors = LogitsProcessorList(kwargs.pop("logits_processor", None) or [])
            kwargs["logits_processor"] = LogitsProcessorList([*processors, VocabularyRows(self.token_rows)])
        rule = self.config.short_prompt if short_prompt is None else short_prompt
        check_short_prompt(rule)
        if not encodes and short_prompt not in (None, "none"):
            raise ValueError(
                f"short_prompt={short_prompt!r}: this model has no prefix encoder; expected None or 'none'"
            )
        if encodes and prefix_length is not None:
            if short_prompt not in (None, "none"):
                raise ValueError(f"prefix_length and short_prompt={short_prompt!r} both say what is encoded: give one")
            kwargs["prefix_length"] = prefix_length
        elif encodes and rule == "iterate":
            kwargs["use_cache"] = False
        elif encodes:
            kwargs |= {"short_prompt": rule, "prompt_columns": input_ids.shape[1]}
        if past is not None and goes_on:
            check_going_on(input_ids, past.get_seq_length(), kwargs.get("use_cache"))
            kwargs["use_cache"] = True
        return super().generate(input_ids, attention_mask=mask, **kwargs)

    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: BaseStreamer | None = None,
        **model_kwargs: Any,
    ) -> Any:
        """Greedy and sampled decoding: by `jrt.decoding`, or by transformers' loop if `unsupported` gives a reason."""
        arguments = (input_ids, logits_processor, stopping_criteria, generation_config)
        reason = unsupported(
            self.model, self.sessions, input_ids, stopping_criteria, generation_config, model_kwargs, synced_gpus
        )
        if reason is None:
            return decode(self, self.model, self.sessions, *arguments, streamer, model_kwargs)
        log.debug("decoding by transformers' loop: %s", reason)
        rest = {"synced_gpus": synced_gpus, "streamer": streamer, **model_kwargs}
        return super()._sample(*arguments, **rest)  # type: ignore[misc,arg-type]  # GenerationMixin's types

    def _loss(
        self,
        logits: Tensor,
        labels: Tensor,
        prefix_length: Tensor | None,
        state: ModelState,
        num_items_in_batch: int | Tensor | None,
    ) -> Tensor:
        check_labels(labels, logits.shape[:2], self.core.vocab_rows)
        own = state.lengths[:, None]  # (B, 1)
        position = own - labels.shape[1] + torch.arange(labels.shape[1], device=labels.device)  # (B, T)
        first: int | Tensor = 1  # a row's first token (position 0) follows only padding, so nothing can predict it
        if self.core.has("P"):
            prefix = own.clamp(max=self.core.enc_length) if prefix_length is None else prefix_length[:, None]
            first = prefix.clamp(min=1)
        counted = labels.long().masked_fill(position < first, IGNORED)
        if self.core.has("P") and bool((counted == IGNORED).all()) and bool((labels != IGNORED).any()):
            raise ValueError("all labels lie in the prefix, which the encoder has read: pass a shorter prefix_length")
        return mean_loss(logits[:, :-1], counted[:, 1:], num_items_in_batch)


if IN_PACKAGE:
    AutoModelForCausalLM.register(JRTConfig, JRTForCausalLM, exist_ok=True)
