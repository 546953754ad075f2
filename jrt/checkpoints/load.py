"""`jrt.load`: opens a model by name, folder or hub id, in any of the layouts of `jrt.checkpoints.names.Kind`."""

from __future__ import annotations

import functools
import inspect
import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from jrt.checkpoints import keys
from jrt.checkpoints.files import FLOATING, CheckpointError, Entry, Reader, as_checkpoint_error, entries, read_json
from jrt.checkpoints.names import MINIS, Kind, kind_of, read_config, resolve
from jrt.config import LARGEST
from jrt.configuration_jrt import JRTConfig
from jrt.model import fixed_decay
from jrt.modeling_jrt import JRTForCausalLM
from jrt.released import configurations
from jrt.released.quirks import Quirks
from jrt.short_prompts import SPACE_TOKEN, check_short_prompt
from jrt.system.breaks import as_value_error

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
# Vocabulary sizes of GPT-NeoX's tokenizer: its own, and padded as in state-spaces/mamba-* and mamba2-*.
NEOX_SIZES = (50277, 50280, 50288)
TOKEN_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id")

Source = tuple[Entry, ...]  # the entries of one tensor; several are concatenated along the first dimension
Translate = Callable[[dict, configurations.Shapes, str], JRTConfig]
TRANSLATIONS: dict[Kind, tuple[keys.Table, Translate]] = {
    Kind.RELEASED_GPT: (keys.GPT, configurations.released_gpt),
    Kind.MAMBA_SSM: (keys.MAMBA, configurations.mamba_ssm),
    Kind.MAMBA_TRANSFORMERS: (keys.MAMBA, configurations.mamba_transformers),
}


def load(
    name_or_path: str | Path,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    compat: str | Quirks | None = None,
    short_prompt: str | None = None,
) -> JRTForCausalLM:
    """Loads a model in evaluation mode.

    Args:
        name_or_path: a mini model ("mini-jrt"), a folder (ours, of the release, or of Mamba, sharded or not), or a hub
            id.
        device: where the weights go. Memory never holds all weights twice.
        dtype: of the weights (`torch.bfloat16` or "bfloat16"); None keeps the file's, except that the minis (stored in
            bf16) become fp32.
        compat: None computes as the paper says, or with the quirks that the folder's configuration has; "released"
            computes as the published numbers were measured; a `jrt.Quirks` selects single quirks.
        short_prompt: rule for prompts shorter than the encoder (`jrt.short_prompts.SHORT_PROMPTS`); None: the
            checkpoint's own, "pad" for released JRT models.

    Returns:
        The model; `model.config.source` says where it came from. Its `generation_config` is the folder's, if there is
        one.

    Raises:
        ValueError: an unknown name or option, a checkpoint that cannot be read or does not fit its configuration, or a
            device that this machine does not have.
    """
    if short_prompt is not None:
        check_short_prompt(short_prompt)
    device = checked_device(device)
    dtype = None if dtype is None else checked_dtype(dtype)
    quirks = Quirks.of(compat)
    folder = resolve(name_or_path)
    config, sources = _described(folder, str(name_or_path))
    if compat is not None:
        config.quirks = {name: True for name in quirks.active()}
    if short_prompt is not None:
        config.short_prompt = short_prompt
    if quirks.ignore_end_token:
        config.eos_token_id = None
    if folder.parent == MINIS and dtype is None:
        dtype = torch.float32
    model = _built(config, sources, device, dtype)
    model.generation_config = _generation_config(folder, config)
    if quirks.ignore_end_token:
        model.generation_config.eos_token_id = None
    return model


def configuration(folder: Path, source: str) -> JRTConfig:
    """The configuration of a folder that `load` can read. No weights are read, only (for other layouts) their shapes.

    Raises CheckpointError as `load`."""
    raw = read_config(folder)
    if kind_of(raw) is not Kind.JRT:
        return _described(folder, source)[0]
    _check_tokens(raw, "config.json")
    return _own_config(raw)


