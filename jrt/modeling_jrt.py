"""The models as transformers knows them: cache, `forward` and `generate`.

Importing this module registers the model class; `jrt.configuration_jrt` does so as soon as a configuration is made, so that
AutoModelForCausalLM loads a folder that `save_pretrained` wrote after nothing but `import jrt`.

Shapes: B batch, T tokens of a call, V vocabulary rows.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import ClassVar

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation import LogitsProcessor, LogitsProcessorList
from transformers.modeling_outputs import CausalLMOutputWithPast

from jrt.cache import ModelState
from jrt.configuration_jrt import JRTConfig
from jrt.decoding import loop
from jrt.decoding.session import Sessions
from jrt.model import LanguageModel
from jrt.objective import IGNORED, mean_loss
from jrt.released.quirks import Quirks
from jrt.short_prompts import fill_short_prompts

# transformers 5.24 gave this argument and output a new name; `forward` and `generate` here take both.
CACHE = "cache" if "cache" in {f.name for f in dataclasses.fields(CausalLMOutputWithPast)} else "past_key_values"


STEP_QUIRKS = {"double_add", "decay_in_steps", "half_states"}  # change what one more token computes
log = logging.getLogger(__name__)
INTEGERS = (torch.int64, torch.int32)  # of ids, lengths and labels


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

    A row's output never depends on its padding (to the left) or its batch neighbours, and reading a prompt and decoding
    equals the full forward at the same `prefix_length`; `quirks` give that up where the release did.
    """

    config_class = JRTConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _is_stateful = True
    _tied_weights_keys: ClassVar[dict[str, str]] = {"model.head.weight": "model.embedding.weight"}
    _no_split_modules: ClassVar[list[str]] = ["Block"]

    def __init__(self, config: JRTConfig) -> None:
        super().__init__(config)
        self.core = config.core
        self.quirks = Quirks.from_dict(config.quirks)
        self.model = LanguageModel(self.core)
        self._sessions = Sessions()
        self.post_init()
        if self.model.embedding.weight.device.type != "meta":  # from_pretrained builds on meta and fills from the file
            self.model.init_weights()

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
            attention_mask: (B, T) or (B, tokens seen + T); 0 is padding, to the left of a row's tokens. Under the quirk
                `blank_padding` it is the release's `attn_mask`: any (B, T), or (B, 1, T, T) to add to scores.
            past_key_values: the cache that an earlier call returned; it is moved on in place.
            use_cache: return a cache; by default outside training.
            labels: (B, T) ids as in `input_ids`, -100 where nothing counts; shifted here. Padding and each row's first
                token are left out, and those inside a prefix, because the encoder has read them.
            prefix_length: (B,) tokens of each row that the prefix encoder reads, on the first call; None: as many of
                its own as enc_length allows.
            blank_length: (B,) short-prompt pads at each row's start (set by `generate`).
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
        state = self._past_state(cache)
        self._check_ids(input_ids, state)
        as_released = self.quirks.blank_padding
        mask = (_released_mask if as_released else _own_mask)(attention_mask, input_ids, state)
        if state is None:
            prefix_length = _checked_lengths("prefix_length", prefix_length, input_ids, mask)
            blank_length = _checked_lengths("blank_length", blank_length, input_ids, None)
        hidden, state = self.model.read(
            input_ids,
            state=state,
            attention_mask=mask,
            prefix_length=prefix_length,
            blank_length=blank_length,
            quirks=self.quirks,
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

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        attention_mask: Tensor | None = None,
        short_prompt: str | None = None,
        prefix_length: Tensor | None = None,
        **kwargs,
    ):
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
        self._check_ids(input_ids, self._past_state(past))
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        _check_tensor("attention_mask", mask, "a tensor (B, T)")
        if mask.shape != input_ids.shape:
            raise ValueError(f"attention_mask has shape {tuple(mask.shape)}; expected {tuple(input_ids.shape)}")
        if self.quirks.ignore_batch_padding:
            mask = torch.ones_like(mask)
        if self.quirks.padded_rows is False and self.config.vocab_tokens < self.core.vocab_rows:
            processors = LogitsProcessorList(kwargs.pop("logits_processor", None) or [])
            kwargs["logits_processor"] = LogitsProcessorList([*processors, VocabularyRows(self.config.vocab_tokens)])
        if (past is not None and past.get_seq_length()) or not self.core.has("P"):
            if short_prompt not in (None, "none") and not self.core.has("P"):
                raise ValueError(
                    f"short_prompt={short_prompt!r}: this model has no prefix encoder; expected None or 'none'"
                )
            return super().generate(input_ids, attention_mask=mask, **kwargs)
        own = _own_mask(mask, input_ids, None)
        given = _checked_lengths("prefix_length", prefix_length, input_ids, own)
        if given is not None and short_prompt not in (None, "none"):
            raise ValueError(f"prefix_length says what is encoded, and so does short_prompt={short_prompt!r}: give one")
        rule = self.config.short_prompt if short_prompt is None else short_prompt
        prompt = fill_short_prompts(
            input_ids,
            torch.ones_like(input_ids, dtype=torch.bool) if own is None else own,
            self.core.enc_length,
            rule if given is None else "none",
            self.config.short_prompt_token,
        )
        if given is not None:
            prompt = dataclasses.replace(prompt, prefix_length=given)
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
        self, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus=False, streamer=None, **kwargs
    ):  # fmt: skip
        """Greedy and sampled decoding of `generate`: by `jrt.decoding`, or by transformers' loop where that cannot."""
        use_cache = kwargs.get("use_cache")
        reason = "a quirk of the release" if set(self.quirks.active()) & STEP_QUIRKS else None
        reason = reason or loop.unsupported(
            self.model, self._sessions, input_ids, stopping_criteria, generation_config, use_cache, synced_gpus
        )
        arguments = (input_ids, logits_processor, stopping_criteria, generation_config)
        if reason is None:
            return loop.decode(self, self.model, self._sessions, *arguments, streamer, kwargs)
        log.debug("decoding by transformers' loop: %s", reason)
        return super()._sample(*arguments, synced_gpus=synced_gpus, streamer=streamer, **kwargs)

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

    def _past_state(self, past_key_values) -> ModelState | None:
        if past_key_values is None:
            return None
        if not isinstance(past_key_values, RecurrentCache):
            kind = type(past_key_values).__name__
            raise ValueError(f"past_key_values is a {kind}; expected the RecurrentCache that an earlier call returned")
        return past_key_values.state

    def _check_ids(self, input_ids: Tensor, state: ModelState | None) -> None:
        _check_tensor("input_ids", input_ids, "a tensor of integers of shape (B, T)")
        if input_ids.ndim != 2 or input_ids.dtype not in INTEGERS:
            shape, dtype = tuple(input_ids.shape), input_ids.dtype
            raise ValueError(
                f"input_ids is {dtype} of shape {shape}; expected integers of shape (B, T), int64 or int32"
            )
        if input_ids.numel() == 0:
            raise ValueError("input_ids is empty: expected at least one row and one token")
        if input_ids.is_cuda and state is not None:
            return  # reading the extremes back would stall the GPU at each step
        low, high = input_ids.min().item(), input_ids.max().item()
        if low < 0 or high >= self.core.vocab_rows:
            wrong = low if low < 0 else high
            raise ValueError(f"token id {wrong} is outside the vocabulary; expected 0 to {self.core.vocab_rows - 1}")

    def _loss(self, logits: Tensor, labels: Tensor, prefix_length: Tensor | None, state: ModelState) -> Tensor:
        _check_tensor("labels", labels, "a tensor (B, T)")
        if labels.shape != logits.shape[:2]:
            raise ValueError(f"labels have shape {tuple(labels.shape)}; expected {tuple(logits.shape[:2])}")
        if labels.dtype not in INTEGERS:
            raise ValueError(f"labels are {labels.dtype}; expected int64 or int32")
        told = labels[labels != IGNORED]
        if told.numel() and (wrong := told[(told < 0) | (told >= self.core.vocab_rows)]).numel():
            raise ValueError(
                f"label {wrong[0].item()} is outside the vocabulary; expected 0 to {self.core.vocab_rows - 1}, or {IGNORED}"
            )
        own = state.lengths[:, None]  # (B, 1)
        position = own - labels.shape[1] + torch.arange(labels.shape[1], device=labels.device)  # (B, T)
        first = 1  # nothing but padding stands before a row's first token
        if self.core.has("P"):
            prefix = own.clamp(max=self.core.enc_length) if prefix_length is None else prefix_length[:, None]
            first = prefix.clamp(min=1)
        labels = labels.long().masked_fill(position < first, IGNORED)
        if self.core.has("P") and told.numel() and bool((labels == IGNORED).all()):
            raise ValueError("all labels lie in the prefix, which the encoder has read: pass a shorter prefix_length")
        return mean_loss(logits[:, :-1], labels[:, 1:])


