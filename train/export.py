"""Writes the trained model as a Hugging Face folder: weights, tokenizer, and a model card."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import torch
from omegaconf import DictConfig
from transformers import PreTrainedTokenizerBase

from jrt.configuration_jrt import JRTConfig
from jrt.modeling_jrt import JRTForCausalLM
from jrt.system.files import write_json, write_text
from jrt.system.provenance import commit, device_name, versions
from train import recall
from train.distributed import whole_state
from train.loop import Loop

log = logging.getLogger(__name__)
LICENSE = "apache-2.0"


def export(loop: Loop, config: DictConfig, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Writes ``output/model`` and ``output/training.json``.

    ``output/model`` holds the weights in bf16, the tokenizer and the model card README.md. ``training.json`` has the
    card's content in a form for programs. If the run keeps a moving average of the weights, the average is exported.
    All processes must call this; only the first one writes."""
    if loop.training.average is not None:
        loop.training.average.exchange()
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
        vocab_tokens=None if tokenizer is None else min(len(tokenizer), loop.config.vocab_rows),
        source=config.name,
        eos_token_id=None if tokenizer is None else tokenizer.eos_token_id,
    )
    with torch.device("meta"):
        model = JRTForCausalLM(settings)
    model.model.load_state_dict(state, assign=True)
    if loop.config.tied:
        model.model.head.weight = model.model.embedding.weight
    model = model.to(torch.bfloat16)
    model.save_pretrained(folder)
    if tokenizer is None:
        log.warning("the data does not say which tokenizer made it: %s has none; copy it there before use", folder)
    else:
        tokenizer.save_pretrained(folder)
    record = _record(loop, config, tokenizer)
    if config.score_items and tokenizer is not None:
        scored = model.float().model.to(loop.place.device).eval()  # the stored weights, computed in fp32
        record["recall"] = recall.score(scored, tokenizer, count=config.score_items)
    write_json(loop.output / "training.json", record)
    write_text(folder / "README.md", card(record))


def _without_path(argument: str) -> str:
    """An argument of the command, with PATH in place of a folder of this machine."""
    name, _, value = argument.partition("=")
    return f"{name}=PATH" if "/" in value and name != "experiment" else argument


def _record(loop: Loop, config: DictConfig, tokenizer: PreTrainedTokenizerBase | None) -> dict:
    progress = loop.progress
    return {
        "name": config.name,
        "pattern": loop.config.pattern,
        "parameters": sum(p.numel() for p in loop.model.parameters()),
        "objective": loop.objective.kind,
        "command": " ".join(["python", "train/run.py", *map(_without_path, sys.argv[1:])]),
        "seed": config.seed,
        "steps": progress.step,
        "tokens": progress.tokens,
        "seconds": round(progress.seconds, 1),
        "devices": loop.place.size,
        "device": device_name(),
        "versions": versions(),
        "commit": commit(Path(__file__).parent),
        "corpus": _corpus(config),
        "tokenizer entries": None if tokenizer is None else len(tokenizer),
        "moving average": loop.trainer.ema,
        "metrics": progress.metrics,
    }


def _corpus(config: DictConfig) -> dict:
    """The part of the data's manifest that the model card shows. Paths of this machine are left out."""
    folder = config.data.get("folder")
    manifest = Path(folder).expanduser() / "manifest.json" if folder else None
    if manifest is None or not manifest.is_file():
        return {}
    told = json.loads(manifest.read_text(encoding="utf-8"))
    kept = {key: told[key] for key in ("splits", "tokenizer", "tokenizer sha256", "dropped") if key in told}
    if str(told.get("source", "")).startswith("hub:"):
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
    if "splits" not in corpus:
        return "see the command"
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
