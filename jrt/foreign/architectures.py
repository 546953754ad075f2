"""Model types that transformers does not have: those of flash-linear-attention, where it is installed."""

import importlib
from importlib.util import find_spec

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from jrt.system.breaks import BREAKS, as_value_error


def register_architecture(name: str) -> None:
    """Imports flash-linear-attention if a model's type is unknown to transformers: the import registers its models.

    name: folder or hub id. Raises ValueError if flash-linear-attention is not installed or cannot be imported, or the
    model's code is in its own files."""
    try:
        config = PreTrainedConfig.get_config_dict(name)[0]
    except BREAKS:
        return  # no such model, or a broken one: the caller that opens it reports the error
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind in CONFIG_MAPPING:
        return
    if find_spec("fla") is None:
        remedy = "models of flash-linear-attention need it installed: pip install flash-linear-attention"
        if config.get("auto_map"):
            remedy = "it needs the code among its own files, and code of a checkpoint is never run"
        raise ValueError(f"the model {name!r} is of the type {kind!r}, which transformers does not have; {remedy}")
    with as_value_error("flash-linear-attention cannot be imported"):
        importlib.import_module("fla.models")