def _check_tensor(name: str, value: object, expected: str) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} is a {type(value).__name__}; expected {expected}")


def _checked_lengths(name: str, lengths: Tensor | None, input_ids: Tensor, mask: Tensor | None) -> Tensor | None:
    """(B,) counts of each row's own tokens. Raises ValueError for anything else."""
    if lengths is None:
        return None
    expected = f"a tensor of integers of shape (B,) = ({input_ids.shape[0]},)"
    _check_tensor(name, lengths, expected)
    if lengths.shape != input_ids.shape[:1] or lengths.dtype not in INTEGERS:
        raise ValueError(f"{name} has shape {tuple(lengths.shape)} and dtype {lengths.dtype}; expected {expected}")
    own = input_ids.shape[1] if mask is None else mask.sum(1)
    if bool(((lengths < 0) | (lengths > own)).any()):
        raise ValueError(f"{name} counts each row's own tokens: expected between 0 and the row's length")
    return lengths


def _one_cache(past_key_values: RecurrentCache | None, cache: RecurrentCache | None) -> RecurrentCache | None:
    if past_key_values is not None and cache is not None:
        raise ValueError("cache and past_key_values are two names of one argument: give one")
    return past_key_values if cache is None else cache


def _own_mask(attention_mask: Tensor | None, input_ids: Tensor, state: ModelState | None) -> Tensor | None:
    """(B, T) bool for the tokens of this call, or None where none is padding."""
    if attention_mask is None:
        return None
    _check_tensor("attention_mask", attention_mask, "a tensor (B, T)")
    batch, length = input_ids.shape
    total = length + (0 if state is None else state.seen)
    if attention_mask.ndim != 2 or attention_mask.shape[0] != batch or attention_mask.shape[1] not in (length, total):
        shape = tuple(attention_mask.shape)
        raise ValueError(f"attention_mask has shape {shape}; expected (B, T) = {(batch, length)} or {(batch, total)}")
    if state is not None and length == 1:
        return None  # a token that is generated is never padding
    mask = attention_mask[:, -length:].bool()
    if bool(mask.all()):
        return None
    if state is not None:
        raise ValueError("padding after the first call: pad prompts on the left, before anything was read")
    if not bool(mask.any(1).all()):
        raise ValueError("a row of attention_mask is all padding: expected at least one token in each row")
    if not bool((mask[:, 1:] >= mask[:, :-1]).all()):
        raise ValueError(
            "attention_mask has padding to the right of tokens: expected left padding (padding_side='left')"
        )
    return mask


def _released_mask(attention_mask: Tensor | None, input_ids: Tensor, state: ModelState | None) -> Tensor | None:
    """(B, T) bool, False where the release zeroes keys; None where it looks at no mask (original_spec 4.2)."""
    batch, length = input_ids.shape
    if attention_mask is None or state is not None or length == 1:
        return None
    _check_tensor("attention_mask", attention_mask, "a tensor (B, T) or (B, 1, T, T)")
    if attention_mask.ndim == 4:
        attention_mask = attention_mask[:, 0, -1] == 0
    if attention_mask.ndim == 2 and attention_mask.shape[1] > length:
        return None  # longer than any encoder of this text
    if attention_mask.shape not in ((batch, length), (1, length)):
        shape = tuple(attention_mask.shape)
        raise ValueError(f"attention_mask has shape {shape}; expected (B, T) or (B, 1, T, T) with T = {length}")
    mask = attention_mask.bool()
    return None if bool(mask.all()) else mask.expand(batch, length)


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
