"""Recurrent language models that read their prompt twice and recall more: JRT-Prompt, JRT-RNN (arXiv 2407.05483).

`load` opens a model, `ops` has the functions that models are made of, `presets` the published sizes. Importing this
package registers its models with transformers. Their code is imported only when the first model or configuration is
made.
"""

import importlib

from jrt import ops
from jrt.config import Config, presets
from jrt.configuration_jrt import JRTConfig
from jrt.released.quirks import Quirks

__version__ = "0.2.0"
__all__ = ["Config", "JRTConfig", "JRTForCausalLM", "Quirks", "load", "load_tokenizer", "ops", "presets"]

_LAZY = {"JRTForCausalLM": "jrt.modeling_jrt", "load": "jrt.checkpoints.load", "load_tokenizer": "jrt.checkpoints.load"}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'jrt' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
