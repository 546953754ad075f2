"""Writes the trained model as a Hugging Face folder: weights, tokenizer, and a model card."""

from __future__ import annotations

import copy
import json
import logging
import re
import shutil
import sys
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase

from jrt.configuration_jrt import JRTConfig
from jrt.modeling_jrt import JRTForCausalLM
from jrt.system.files import write_json, write_text
from jrt.system.provenance import commit, device_name, versions
from train import recall
from train.data.vocabulary import vocabulary_size
from train.distributed import whole_state
from train.loop import Loop

log = logging.getLogger(__name__)
_PATH = re.compile(r"[^\s,\[\]{}:'\"]*/[^\s,\[\]{}'\"]*")  # the path of a folder inside an argument
LICENSE = "apache-2.0"


def export(loop: Loop, config: DictConfig, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Writes ``output/model`` and ``output/training.json``.

    ``output/model`` holds the weights in bf16, the tokenizer and the model card README.md. ``training.json`` has the
    card's content in a form for programs. If the run keeps a moving average of the weights, the average is exported,
    and the card's validation figures are the average's. All processes must call this; only the first one writes.

    Raises:
        ValueError: the files could not be written. Those of an earlier export are unchanged.
    """
    metrics = dict(loop.progress.metrics)
    if loop.training.average is not None:
        loop.training.average.exchange()
        metrics |= loop.validate()
    state = whole_state(loop.model)
    if loop.training.average is not None:
        # Copied, because these tensors may be the parameters themselves, which the next line changes.
        state = {name: tensor.clone() for name, tensor in state.items()}
        loop.training.average.exchange()
    if not loop.place.is_first:
        return
    folder = loop.output / "model"
    settings = JRTConfig(
        architecture=loop.config.to_dict(),
        vocab_tokens=None if tokenizer is None else min(vocabulary_size(tokenizer), loop.config.vocab_rows),
        source=str(config.name),
        eos_token_id=None if tokenizer is None else tokenizer.eos_token_id,
    )
    with torch.device("meta"):
        model = JRTForCausalLM(settings)
    model.model.load_state_dict(state, assign=True)
    if loop.config.tied:
        model.model.head.weight = model.model.embedding.weight
    model = model.to(torch.bfloat16)
    record = _record(loop, config, tokenizer, metrics)
    if config.score_items and tokenizer is not None:
        scored = copy.deepcopy(model).float().model.to(loop.place.device).eval()  # the stored weights, in fp32
        record["recall"] = recall.score(scored, tokenizer, count=config.score_items)
    partial = loop.output / ".model.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        model.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        write_text(partial / "README.md", card(record))
        folder.mkdir(exist_ok=True)
        for file in partial.iterdir():
            file.replace(folder / file.name)
        write_json(loop.output / "training.json", record)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"the model could not be written to {folder} ({error}): the same command tries it again"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if tokenizer is None:
        log.warning("the data does not say which tokenizer made it: %s has none; copy it there before use", folder)


def _without_path(argument: str) -> str:
    """An argument of the command, with PATH in place of each folder of this machine.

    Names of datasets and tokenizers on the Hugging Face hub have a slash too, and stay."""
    name, _, value = argument.partition("=")
    names_hub = name in ("data.path", "data.tokenizer") and value.count("/") == 1 and value[0] not in "~./"
    if "/" not in argument or name == "experiment" or (names_hub and not _is_local(value)):
        return argument
    if not value:
        return "PATH"
    return f"{name}={_PATH.sub('PATH', value) if '{' in value else 'PATH'}"


def _is_local(name: str) -> bool:
    return Path(name).expanduser().exists()


def _record(
    loop: Loop, config: DictConfig, tokenizer: PreTrainedTokenizerBase | None, metrics: dict[str, float]
) -> dict:
    progress = loop.progress
    return {
        "name": str(config.name),
        "pattern": loop.config.pattern,
        "parameters": sum(p.numel() for p in loop.model.parameters()),
        "objective": loop.objective.kind,
        "command": " ".join(["python", "train/run.py", *map(_without_path, sys.argv[1:])]),
        "seed": config.seed,
        "steps": progress.step,
        "tokens": progress.tokens,
        "seconds": round(progress.seconds, 1),
        "devices": loop.place.size,
        "device": device_name(loop.place.device.type),
        "versions": versions(),
        "commit": commit(Path(__file__).parent),
        "corpus": _corpus(config),
        "tokenizer entries": None if tokenizer is None else vocabulary_size(tokenizer),
        "moving average": loop.trainer.ema,
        "metrics": metrics,
    }


def _corpus(config: DictConfig) -> dict:
    """What the model card says about the data. Paths of this machine are left out."""
    data = OmegaConf.to_container(config.data, resolve=True)
    assert isinstance(data, dict)
    if data.get("mixture"):
        parts = [{"weight": part["weight"]} | _manifest_of(part["folder"]) for part in data["mixture"]]
        return {"mixture": parts}
    if data.get("path"):
        name = "a dataset of this machine" if _is_local(str(data["path"])) else f"hub:{data['path']}"
        return {"source": name} | {key: data[key] for key in ("name", "train_split", "streaming") if data.get(key)}
    return _manifest_of(data["folder"]) if data.get("folder") else {}


def _manifest_of(folder: object) -> dict:
    manifest = Path(str(folder)).expanduser() / "manifest.json"
    if not manifest.is_file():
        return {}
    told = json.loads(manifest.read_text(encoding="utf-8"))
    kept = {key: told[key] for key in ("splits", "tokenizer", "tokenizer sha256", "dropped") if key in told}
    tokenizer = kept.get("tokenizer")
    if isinstance(tokenizer, dict) and _is_local(str(tokenizer.get("name"))):
        kept["tokenizer"] = {key: value for key, value in tokenizer.items() if key != "name"}
    if str(told.get("source", "")).startswith("hub:") and not _is_local(told["source"].removeprefix("hub:")):
        kept["source"] = told["source"]
    return kept


def card(record: dict) -> str:
    """Returns the model card as Markdown, with the metadata block that the hub reads."""
    metadata = f"---\nlicense: {LICENSE}\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n"
    head = f"{metadata}\n# {record['name']}\n\n"
    read = f"{record['tokens'] / 1e6:,.1f} M tokens in {record['steps']:,} steps, seed {record['seed']}, objective {record['objective']}"
    rows = {
        "pattern": f"`{record['pattern']}`",
        "parameters": f"{record['parameters']:,}",
        "trained on": read,
        "data": _data(record["corpus"]),
        "hardware": f"{record['devices']} x {record['device']}, torch {record['versions']['torch']}; {record['seconds']:.0f} s "
        "by the clock, compiling and other work on the device included",
        "command": f"`{record['command']}`",
    }
    if record["moving average"]:
        rows["weights"] = f"moving average over the steps, {record['moving average']} of the old one at each"
    rows |= {
        name: f"{value:.4f}"
        for name, value in sorted(record["metrics"].items())
        if name.startswith("validation") or name == "train/loss"
    }
    lines = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
    return head + _WHAT + "\n".join(lines) + "\n" + _MEASURES + _scores(record)


def _data(corpus: dict) -> str:
    if "mixture" in corpus:
        return "; ".join(f"weight {part['weight']}: {_data(part)}" for part in corpus["mixture"])
    if "splits" not in corpus:
        settings = ", ".join(f"{name} {value}" for name, value in corpus.items() if name not in ("source", "weight"))
        return corpus.get("source", "see the command") + (f" ({settings})" if settings else "")
    train = corpus["splits"]["train"]
    source = f"{corpus['source']}: " if "source" in corpus else ""
    return f"{source}{train['tokens']:,} tokens in {train['documents']:,} documents, sha256 of train.bin {train['sha256'][:16]}"


_WHAT = (
    "A language model of the project jrt (*Just read twice*, arXiv 2407.05483). Weights are stored in bf16.\n"
    "Load it with `jrt.load(folder)`, or after `import jrt` with transformers' `AutoModelForCausalLM`.\n\n"
)
_MEASURES = (
    "\ntrain/loss is the last batch's objective (with a masked part where the prefix is encoded, so it compares with no\n"
    "other pattern's). validation/loss is the mean next-token loss on held-out text with nothing hidden;\n"
    "validation/right is the share of held-out questions whose answer greedy decoding would give.\n"
)
_PAGES = (
    "\nReference pages of the standard library of Python {python}: percent of argument lists all right, as greedy decoding\n"
    "would give them, found by one pass over prompt and answer on the device above.\n"
)


def _scores(record: dict) -> str:
    if not record.get("recall"):
        return ""
    lines = [
        _PAGES.format(python=record["versions"]["python"]),
        "| window | strategy | score | items |",
        "|---|---|---|---|",
    ]
    lines += [f"| {row['window']} | {row['strategy']} | {row['score']:.1f} | {row['n']} |" for row in record["recall"]]
    return "\n".join(lines) + "\n"
