"""`jrt.load`: from a name, a folder or a hub id to a model, whatever layout the files are in."""

from __future__ import annotations

import functools
import inspect
import os
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from jrt.checkpoints import keys
from jrt.checkpoints.files import FLOATING, CheckpointError, Entry, Reader, entries, read_json
from jrt.config import presets
from jrt.configuration_jrt import JRTConfig
from jrt.model import fixed_decay
from jrt.modeling_jrt import JRTForCausalLM
from jrt.released import configurations
from jrt.released.quirks import Quirks
from jrt.short_prompts import SPACE_TOKEN, check_short_prompt

MINIS = Path(__file__).parent.parent / "minis"
RELEASED = (
    "hazyresearch/JRT-360M-30B",
    "hazyresearch/based-360M-30B",
    "hazyresearch/mamba-360M-30B",
    "hazyresearch/attn-360M-30B",
    "hazyresearch/JRT-1B-50B",
    "hazyresearch/based-1b-50b",
    "hazyresearch/mamba-1b-50b",
    "hazyresearch/attn-1b-50bn",
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
FILES = ("*.json", "*.safetensors", "*.bin", "tokenizer*", "*.txt", "*.model")


def load(
    name_or_path: str | Path,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    compat: str | Quirks | None = None,
    short_prompt: str | None = None,
) -> JRTForCausalLM:
    """Loads a model in evaluation mode.

    Args:
        name_or_path: a mini model ("mini-jrt"), a folder (ours, a released one, shards, or Mamba's), or a hub id.
        device: where the weights go; they are never held twice.
        dtype: of the weights (`torch.bfloat16` or "bfloat16"); None keeps the file's on a released folder, fp32 for the
            minis (stored in bf16).
        compat: None computes correctly; "released" as the published numbers were measured; a `jrt.Quirks` picks quirks.
        short_prompt: rule for prompts shorter than the encoder (`jrt.short_prompts.SHORT_PROMPTS`); None: the
            checkpoint's own, "pad" for released JRT models.

    Returns:
        The model; `model.config.source` says where it came from.

    Raises:
        ValueError: an unknown name, a checkpoint that cannot be read or does not fit, an unknown option, a device
            that this machine has not.
    """
    check_short_prompt(short_prompt)
    device = checked_device(device)
    dtype = None if dtype is None else checked_dtype(dtype)
    quirks = Quirks.of(compat)
    folder = resolve(name_or_path)
    raw = _read_config(folder)
    described = entries(folder)
    if raw.get("model_type") == "jrt":
        config = _own_config(raw)
        if compat is not None:
            config.quirks = {name: True for name in quirks.active()}
        sources = _matched(described, keys.OWN)
    elif configurations.is_released(raw):
        table = keys.MAMBA if configurations.is_mamba(raw) else keys.GPT
        sources = _matched(_modern(described, raw), table)
        if "embedding.weight" not in sources and "head.weight" in sources:
            sources["embedding.weight"] = sources.pop("head.weight")  # the other name of a tied tensor
        shapes = {name: _shape(source) for name, source in sources.items()}
        config = _translated(raw, shapes, quirks, str(name_or_path))
        if config.core.decay_const is None:
            sources.pop("log_decay", None)  # the release writes it beside mixers that do not use it, too
    else:
        kind = raw.get("model_type", "unknown")
        raise CheckpointError(
            f"{name_or_path} is a {kind} model; expected JRT, Based, attention or Mamba: use transformers for others"
        )
    if short_prompt is not None:
        config.short_prompt = short_prompt
    if quirks.ignore_end_token:
        config.eos_token_id = None
    if folder.parent == MINIS and dtype is None:
        dtype = torch.float32
    return _build(config, sources, device, dtype)


def load_tokenizer(name_or_path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, set to pad on the left; GPT-2's where a released folder has none.

    Raises:
        ValueError: neither the folder nor the hub nor its cache has it.
    """
    folder = resolve(name_or_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder if has_tokenizer(folder) else "gpt2", padding_side="left", trust_remote_code=False
        )
    except OSError as error:
        raise ValueError(
            f"{name_or_path} has no tokenizer and GPT-2's cannot be had: download 'gpt2' once, online"
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(SPACE_TOKEN)  # as the release pads
    return tokenizer


def checked_device(device: str | torch.device) -> torch.device:
    """The device of a name. Raises ValueError for no such name, or one that torch cannot use here."""
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"device {device!r} cannot be used here: expected cpu, cuda or cuda:N; "
            f"torch has {torch.cuda.device_count()} GPUs on this machine"
        ) from error
    return found


def checked_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """The dtype of a name, one that models compute in. Raises ValueError for another."""
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found not in DTYPES.values():
        raise ValueError(f"dtype {dtype!r}: expected {', '.join(DTYPES)} (or torch.float32, ...)")
    return found


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has a tokenizer of its own."""
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json"))


def resolve(name_or_path: str | Path) -> Path:
    """The folder behind a mini's name, a path or a hub id (downloaded, or taken from the hub's cache).

    Raises:
        ValueError: there is none.
    """
    name = str(name_or_path)
    if os.path.isfile(MINIS / name / "config.json"):  # unlike Path.is_file, False for what cannot be a path
        return MINIS / name
    if os.path.isdir(name):
        return Path(name)
    if name in presets():
        raise ValueError(f"{name} is an architecture without weights here; minis with weights: {', '.join(_minis())}")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ValueError(
            f"no model {name!r}: expected one of {', '.join(_minis())}, a folder, or a hub id like {RELEASED[4]}"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(FILES)))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ValueError(
            f"{name} is neither in the hub's cache nor reachable: download it where there is a network"
        ) from error


def _minis() -> list[str]:
    return sorted(folder.name for folder in MINIS.glob("*/") if (folder / "config.json").is_file())


def _read_config(folder: Path) -> dict:
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json: expected a model folder")
    return read_json(folder / "config.json")


def _own_config(raw: dict) -> JRTConfig:
    known = set(inspect.signature(JRTConfig).parameters) - {"kwargs"}  # transformers' own fields can ask for memory
    try:
        config = JRTConfig(**{name: value for name, value in raw.items() if name in known})
        Quirks(**config.quirks)
    except (TypeError, AttributeError, ValueError, StrictDataclassError) as error:
        raise CheckpointError(f"config.json is no jrt configuration ({str(error).splitlines()[0]})") from error
    return config


def _translated(raw: dict, shapes: configurations.Shapes, quirks: Quirks, source: str) -> JRTConfig:
    try:
        return configurations.translate(raw, shapes, quirks, source)
    except ValueError as error:
        raise CheckpointError(str(error)) from error


Source = Entry | tuple[Entry, ...]  # a tuple: stacked along the first dimension


def _modern(described: dict[str, Entry], raw: dict) -> dict[str, Source]:
    """Entries under the names of the released layout, from the older layouts."""
    renames = keys.modern_norms(list(described))
    found: dict[str, Source] = {}
    for name, entry in described.items():
        if renames[name] in found:
            raise CheckpointError(f"the tensors {found[renames[name]].name} and {name} are both {renames[name]}")
        found[renames[name]] = entry
    if raw.get("mlp_type") == "alt":
        for name in [name for name in found if ".mlp.fc3." in name]:
            gate = name.replace(".fc3.", ".fc1.")
            if gate not in found:
                raise CheckpointError(f"{name} has no {gate} beside it")
            found[gate] = (found.pop(name), found[gate])  # values above gates
    return found


def _matched(described: dict[str, Source], table) -> dict[str, Source]:
    found, unknown = keys.renamed(list(described), table)
    if unknown:
        raise CheckpointError(f"{len(unknown)} tensors have no place in the model: {', '.join(sorted(unknown)[:8])}")
    return {here: described[name] for here, name in found.items()}


def _shape(source: Source) -> tuple[int, ...]:
    if isinstance(source, Entry):
        return source.shape
    if len({part.shape[1:] for part in source}) != 1:
        raise CheckpointError(
            f"{source[0].name} and {source[1].name} cannot be stacked: {source[0].shape}, {source[1].shape}"
        )
    return (sum(part.shape[0] for part in source), *source[0].shape[1:])


def _build(
    config: JRTConfig, sources: dict[str, Source], device: torch.device, dtype: torch.dtype | None
) -> JRTForCausalLM:
    """Checks names and shapes on the meta device, then fills the model tensor by tensor."""
    core = config.core
    if len(core.pattern) > len(sources):
        raise CheckpointError(f"config.json has {len(core.pattern)} layers and the file {len(sources)} tensors")
    try:
        with torch.device("meta"):
            model = JRTForCausalLM(config)
    except (RuntimeError, TypeError, OverflowError) as error:
        raise CheckpointError(
            f"config.json describes no model that can be built ({str(error).splitlines()[0]})"
        ) from error
    expected = {name: tuple(tensor.shape) for name, tensor in model.model.state_dict().items()}
    optional = {"log_decay"} | ({"head.weight"} if core.tied else set())
    missing = sorted(set(expected) - set(sources) - optional)
    left_over = sorted(set(sources) - set(expected))
    if missing or left_over:
        raise CheckpointError(
            f"the weights do not fit the configuration: missing {missing[:8]}, left over {left_over[:8]}"
        )
    for name, source in sources.items():
        if _shape(source) != expected[name]:
            raise CheckpointError(f"{name} has shape {_shape(source)}; expected {expected[name]} from config.json")
    reader = Reader(device, _one_dtype(sources) if dtype is None else dtype)
    head = sources.pop("head.weight", None) if core.tied else None
    if head is not None and not reader.equal(head, sources["embedding.weight"]):
        raise CheckpointError("head.weight differs from embedding.weight, though config.json ties them")
    decay = sources.pop("log_decay", None)
    weights = {name: _read(reader, source) for name, source in sources.items()}
    if core.decay_const is not None:  # always in fp32
        exact = fixed_decay(core.decay_const, core.linear_heads).to(device)
        weights["log_decay"] = exact if decay is None else Reader(device, torch.float32).read(decay)
    model.model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    model.generation_config = GenerationConfig.from_model_config(config)
    return model.requires_grad_(True).eval()


def _one_dtype(sources: dict[str, Source]) -> torch.dtype | None:
    """The widest of a file's floating-point dtypes where it mixes them; None where it has one."""
    parts = [source for name, source in sources.items() if name != "log_decay"]
    stored = [entry for part in parts for entry in (part if isinstance(part, tuple) else (part,))]
    kinds = {entry.dtype for entry in stored if entry.dtype in FLOATING}
    return functools.reduce(torch.promote_types, kinds) if len(kinds) > 1 else None


def _read(reader: Reader, source: Source) -> torch.Tensor:
    if isinstance(source, Entry):
        return reader.read(source)
    return torch.cat([reader.read(part) for part in source])
