"""Finds the model folder behind a name, and tells from its config.json what kind of model it holds."""

from __future__ import annotations

import os
from enum import Enum
from pathlib import Path

from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from jrt.checkpoints.files import CheckpointError, read_json
from jrt.config import presets, releases

MINIS = Path(__file__).parent.parent / "minis"
DOWNLOADED = ("*.json", "*.safetensors", "*.bin", "tokenizer*", "*.txt", "*.model")
RELEASED_FIELDS = ("mixer", "alt_mixer", "alt_mixer_2", "rotary_emb_fraction")  # fields that stock GPT-2 does not have


class Kind(Enum):
    """The program that wrote a folder. It decides how the configuration and the tensors' names are read."""

    JRT = "this package"
    RELEASED_GPT = "the original release: JRT, Based and attention"
    MAMBA_SSM = "mamba_ssm, Mamba's own package, and the original release"
    MAMBA2_SSM = "mamba_ssm: Mamba-2"
    MAMBA_TRANSFORMERS = "transformers: Mamba"
    OTHER = "anybody else: transformers loads it"


def kind_of(raw: dict) -> Kind:
    """The kind of model that a config.json describes, by the fields that it has."""
    settings = raw.get("ssm_cfg")
    if isinstance(settings, dict) and settings.get("layer") == "Mamba2":
        return Kind.MAMBA2_SSM
    match raw.get("model_type"):
        case "jrt":
            return Kind.JRT
        case "mamba":
            return Kind.MAMBA_TRANSFORMERS
        case "gpt2" | None if any(field in raw for field in RELEASED_FIELDS):
            return Kind.RELEASED_GPT
        case None if "ssm_cfg" in raw or ("d_model" in raw and "n_layer" in raw):
            return Kind.MAMBA_SSM
    return Kind.OTHER


def kind_of_model(name: str | Path) -> Kind:
    """The kind of a named model, from its config.json if it is on this machine, else from its name. Nothing is
    downloaded.

    Raises ValueError if the name is ambiguous (see `find`), or the folder's config.json cannot be read."""
    folder = find(name)
    if folder is not None:
        return kind_of(read_config(folder)) if (folder / "config.json").is_file() else Kind.OTHER
    if str(name) in releases():
        return Kind.MAMBA_SSM if presets()[releases()[str(name)]].has("M") else Kind.RELEASED_GPT
    return Kind.JRT if str(name) in presets() else Kind.OTHER


def read_config(folder: Path) -> dict:
    """A folder's config.json. Raises CheckpointError if there is none or it cannot be read."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json: expected a model folder")
    return read_json(folder / "config.json")


def find(name_or_path: str | Path) -> Path | None:
    """The folder behind a name, None if it is not on this machine: a folder, a mini model, or OWNER/NAME in the hub's
    cache.

    A `Path`, or a name with a separator, is taken as a folder first. A name without separator is a mini model or a
    folder in the working directory. Raises ValueError if it is both."""
    folder = _folder(name_or_path)
    if folder is None and _is_hub_id(str(name_or_path)):
        config = try_to_load_from_cache(str(name_or_path), "config.json")
        return Path(config).parent if isinstance(config, str) else None
    return folder


def resolve(name_or_path: str | Path) -> Path:
    """The folder behind a name, as in `find`; a hub id is downloaded unless the hub's cache has it.

    Raises ValueError if there is no such model, or the name is ambiguous."""
    folder, name = _folder(name_or_path), str(name_or_path)
    if folder is not None:
        return folder
    if name in presets():
        raise ValueError(f"{name} is an architecture without weights here; with weights: {', '.join(shipped())}")
    if not _is_hub_id(name):
        example = next(iter(releases()))
        raise ValueError(
            f"no model {name!r}: expected one of {', '.join(shipped())}, a folder, or a hub id like {example}"
        )
    try:
        return Path(snapshot_download(name, allow_patterns=list(DOWNLOADED)))
    except OSError as error:  # the hub's own errors are subclasses of it
        raise ValueError(
            f"{name} is neither in the hub's cache nor reachable: download it where there is a network"
        ) from error


def shipped() -> list[str]:
    """Names of the mini models that are installed with this package."""
    return sorted(folder.name for folder in MINIS.glob("*/") if (folder / "config.json").is_file())


def origin(name_or_path: str | Path) -> str:
    """A model's name for records, without the paths of this machine: of a folder its last part, other names
    unchanged."""
    folder = _folder(name_or_path)
    return str(name_or_path) if folder is None else folder.resolve().name


def unless_shadowed(name: str, folder: Path) -> Path:
    """Returns `folder`, which holds the shipped model `name`.

    Raises ValueError if the working directory has another folder with that name."""
    if os.path.isdir(name) and not os.path.samefile(name, folder):
        raise ValueError(
            f"{name} is a shipped model and a folder here: write {os.path.join(os.curdir, name)} for the folder, "
            f"{folder} for the shipped model"
        )
    return folder


def _folder(name_or_path: str | Path) -> Path | None:
    name = os.path.expanduser(name_or_path)
    bare = os.sep not in name and (os.altsep is None or os.altsep not in name)
    # os.path.isfile returns False for an invalid path, where Path.is_file could raise.
    is_shipped = bare and os.path.isfile(MINIS / name / "config.json")
    if is_shipped and isinstance(name_or_path, str):
        return unless_shadowed(name, MINIS / name)
    if os.path.isdir(name):
        return Path(name)
    return MINIS / name if is_shipped else None


def _is_hub_id(name: str) -> bool:
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True
