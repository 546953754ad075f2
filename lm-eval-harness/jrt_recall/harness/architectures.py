"""Models of flash-linear-attention under lm-eval's `hf` model, which knows only the types that transformers has."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from .settings import hf_model

INSTALL = "models of flash-linear-attention need it installed: pip install flash-linear-attention"


def register(settings: Mapping[str, Any]) -> None:
    """Imports flash-linear-attention if the model is of a type that transformers does not have: it registers its models.

    settings: as `settings.parsed` returns them. A model whose type cannot be read is left to lm-eval. Raises ValueError
    if flash-linear-attention is not installed or cannot be imported."""
    from transformers import PreTrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    name = hf_model(settings)
    if name is None:
        return
    try:
        config = PreTrainedConfig.get_config_dict(name)[0]
    except (OSError, ValueError, TypeError, AttributeError):
        return  # no such model, or a broken one: lm-eval reports it
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind in CONFIG_MAPPING or config.get("auto_map"):
        return
    if find_spec("fla") is None:
        raise ValueError(f"the model {name!r} is of the type {kind!r}, which transformers does not have; {INSTALL}")
    try:
        import_module("fla.models")
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        raise ValueError(f"flash-linear-attention cannot be imported: {error}") from error
