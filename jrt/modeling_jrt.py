"""The models as transformers knows them: cache, `forward` and `generate`.

Importing this module registers the model class; `jrt.configuration_jrt` does so as soon as a configuration is made, so that
AutoModelForCausalLM loads a folder that `save_pretrained` wrote after nothing but `import jrt`.

Shapes: B batch, T tokens of a call, V vocabulary rows.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation import (
    GenerateDecoderOnlyOutput,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import CausalLMOutputWithPast

from jrt.cache import ModelState
from jrt.configuration_jrt import JRTConfig
from jrt.decoding import loop
from jrt.decoding.session import Sessions
from jrt.inputs import check_ids, check_labels, check_lengths, check_tensor, own_mask
from jrt.objective import IGNORED, mean_loss
from jrt.padded_prompts import PaddedLanguageModel
from jrt.released.quirks import Quirks
from jrt.short_prompts import fill_short_prompts

# transformers 5.24 gave this argument and output a new name; `forward` and `generate` here take both.
CACHE = "cache" if "cache" in {f.name for f in dataclasses.fields(CausalLMOutputWithPast)} else "past_key_values"

log = logging.getLogger(__name__)


class RecurrentCache(Cache):
    """transformers' cache interface around one `ModelState`."""

    is_compileable = is_croppable = False
    is_linear = (False,)  # to `generate`: continuing takes the new tokens only, as many as `get_seq_length` leaves

    def __init__(self, state: ModelState | None = None) -> None:
        super().__init__(layers=[])
        self.state = state

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0 if self.state is None else self.state.seen

    def get_max_length(self) -> int | None:
        return None

    get_max_cache_shape = get_max_length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.state = self.state.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.state = self.state.repeat(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.state = self.state.select(indices)

    def reset(self) -> None:
        self.state = None

    def crop(self, max_length: int) -> None:
        raise ValueError("a recurrent state cannot be cropped: it does not keep the tokens apart")


class VocabularyRows(LogitsProcessor):
    """Keeps decoding away from embedding rows that stand for no token."""

    looks_at_scores_only = True  # so that `jrt.decoding` may capture it

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.index_fill(1, torch.arange(self.tokens, scores.shape[1], device=scores.device), float("-inf"))


class JRTForCausalLM(PreTrainedModel, GenerationMixin):
    """Any `jrt.Config` as a transformers causal language model.

    A row's output never depends on its padding (to the left) or its batch neighbours. Reading a prompt and decoding
    equals the full forward at the same `prefix_length`. A configuration with `quirks` makes a subclass that gives this
    up where the original release did.
    """

    config_class = JRTConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _is_stateful = True
    _tied_weights_keys: ClassVar[dict[str, str]] = {"model.head.weight": "model.embedding.weight"}
    _no_split_modules: ClassVar[list[str]] = ["Block"]
    computes_quirks: ClassVar[bool] = False

    def __new__(cls, config: JRTConfig | None = None) -> Self:
        """The subclass that computes quirks where the configuration has any, as `pathlib.Path()` is a `PosixPath`."""
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
        self.tokens = config.vocab_tokens  # rows of the vocabulary that `generate` chooses from
        self.model = self.language_model()
        self.sessions = Sessions()  # of decoding
        self.post_init()
        if self.model.embedding.weight.device.type != "meta":  # from_pretrained builds on meta and fills from the file
            self.model.init_weights()

    def language_model(self) -> PaddedLanguageModel:
        """The model without weights."""
        return PaddedLanguageModel(self.core)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.model.embedding

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.model.head

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: RecurrentCache | None = None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        prefix_length: Tensor | None = None,
        blank_length: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: RecurrentCache | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast | tuple:
        """Reads tokens on top of `past_key_values`.

        Args:
            input_ids: (B, T).
            attention_mask: (B, T) or (B, tokens seen + T); 0 is padding, to the left of a row's tokens.
            past_key_values: the cache that an earlier call returned; it is moved on in place.
            use_cache: return a cache; by default outside training.
            labels: (B, T) ids as in `input_ids`, -100 where nothing counts; shifted here. Padding and each row's first
                token are left out, and those inside a prefix, because the encoder has read them.
            prefix_length: (B,) tokens of each row that the prefix encoder reads, at most enc_length, on the first call;
                None: as many of its own as enc_length allows.
            blank_length: (B,) tokens at each row's start that fill up a short prompt (set by `generate`).
            logits_to_keep: compute logits of the last so many tokens only; 0: all.
            cache: `past_key_values` under the name that transformers gives it from 5.24 on.

        Returns:
            logits (B, T, V) with all padded vocabulary rows, loss, and the cache; a tuple with `return_dict=False`.

        Raises:
            ValueError: the inputs do not fit; the message says what was expected.
        """
        if kwargs.get("inputs_embeds") is not None:
            raise ValueError("inputs_embeds is not supported: pass input_ids")
        for name in ("output_hidden_states", "output_attentions"):
            if kwargs.get(name):
                raise ValueError(f"{name} is not supported: call the layers of `model.model.blocks`, or hook them")
        cache = _one_cache(past_key_values, cache)
        state = _state_of(cache)
        input_ids = check_ids(input_ids, self.core.vocab_rows, is_step=state is not None)
        mask = self.own_tokens(attention_mask, input_ids, state)
        if state is None:
            self._check_prefix(prefix_length, input_ids, mask)
            check_lengths("blank_length", blank_length, input_ids, None)
        hidden, state = self.model.read(
            input_ids, state=state, attention_mask=mask, prefix_length=prefix_length, blank_length=blank_length
        )
        if isinstance(logits_to_keep, int) and logits_to_keep > 0:
            hidden = hidden[:, -logits_to_keep:]
        elif torch.is_tensor(logits_to_keep):
            hidden = hidden[:, logits_to_keep]
        logits = self.model.head(hidden)  # (B, T, V)
        loss = None if labels is None else self._loss(logits, labels, prefix_length, state)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache:
            cache = RecurrentCache() if cache is None else cache
            cache.state = state
        output = CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache if use_cache else None})
        return output.to_tuple() if kwargs.get("return_dict") is False else output

    def own_tokens(self, attention_mask: Tensor | None, input_ids: Tensor, state: ModelState | None) -> Tensor | None:
        """(B, T) bool, False for padding among the tokens of this call; None where none is."""
        return own_mask(attention_mask, input_ids, 0 if state is None else state.seen)

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        attention_mask: Tensor | None = None,
        short_prompt: str | None = None,
        prefix_length: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' `generate`, after prompts shorter than the prefix encoder were filled up.

        Args:
            inputs: (B, T) prompt ids, padded on the left; `input_ids` is the same.
            attention_mask: (B, T); 0 is padding; None: every token counts.
            short_prompt: a key of `jrt.short_prompts.SHORT_PROMPTS`; None takes the model's own rule. Other models have no
                encoder to fill and accept "none" only.
            prefix_length: (B,) tokens of each row that the prefix encoder reads, in place of a rule.
            **kwargs: as in transformers.

        Returns:
            What transformers returns; sequences start with the prompts as they were given.
        """
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        if input_ids is None:
            raise ValueError("generate needs input_ids (B, T): an empty prompt has nothing to go on from")
        past = _one_cache(kwargs.pop("past_key_values", None), kwargs.pop("cache", None))
        if past is not None:
            kwargs[CACHE] = past
        goes_on, encodes = _state_of(past) is not None, self.core.has("P")
        check_ids(input_ids, self.core.vocab_rows, is_step=goes_on)
        mask = self.prompt_mask(attention_mask, input_ids)
        if self.tokens < self.core.vocab_rows:
            processors = LogitsProcessorList(kwargs.pop("logits_processor", None) or [])
            kwargs["logits_processor"] = LogitsProcessorList([*processors, VocabularyRows(self.tokens)])
        if not encodes and short_prompt not in (None, "none"):
            raise ValueError(
                f"short_prompt={short_prompt!r}: this model has no prefix encoder; expected None or 'none'"
            )
        if goes_on or not encodes:
            return super().generate(input_ids, attention_mask=mask, **kwargs)
        own = own_mask(mask, input_ids, seen=0)
        self._check_prefix(prefix_length, input_ids, own)
        if prefix_length is not None and short_prompt not in (None, "none"):
            raise ValueError(f"prefix_length says what is encoded, and so does short_prompt={short_prompt!r}: give one")
        rule = self.config.short_prompt if short_prompt is None else short_prompt
        prompt = fill_short_prompts(
            input_ids,
            torch.ones_like(input_ids, dtype=torch.bool) if own is None else own,
            self.core.enc_length,
            rule if prefix_length is None else "none",
            self.config.short_prompt_token,
        )
        if prefix_length is not None:
            prompt = dataclasses.replace(prompt, prefix_length=prefix_length)
        added = prompt.input_ids.shape[1] - input_ids.shape[1]
        if added:
            kwargs |= self._longer_limits(kwargs, added)
        for name in ("prefix_length", "blank_length"):
            if getattr(prompt, name) is not None:
                kwargs[name] = getattr(prompt, name)
        if prompt.prefix_length is None:
            kwargs["use_cache"] = False
        output = super().generate(prompt.input_ids, attention_mask=prompt.attention_mask.long(), **kwargs)
        return _with_given_prompts(output, input_ids, prompt.input_ids.shape[1])

    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: BaseStreamer | None = None,
        **model_kwargs,
    ) -> GenerateDecoderOnlyOutput | Tensor:
        """Greedy and sampled decoding: by `jrt.decoding`, or by transformers' loop where that names a reason."""
        arguments = (input_ids, logits_processor, stopping_criteria, generation_config)
        reason = loop.unsupported(
            self.model, self.sessions, input_ids, stopping_criteria, generation_config, model_kwargs, synced_gpus
        )
        if reason is None:
            return loop.decode(self, self.model, self.sessions, *arguments, streamer, model_kwargs)
        log.debug("decoding by transformers' loop: %s", reason)
        return super()._sample(*arguments, synced_gpus=synced_gpus, streamer=streamer, **model_kwargs)

    def prompt_mask(self, attention_mask: Tensor | None, input_ids: Tensor) -> Tensor:
        """The mask (B, T) of `generate`'s prompts, 0 for padding."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        check_tensor("attention_mask", mask, "a tensor (B, T)")
        if mask.shape != input_ids.shape:
            raise ValueError(f"attention_mask has shape {tuple(mask.shape)}; expected {tuple(input_ids.shape)}")
        return mask

    def _longer_limits(self, given: dict, added: int) -> dict[str, int]:
        """The limits of `generate` that count the prompt, for one that is `added` tokens longer than the caller knows."""
        settings = given.get("generation_config") or self.generation_config

        def limit(name: str) -> int | None:
            return given[name] if given.get(name) is not None else getattr(settings, name)

        longer = {name: limit(name) + added for name in ("max_length", "min_length") if limit(name)}
        if limit("max_new_tokens") is not None:
            longer.pop("max_length", None)
        elif "max_length" not in longer:
            longer["max_new_tokens"] = 20  # transformers' default, which counts the prompt as it is now
        return longer

    def _check_prefix(self, prefix_length: Tensor | None, input_ids: Tensor, mask: Tensor | None) -> None:
        most = self.core.enc_length if self.core.has("P") else None
        check_lengths("prefix_length", prefix_length, input_ids, mask, most)

    def _loss(self, logits: Tensor, labels: Tensor, prefix_length: Tensor | None, state: ModelState) -> Tensor:
        check_labels(labels, logits.shape[:2], self.core.vocab_rows)
        own = state.lengths[:, None]  # (B, 1)
        position = own - labels.shape[1] + torch.arange(labels.shape[1], device=labels.device)  # (B, T)
        first: int | Tensor = 1  # nothing but padding stands before a row's first token
        if self.core.has("P"):
            prefix = own.clamp(max=self.core.enc_length) if prefix_length is None else prefix_length[:, None]
            first = prefix.clamp(min=1)
        counted = labels.long().masked_fill(position < first, IGNORED)
        if self.core.has("P") and bool((counted == IGNORED).all()) and bool((labels != IGNORED).any()):
            raise ValueError("all labels lie in the prefix, which the encoder has read: pass a shorter prefix_length")
        return mean_loss(logits[:, :-1], counted[:, 1:])


def _state_of(cache: object) -> ModelState | None:
    """The state in a cache; raises ValueError for a cache that is not ours."""
    if cache is None:
        return None
    if not isinstance(cache, RecurrentCache):
        kind = type(cache).__name__
        raise ValueError(f"past_key_values is a {kind}; expected the RecurrentCache that an earlier call returned")
    return cache.state


def _one_cache(past_key_values: RecurrentCache | None, cache: RecurrentCache | None) -> RecurrentCache | None:
    if past_key_values is not None and cache is not None:
        raise ValueError("cache and past_key_values are two names of one argument: give one")
    return past_key_values if cache is None else cache


def _with_given_prompts(output, input_ids: Tensor, filled: int):
    """Sequences that start with the prompts as they came in, instead of the filled ones."""
    sequences = output if torch.is_tensor(output) else output.sequences
    given = input_ids.repeat_interleave(sequences.shape[0] // input_ids.shape[0], dim=0)
    sequences = torch.cat([given.to(sequences.device), sequences[:, filled:]], dim=1)
    if torch.is_tensor(output):
        return sequences
    output.sequences = sequences
    return output


AutoModelForCausalLM.register(JRTConfig, JRTForCausalLM, exist_ok=True)
