"""What is done for a model that lm-eval's `hf` model will open, before it does.

`acting_settings` names saved settings that change greedy answers: lm-eval's `hf` model applies a model's
generation_config.json to every answer, and `jrt eval` ignores it. `register` makes the models of flash-linear-attention
known, because the `hf` model knows only the types that transformers has.

A model whose files cannot be read is left to lm-eval, which reports it. `settings` is what `settings.parsed` returns.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from .settings import as_dict

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


def _model_name(settings: Mapping[str, Any]) -> str | None:
    """The name of the model that lm-eval's `hf` model opens; None for lm-eval's other models."""
    name = as_dict("model_args", settings.get("model_args")).get("pretrained")
    return name if settings.get("model", "hf") in ("hf", "huggingface", "hf-auto") and isinstance(name, str) else None


def acting_settings(settings: Mapping[str, Any]) -> str | None:
    """One line that names the saved settings which lm-eval's `hf` model will apply; None if there are none."""
    from transformers import GenerationConfig

    name = _model_name(settings)
    if name is None:
        return None
    try:
        saved = vars(GenerationConfig.from_pretrained(name))
    except (OSError, ValueError):
        return None
    acting = {key: saved[key] for key in NEUTRAL if saved.get(key) not in (None, NEUTRAL[key])}
    if not acting:
        return None
    listed = ", ".join(f"{key}={value}" for key, value in acting.items())
    return f"{name}: generation_config.json has {listed}; lm-eval's hf model applies it to all answers, `jrt eval` does not"


def register(settings: Mapping[str, Any]) -> None:
    """Imports flash-linear-attention if the model is of a type that transformers does not have: it registers its models.

    Raises ValueError if flash-linear-attention is not installed or cannot be imported."""
    from transformers import PreTrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    name = _model_name(settings)
    if name is None:
        return
    try:
        config = PreTrainedConfig.get_config_dict(name)[0]
    except (OSError, ValueError, TypeError, AttributeError):
        return
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind in CONFIG_MAPPING or config.get("auto_map"):
        return
    if find_spec("fla") is None:
        raise ValueError(
            f"the model {name!r} is of the type {kind!r}, which transformers does not have; models of "
            "flash-linear-attention need it installed: pip install flash-linear-attention"
        )
    try:
        import_module("fla.models")
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        raise ValueError(f"flash-linear-attention cannot be imported: {error}") from error
