"""The configuration class for transformers.

It is not in the file of the models, because transformers' modelling code takes seconds to import and `import jrt`
should be quick. The first configuration that is made imports the models.
"""

from __future__ import annotations

import importlib

from transformers import AutoConfig, PreTrainedConfig

from jrt.config import Config, presets
from jrt.released.quirks import Quirks
from jrt.short_prompts import SPACE_TOKEN, check_short_prompt

# False in a self-contained folder, where transformers finds the classes by itself.
IN_PACKAGE = __name__.startswith("jrt.")


class JRTConfig(PreTrainedConfig):
    """A `jrt.Config` with all else that a model folder's config.json holds.

    Args:
        architecture: fields of a `jrt.Config`; None: the preset `debug`.
        vocab_tokens: the first so many embedding rows stand for tokens, the others are padding; None: all rows.
        short_prompt, short_prompt_token: the rule for prompts shorter than the encoder, and its pad token
            (`jrt.short_prompts`).
        quirks: fields of `jrt.Quirks` that are switched on; None: none.
        source: where the weights came from, for the record.
        **kwargs: fields of transformers' PreTrainedConfig.

    Raises:
        ValueError: an unknown field or rule, or sizes that do not fit together.
    """

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
        if IN_PACKAGE:  # registers the model classes with AutoModelForCausalLM
            importlib.import_module("jrt.released.modeling")
        core = Config.from_dict(architecture) if architecture else presets()["debug"]
        check_short_prompt(short_prompt)
        if type(short_prompt_token) is not int:
            raise ValueError(f"short_prompt_token is {short_prompt_token!r}; expected a token id")
        self.architecture = core.to_dict()
        self.vocab_tokens = core.vocab_rows if vocab_tokens is None else vocab_tokens
        if type(self.vocab_tokens) is not int or not 0 < self.vocab_tokens <= core.vocab_rows:
            raise ValueError(f"vocab_tokens is {vocab_tokens!r}; expected 1 to {core.vocab_rows}, the embedding's rows")
        self.short_prompt = short_prompt
        self.short_prompt_token = short_prompt_token
        self.quirks = quirks or {}
        Quirks.from_dict(self.quirks)
        self.source = source
        self.bos_token_id, self.eos_token_id, self.pad_token_id = bos_token_id, eos_token_id, pad_token_id
        self.use_cache = True
        self.vocab_size, self.hidden_size, self.num_hidden_layers = core.vocab_rows, core.width, len(core.pattern)
        self.max_position_embeddings = core.train_length
        kwargs.setdefault("tie_word_embeddings", core.tied)
        super().__init__(**kwargs)

    @property
    def core(self) -> Config:
        """The architecture. Vocabulary size and tying of the head have their present values: transformers may change
        them."""
        return Config.from_dict(self.architecture | {"vocab_rows": self.vocab_size, "tied": self.tie_word_embeddings})

    def to_dict(self) -> dict:
        return super().to_dict() | {"architecture": self.core.to_dict()}


if IN_PACKAGE:
    AutoConfig.register("jrt", JRTConfig, exist_ok=True)
