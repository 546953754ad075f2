"""Settings in a model's generation_config.json that change greedy answers.

lm-eval's `hf` model applies them to every answer, and `jrt eval` ignores them. This module names them before a run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .settings import hf_model

# Each setting with the value at which it has no effect; None has none for any of them.
NEUTRAL: dict[str, object] = {
    "bad_words_ids": [],
    "begin_suppress_tokens": [],
    "diversity_penalty": 0.0,
    "dola_layers": None,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "exponential_decay_length_penalty": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "guidance_scale": 1.0,
    "length_penalty": 1.0,
    "max_time": None,
    "min_length": 0,
    "min_new_tokens": 0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "penalty_alpha": 0.0,
    "repetition_penalty": 1.0,
    "sequence_bias": None,
    "stop_strings": None,
    "suppress_tokens": [],
    "watermarking_config": None,
}


def acting_settings(settings: Mapping[str, Any]) -> str | None:
    """One line that names the saved settings which lm-eval's `hf` model will apply; None if there are none.

    settings: as `settings.parsed` returns them. A model whose settings cannot be read is left to lm-eval.
    """
    from transformers import GenerationConfig

    name = hf_model(settings)
    if name is None:
        return None
    try:
        saved = vars(GenerationConfig.from_pretrained(name))
    except (OSError, ValueError):  # no such file, or a broken one: lm-eval reports it
        return None
    acting = {key: saved[key] for key in NEUTRAL if saved.get(key) not in (None, NEUTRAL[key])}
    if not acting:
        return None
    listed = ", ".join(f"{key}={value}" for key, value in acting.items())
    return f"{name}: generation_config.json has {listed}; lm-eval's hf model applies it to all answers, `jrt eval` does not"
