"""Tokenizers of training text: loading one by name, the size of its vocabulary, and a hash of it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from jrt_recall.tokenizers import shipped_tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Returns a tokenizer.

    Args:
        name: "mini" for the vocabulary that jrt_recall ships, or a folder or name that AutoTokenizer loads, such as
            "gpt2".

    Raises:
        ValueError: there is none.
    """
    if name == "mini":
        return shipped_tokenizer()
    folder = Path(name).expanduser()
    try:
        return AutoTokenizer.from_pretrained(folder if folder.is_dir() else name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no tokenizer {name!r}: expected 'mini', a folder, or a name on the Hugging Face hub that can be reached"
        ) from error


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """The largest id + 1: rows that a model needs. It is more than the number of entries if some ids are not used."""
    return max(max(tokenizer.get_vocab().values(), default=-1) + 1, len(tokenizer))


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of everything that decides which ids a text gets."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(text.encode()).hexdigest()
