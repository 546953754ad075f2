"""The trained model as a Hugging Face folder: bf16 weights, tokenizer, and a card that says where they come from."""

import json
import platform
import sys
from pathlib import Path

import torch
from jrt_recall.tokenizers import shipped_tokenizer
from omegaconf import DictConfig

from jrt.modeling_jrt import JRTConfig, JRTForCausalLM
from train import recall
from train.module import Training

LICENSE = "apache-2.0"


def export(task: Training, config: DictConfig, output: Path, metrics: dict[str, float]) -> None:
    """Writes ``output/model`` (weights, tokenizer, README.md) and ``output/training.json`` (what the card says, for
    programs)."""
    folder = output / "model"
    tokenizer = shipped_tokenizer()
    model = JRTForCausalLM(
        JRTConfig(architecture=task.model.config.to_dict(), vocab_tokens=len(tokenizer), source=config.name)
    )
    model.model.load_state_dict(task.model.state_dict())
    weights = model.to(torch.bfloat16)
    weights.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    record = _record(task, config, metrics)
    if config.score_items:
        scored = weights.float().model.to(_device(task)).eval()  # what is stored, computed in fp32
        record["recall"] = recall.score(scored, tokenizer, count=config.score_items)
    (output / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card(record), encoding="utf-8")


def _record(task: Training, config: DictConfig, metrics: dict[str, float]) -> dict:
    device = _device(task)
    manifest = Path(config.data.folder) / "manifest.json"
    corpus = json.loads(manifest.read_text(encoding="utf-8")) if manifest.is_file() else {}
    return {
        "name": config.name,
        "pattern": task.model.config.pattern,
        "parameters": sum(p.numel() for p in task.model.parameters()),
        "command": " ".join(
            ["python", "train/run.py", *(a for a in sys.argv[1:] if not a.startswith(("output=", "data.folder=")))]
        ),
        "seed": config.seed,
        "steps": task.trainer.global_step,
        "tokens": task.tokens_read,
        "seconds": round(task.seconds, 1),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "corpus": {key: corpus[key] for key in ("splits", "tokenizer sha256", "dropped") if key in corpus},
        "metrics": metrics,
    }


def _device(task: Training) -> torch.device:
    """Where it was trained; Lightning moves the weights to the CPU afterwards."""
    return task.trainer.strategy.root_device


def card(record: dict) -> str:
    """The model card as Markdown with the metadata block that the hub reads."""
    metadata = f"---\nlicense: {LICENSE}\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n"
    head = f"{metadata}\n# {record['name']}\n\n"
    read = f"{record['tokens'] / 1e6:.0f} M tokens in {record['steps']} steps, seed {record['seed']}"
    rows = {
        "pattern": f"`{record['pattern']}`",
        "parameters": f"{record['parameters']:,}",
        "trained on": read,
        "data": _data(record["corpus"]),
        "hardware": f"{record['device']}, torch {record['versions']['torch']}; {record['seconds']:.0f} s by the clock, "
        "compiling and other work on the device included",
        "command": f"`{record['command']}`",
    }
    rows |= {
        name: f"{value:.4f}"
        for name, value in sorted(record["metrics"].items())
        if "validation" in name or name == "train/loss"
    }
    lines = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
    measures = _MEASURES if "validation/right" in record["metrics"] else ""
    return head + _WHAT + "\n".join(lines) + "\n" + measures + _scores(record)


def _data(corpus: dict) -> str:
    if "splits" not in corpus:
        return "see the command"
    train = corpus["splits"]["train"]
    return (
        f"API text of Python packages: {train['tokens']:,} tokens in {train['documents']:,} documents, sha256 of "
        f"train.bin {train['sha256'][:16]}; by train/corpus.py, packages and versions in train/corpus_manifest.json"
    )


_WHAT = (
    "A small model that answers, from the page in front of it, which arguments a function takes. It is made to\n"
    "compare how architectures recall, and knows little else. Weights are stored in bf16 and computed in fp32.\n\n"
)

_MEASURES = (
    "\ntrain/loss is the last batch's, weighted as in train/sequences.py (with P in the pattern it also counts hidden\n"
    "tokens, so it compares with no other pattern's). validation/loss is the mean over answer tokens, and\n"
    "validation/right the share of answers all right, on packages that training never reads.\n"
)
_PAGES = (
    "\nReference pages of the standard library of Python {python} (train/corpus.py says how that library's text was\n"
    "kept out of training): percent of argument lists all right, as greedy decoding would give them, found by one\n"
    "pass over prompt and answer on the device above.\n"
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
