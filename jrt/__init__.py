"""Recall of recurrent language models, and the two ways to close its gap by reading twice (arXiv 2407.05483).

`load` gives a model, `ops` the functions it is made of, `presets` the published sizes. Importing this package makes its
models known to transformers; the models' own code is imported with the first of them.
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
