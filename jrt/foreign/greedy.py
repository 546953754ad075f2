"""Plain greedy decoding: the most likely token at each step, whatever a checkpoint's generation_config.json says.

Saved settings can change greedy answers (penalties, suppressed or forced tokens, minimum lengths, guidance ...) or how
they are computed (another cache, several returned sequences, an assistant). An evaluation replaces all of them and
reports which.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import LogitsProcessor
from transformers.utils import cached_file

from jrt.system.files import read_object

FILE = "generation_config.json"

TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")  # the settings that are kept
# Settings that have no effect on greedy answers of a given length. They are replaced without a report.
_SAMPLING = "do_sample temperature top_k top_p min_p top_h typical_p epsilon_cutoff eta_cutoff renormalize_logits"
_LENGTHS = "max_length max_new_tokens"
_OUTPUTS = "output_attentions output_hidden_states output_scores output_logits return_dict_in_generate"
_RECORDS = "transformers_version _from_model_config _original_object_hash"
SILENT = frozenset(" ".join((_SAMPLING, _LENGTHS, _OUTPUTS, _RECORDS)).split())


def saved_settings(name: str) -> dict[str, Any] | None:
    """The generation_config.json of a folder or hub id, as plain JSON; None if there is no such file.

    transformers itself refuses to load a model whose settings contradict each other, even if nobody uses them. Raises
    ValueError if the file holds no JSON object."""
    file = cached_file(name, FILE, _raise_exceptions_for_missing_entries=False)
    return None if file is None else read_object(Path(file))


def plain_settings(saved: Mapping[str, Any]) -> GenerationConfig:
    """Plain greedy settings, with the special tokens (TOKENS) of the saved settings."""
    kept = {name: saved.get(name) for name in TOKENS}
    return GenerationConfig(**{name: value for name, value in kept.items() if _is_token(value)})


def set_aside(model: PreTrainedModel, saved: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Gives the model plain greedy settings, and returns the replaced ones that could have changed greedy answers or how
    they are computed, by name.

    saved: the settings from a file; None: those that the model has now."""
    saved = vars(model.generation_config) if saved is None else saved
    plain = plain_settings(saved)
    found = {name: value for name, value in saved.items() if _matters(name, value)}
    # Older checkpoints keep such settings in config.json, where `generate` refuses to run with them.
    fields = {field.name for field in dataclasses.fields(model.config)}
    for name in set(vars(plain)) - set(TOKENS) - fields - {"use_cache"}:
        value = vars(model.config).get(name)
        if value is not None:
            delattr(model.config, name)
            if _matters(name, value):
                found[name] = value
    model.generation_config = plain
    return dict(sorted(found.items()))


def _is_token(value: object) -> bool:
    tokens = value if isinstance(value, list) else [value]
    return bool(tokens) and all(isinstance(token, int) and not isinstance(token, bool) for token in tokens)


class ForcedTokens(LogitsProcessor):
    """Makes each row of `generate` take given tokens first, before it chooses its own. An object serves one call."""

    def __init__(self, forced: Sequence[Sequence[int]]) -> None:
        # Steps are counted here, because filled-up prompts change the width of input_ids.
        self.forced, self.steps = forced, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step, self.steps = self.steps, self.steps + 1
        rows = [row for row, tokens in enumerate(self.forced) if step < len(tokens)]
        if not rows:
            return scores
        scores = scores.clone()
        scores[rows] = float("-inf")
        scores[rows, [self.forced[row][step] for row in rows]] = 0.0
        return scores


def _matters(name: str, value: object) -> bool:
    """Whether a saved setting could change greedy answers or how they are computed."""
    if name in TOKENS:
        return value is not None and not _is_token(value)  # such as an end token that is no id: it never ends a row
    if name in SILENT or value is None:
        return False
    return name not in _DEFAULTS or value != _DEFAULTS[name]


# The value at which each setting has no effect. `use_cache` false only costs time, but is replaced and reported too.
_DEFAULTS: dict[str, object] = {
    "assistant_confidence_threshold": 0.4,
    "assistant_lookbehind": 10,
    "diversity_penalty": 0.0,
    "early_stopping": False,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "guidance_scale": 1.0,
    "is_assistant": False,
    "length_penalty": 1.0,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "num_assistant_tokens": 20,
    "num_assistant_tokens_schedule": "constant",
    "num_beam_groups": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "remove_invalid_values": False,
    "repetition_penalty": 1.0,
    "target_lookbehind": 10,
    "token_healing": False,
    "use_cache": True,
}
