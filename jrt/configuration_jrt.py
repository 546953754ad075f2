"""The configuration as transformers knows it, apart from the models because `import jrt` has to stay quick.

transformers' modelling code takes seconds to import; a configuration is the first thing that any use of a model makes.
"""

from __future__ import annotations

import importlib

from transformers import AutoConfig, PreTrainedConfig

from jrt.config import Config, presets
from jrt.short_prompts import SPACE_TOKEN, check_short_prompt

IN_PACKAGE = __name__.startswith("jrt.")  # not in a self-contained folder, whose classes transformers finds by itself


class JRTConfig(PreTrainedConfig):
    """A `jrt.Config` and what else a folder has to say: quirks, the rule for short prompts, where it came from."""

    model_type = "jrt"

    def __init__(
        self,
        architecture: dict | None = None,
        vocab_tokens: int | None = None,
        short_prompt: str = "none",
        short_prompt_token: int = SPACE_TOKEN,
        quirks: dict | None = None,
        source: str | None = None,
        bos_token_id: int | list[int] | None = None,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None,
        **kwargs,
    ) -> None:
        if IN_PACKAGE:  # the model classes, known to AutoModelForCausalLM from now on
            importlib.import_module("jrt.released.modeling")
        core = Config.from_dict(architecture) if architecture else presets()["debug"]
        check_short_prompt(short_prompt)
        self.architecture = core.to_dict()
        self.vocab_tokens = core.vocab_rows if vocab_tokens is None else vocab_tokens
        if type(self.vocab_tokens) is not int or not 0 < self.vocab_tokens <= core.vocab_rows:
            raise ValueError(f"vocab_tokens is {vocab_tokens!r}; expected 1 to {core.vocab_rows}, the embedding's rows")
        self.short_prompt = short_prompt
        self.short_prompt_token = short_prompt_token
        self.quirks = quirks or {}
        self.source = source
        self.bos_token_id, self.eos_token_id, self.pad_token_id = bos_token_id, eos_token_id, pad_token_id
        self.use_cache = True
        self.vocab_size, self.hidden_size, self.num_hidden_layers = core.vocab_rows, core.width, len(core.pattern)
        self.max_position_embeddings = core.train_length
        kwargs.setdefault("tie_word_embeddings", core.tied)
        super().__init__(**kwargs)

    @property
    def core(self) -> Config:
        """The architecture, with the two fields that transformers may change by itself as they are now."""
        return Config.from_dict(self.architecture | {"vocab_rows": self.vocab_size, "tied": self.tie_word_embeddings})

    def to_dict(self) -> dict:
        return super().to_dict() | {"architecture": self.core.to_dict()}


if IN_PACKAGE:
    AutoConfig.register("jrt", JRTConfig, exist_ok=True)
