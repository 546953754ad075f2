"""`jrt convert`: a checkpoint in any layout that `jrt.load` reads, written as a Hugging Face folder.

The folder has safetensors in shards of at most 4 GB, the tokenizer if the source has one, and a README that says where
the weights came from. It appears under its name only when it is complete.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import BinaryIO, cast

import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils.sha import sha_fileobj
from tqdm import tqdm
from transformers import GenerationConfig

from jrt import __version__
from jrt.checkpoints.files import files
from jrt.checkpoints.load import load, trained_tokenizer
from jrt.checkpoints.names import origin, resolve
from jrt.checkpoints.self_contained import make_self_contained
from jrt.modeling_jrt import JRTForCausalLM

SHARD = "4GB"
LONG_HASH = 256 << 20  # bytes: hashing a larger file shows a progress bar
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)


def convert(
    source: str | Path, out: str | Path, *, dtype: torch.dtype | None = None, self_contained: bool = False
) -> Path:
    """Writes `source` to the folder `out`; `jrt.load(out)` then gives the same model as `jrt.load(source)`.

    Args:
        source: anything that `jrt.load` takes: a folder, a hub id, a mini model's name.
        out: a folder that is new or empty.
        dtype: of the weights in the result; None: as `jrt.load` gives them (the source's own, float32 for the minis).
        self_contained: add the model's source files, so that transformers loads the folder with
            `trust_remote_code=True` where jrt is not installed.

    Returns:
        The folder.

    Raises:
        ValueError: `out` is not empty, the disk is too full, or the source cannot be loaded. Nothing is written then.
    """
    out = _checked_out(out)
    folder = resolve(source)
    model = load(source, dtype=dtype)
    model.config.source = origin(source)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    except OSError as error:
        raise ValueError(f"{out} cannot be made ({error.strerror}): choose another folder") from error
    try:
        _check_space(out.parent, model)
        # The source's own generation_config.json, if it has one, replaces this one below.
        model.generation_config = GenerationConfig.from_model_config(model.config)
        model.save_pretrained(partial, max_shard_size=SHARD)
        tokenizer = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
        copied = tokenizer + [name for name in ("generation_config.json",) if (folder / name).is_file()]
        for name in copied:
            shutil.copyfile(folder / name, partial / name)
        if self_contained:
            make_self_contained(partial, type(model), __version__)
        sources = [folder / "config.json", *files(folder), *(folder / name for name in copied)]
        card = ModelCard.from_template(
            ModelCardData(
                library_name="transformers",
                pipeline_tag="text-generation",
                tags=["jrt", "recurrent", "linear-attention"],
            ),
            template_path=str(Path(__file__).with_name("card.md.jinja")),
            model=model,
            name=origin(source),
            tokenizer="in this folder" if tokenizer else f"not in the source: `{trained_tokenizer(folder)}`",
            sources=sources,
            results=sorted(partial.iterdir()),
            self_contained=self_contained,
            versions={"jrt": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
            sha256=sha256,
        )
        card.save(partial / "README.md")
        partial.chmod(0o755)  # mkdtemp makes folders that no other user can read
        os.replace(partial, out)  # `out` may be an empty folder
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return out


def _checked_out(given: str | Path) -> Path:
    out = Path(os.path.expanduser(given))
    if str(out).startswith("~"):
        raise ValueError(f"{out}: there is no user of that name on this machine")
    if os.path.isdir(out) and any(out.iterdir()):
        raise ValueError(f"{out} is not empty: choose a new folder, or empty this one")
    if os.path.exists(out) and not os.path.isdir(out):
        raise ValueError(f"{out} is a file: expected a new or empty folder")
    return out


def _check_space(folder: Path, model: JRTForCausalLM) -> None:
    needed, free = sum(p.nbytes for p in model.parameters()), shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(f"the result takes {needed / 1e9:.1f} GB and {folder} has {free / 1e9:.1f} GB free: make room")


def sha256(file: Path) -> str:
    """Hexadecimal SHA-256 of a file, with a progress bar for a large one on a terminal."""
    size, name = file.stat().st_size, f"sha256 {file.name}"
    hidden = True if size < LONG_HASH else None  # None: shown on a terminal
    with open(file, "rb") as opened, tqdm.wrapattr(opened, "read", size, desc=name, disable=hidden) as stream:
        return sha_fileobj(cast(BinaryIO, stream)).hex()  # the wrapper has `read`, and no more is needed
