"""The tokenizers that measure windows: GPT-2's, as published, and the vocabulary shipped with this package.

A window is part of a protocol, so a score made with another cutting tokenizer carries another protocol name.
"""

from functools import cache
from pathlib import Path

from .cutting import token_ids
from .data import FOLDER_VARIABLE, mirror_folder
from .protocols import GPT2, SHIPPED, Protocol

ASSETS = Path(__file__).parent / "assets"
_GPT2_ENTRIES = 50257
_GPT2_SAMPLE = ("Just read twice: closing the recall gap", [5703, 1100, 5403, 25, 9605, 262, 10014, 7625])


def cutting_tokenizer(name: str, data: str | Path | None = None):
    """A tokenizer by name: `gpt2`, `shipped`, or a folder or hub name that transformers' AutoTokenizer reads.

    gpt2 comes from the folder `gpt2` of the data mirror (`data`, else the one JRT_DATA names) where there is one, else
    from the hub or its cache. Raises ValueError that says how to get it."""
    if name == SHIPPED:
        return shipped_tokenizer()
    if name == GPT2:
        for mirror in (mirror_folder(data), mirror_folder()):
            if mirror is not None and (mirror / GPT2).is_dir():
                return _from_pretrained(str(mirror / GPT2))
    return _from_pretrained(name)


@cache
def shipped_tokenizer():
    """The 4,096-entry byte-level BPE that ships with this package (and is the mini models' own)."""
    if not (ASSETS / "tokenizer.json").is_file():
        raise ValueError(f"the shipped tokenizer is absent ({ASSETS.name}/tokenizer.json): install jrt_recall again")
    return _from_pretrained(str(ASSETS))


def model_tokenizer(name: str):
    """The tokenizer of a model folder or hub name; None where there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError):
        return None


def mirror_gpt2(folder: str | Path | None = None) -> Path:
    """Copies GPT-2's tokenizer from the hub (or its cache) into the data mirror, for machines without network."""
    mirror = mirror_folder(folder)
    if mirror is None:
        raise ValueError(f"no mirror folder: name one, or set {FOLDER_VARIABLE}")
    _from_pretrained(GPT2).save_pretrained(mirror / GPT2)
    return mirror / GPT2


def protocol_and_tokenizer(protocol: Protocol, tokenizer, data: str | Path | None = None):
    """The protocol as it will really be run and the tokenizer that cuts for it (None where nothing is cut).

    tokenizer: None for the protocol's own; a name for `cutting_tokenizer`, or a tokenizer; data: mirror folder. One that
    is not the protocol's gives a protocol of another name. Raises ValueError where one is named and nothing is cut."""
    if protocol.window is None:
        if isinstance(tokenizer, str):
            raise ValueError(f"{protocol.name} leaves documents whole: there is nothing that {tokenizer!r} could cut")
        return protocol, None
    if tokenizer is None:
        return protocol, cutting_tokenizer(protocol.cutting_tokenizer, data)
    chosen = cutting_tokenizer(tokenizer, data) if isinstance(tokenizer, str) else tokenizer
    return protocol.cut_with(_label(chosen)), chosen


def _label(tokenizer) -> str:
    """gpt2 or shipped if the tokenizer is that, wherever it was loaded from; else the last part of its name."""
    if is_gpt2(tokenizer):
        return GPT2
    if tokenizer.get_vocab() == shipped_tokenizer().get_vocab():
        return SHIPPED
    return Path(tokenizer.name_or_path or "unnamed").name


def is_gpt2(tokenizer) -> bool:
    """True if `tokenizer` has GPT-2's entries and splits a sample as GPT-2 does."""
    text, ids = _GPT2_SAMPLE
    return len(tokenizer) == _GPT2_ENTRIES and token_ids(tokenizer, text) == ids


@cache
def _from_pretrained(name: str):
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the cutting tokenizer {name!r} is neither here nor on the hub. With network, load it once "
            f"(transformers keeps it); without, put its folder at ${FOLDER_VARIABLE}/{GPT2} or name another tokenizer, "
            f"such as {SHIPPED!r}, which gives the protocol another name"
        ) from error