def load_tokenizer(name_or_path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, set to pad on the left. If the folder has none, it is the one of `trained_tokenizer`.

    Raises ValueError if it is neither in the folder nor in the hub's cache, nor can be downloaded."""
    folder = resolve(name_or_path)
    options = {"padding_side": "left", "trust_remote_code": False}
    if has_tokenizer(folder):
        with as_value_error(f"the tokenizer of {name_or_path} cannot be read"):
            tokenizer = AutoTokenizer.from_pretrained(str(folder), **options)
    else:
        wanted = trained_tokenizer(folder)
        try:
            tokenizer = AutoTokenizer.from_pretrained(wanted, **options)
        except OSError as error:
            owner = "GPT-2" if wanted == "gpt2" else "GPT-NeoX"
            raise ValueError(
                f"{name_or_path} has no tokenizer and {owner}'s cannot be had: download {wanted!r} once, online, or put "
                "its files into the folder"
            ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(SPACE_TOKEN)  # the release pads with this token
    return tokenizer


def checked_device(device: str | torch.device) -> torch.device:
    """The device with this name. Raises ValueError for an unknown name, or a device that torch cannot use here."""
    try:
        found = torch.device(device)
        torch.zeros(1, device=found).item()  # fails on a device that is missing, and on "meta", which holds no numbers
    except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"device {device!r} cannot be used here: expected cpu, cuda or cuda:N; "
            f"torch has {torch.cuda.device_count()} GPUs on this machine"
        ) from error
    return found


def checked_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """The dtype with this name. Raises ValueError unless it is one of DTYPES, in which models compute."""
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in DTYPES.values():
        raise ValueError(f"dtype {dtype!r}: expected {', '.join(DTYPES)} (or torch.float32, ...)")
    return found


def trained_tokenizer(folder: Path) -> str:
    """The hub name of the tokenizer that a folder without one was trained with.

    It is GPT-NeoX's for `state-spaces/*`, which the vocabulary's size tells. The release's Mamba has that size too, but
    was trained with GPT-2's tokenizer. Its configuration has fields of GPT models, and after conversion GPT-2's end
    token.
    """
    raw = read_config(folder)
    is_released = configurations.has_gpt_fields(raw) or raw.get("eos_token_id") == configurations.GPT2_END
    return "EleutherAI/gpt-neox-20b" if raw.get("vocab_size") in NEOX_SIZES and not is_released else "gpt2"


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has a tokenizer of its own."""
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json"))


def _described(folder: Path, name: str) -> tuple[JRTConfig, dict[str, Source]]:
    """A folder's configuration, and for each tensor of the model the entries of the files that hold it."""
    raw = read_config(folder)
    kind = kind_of(raw)
    if kind is Kind.OTHER:
        raise CheckpointError(
            f"{name} is a {raw.get('model_type', 'unknown')} model; expected JRT, Based, attention or Mamba: "
            "use transformers for others"
        )
    if kind is Kind.MAMBA2_SSM:
        raise CheckpointError(f"{name} is Mamba-2, which only `jrt eval`, `jrt generate` and `jrt doctor` read")
    _check_tokens(raw, "config.json")
    if raw.get("transformers_weights") is not None:
        raise CheckpointError("config.json has transformers_weights: expected the weights in model.safetensors")
    if kind is Kind.JRT:
        return _own_config(raw), _matched(entries(folder), keys.OWN)
    table, translate = TRANSLATIONS[kind]
    sources = _matched(entries(folder), table)
    if raw.get("mlp_type") == "alt":
        _stack_values_on_gates(sources)
    if "embedding.weight" not in sources and "head.weight" in sources:
        sources["embedding.weight"] = sources.pop("head.weight")  # a tied tensor may be saved under either name
    try:
        config = translate(raw, {tensor: _shape(source) for tensor, source in sources.items()}, name)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    if config.core.decay_const is None:
        sources.pop("log_decay", None)  # the release also writes it for mixers that do not use it
    return config, sources


def _own_config(raw: dict) -> JRTConfig:
    # Fields that only transformers knows are dropped: some of them can make it allocate memory.
    known = set(inspect.signature(JRTConfig).parameters) - {"kwargs"}
    with as_checkpoint_error("config.json is no jrt configuration"):
        config = JRTConfig(**{name: value for name, value in raw.items() if name in known})
    return config


def _generation_config(folder: Path, config: JRTConfig) -> GenerationConfig:
    """Read as transformers does: from generation_config.json, or from the model's configuration if there is no such
    file."""
    file = folder / "generation_config.json"
    if not file.is_file():
        return GenerationConfig.from_model_config(config)
    raw = read_json(file)
    _check_tokens(raw, file.name)
    with as_checkpoint_error(f"{file.name} is no generation configuration"):
        settings = GenerationConfig.from_dict(raw)
    return settings


def _check_tokens(raw: dict, file: str) -> None:
    """Raises CheckpointError for a special token that is neither an id nor a list of ids."""
    for name in TOKEN_FIELDS:
        value = raw.get(name)
        for token in value if isinstance(value, list) else [value]:
            if token is not None and not (type(token) is int and abs(token) < LARGEST):
                raise CheckpointError(
                    f"{file} has {name}: {reprlib.repr(value)}; expected a token id or a list of them"
                )


def _matched(described: Mapping[str, Entry], table: keys.Table) -> dict[str, Source]:
    found, unknown = keys.renamed(described, table)
    if unknown:
        raise CheckpointError(f"{len(unknown)} tensors have no place in the model: {', '.join(sorted(unknown)[:8])}")
    return {here: (described[name],) for here, name in found.items()}


def _stack_values_on_gates(sources: dict[str, Source]) -> None:
    """Joins fc3 and fc1 of MLPs of the kind "alt" to one tensor: rows of the values, then rows of the gates."""
    for name in [name for name in sources if ".mlp.fc3." in name]:
        gate = name.replace(".fc3.", ".fc1.")
        if gate not in sources:
            raise CheckpointError(f"{name} has no {gate} beside it")
        sources[gate] = sources.pop(name) + sources[gate]


def _shape(source: Source) -> tuple[int, ...]:
    first = source[0].shape
    if len(source) == 1:
        return first
    if len({part.shape[1:] for part in source}) != 1 or not first:
        names, shapes = " and ".join(part.name for part in source), ", ".join(str(part.shape) for part in source)
        raise CheckpointError(f"{names} cannot be stacked: {shapes}")
    return (sum(part.shape[0] for part in source), *first[1:])


def _built(
    config: JRTConfig, sources: dict[str, Source], device: torch.device, dtype: torch.dtype | None
) -> JRTForCausalLM:
    """Builds the model on the meta device (without memory), checks names and shapes, then reads tensor by tensor."""
    core = config.core
    if len(core.pattern) > len(sources):
        raise CheckpointError(f"config.json has {len(core.pattern)} layers and the file {len(sources)} tensors")
    with as_checkpoint_error("config.json describes no model that can be built"), torch.device("meta"):
        model = JRTForCausalLM(config)
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
    if head is not None and not reader.equal(head[0], sources["embedding.weight"][0]):
        raise CheckpointError("head.weight differs from embedding.weight, though config.json ties them")
    decay = sources.pop("log_decay", None)
    weights = {name: _read(reader, source) for name, source in sources.items()}
    if core.decay_const is not None:  # always in fp32
        exact = fixed_decay(core.decay_const, core.linear_heads).to(device)
        weights["log_decay"] = exact if decay is None else _read(Reader(device, torch.float32), decay)
    model.model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    return model.requires_grad_(True).eval()


def _one_dtype(sources: dict[str, Source]) -> torch.dtype | None:
    """The dtype that holds all of a file's floating-point dtypes, if it mixes them; None if it has only one."""
    stored = {entry.dtype for name, source in sources.items() if name != "log_decay" for entry in source}
    kinds = stored & set(FLOATING)
    return functools.reduce(torch.promote_types, kinds) if len(kinds) > 1 else None


def _read(reader: Reader, source: Source) -> Tensor:
    parts = [reader.read(entry) for entry in source]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
