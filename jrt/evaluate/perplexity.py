"""Perplexity on recall hits and on all other tokens, by distance and by frequency (the paper's Figure 3).

A recall hit is a token that completes a pair of tokens that stood in the sequence before. Its distance is the number of
tokens since then. Its frequency is how often the pair stands in all other sequences of the text. The paper counts pairs
in ten million training documents, so its frequency bins cannot be compared with these. The second half of each sequence
is scored; a prefix encoder reads the first half.

Shapes: B sequences, T their tokens, V vocabulary rows.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType

import torch
from jrt_recall.files import digest, read_text
from jrt_recall.reference_pages import library_pages
from jrt_recall.tokenizers import token_ids
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from jrt.evaluate.folder import MANIFEST, former_manifest, origin, read_json
from jrt.evaluate.models import ModelSpec, OpenModel, open_model
from jrt.evaluate.shapes import check_each
from jrt.evaluate.tables.results import aligned
from jrt.system.breaks import as_value_error
from jrt.system.files import write_json

LENGTH = 2048
DISTANCES = (64, 256, 512, 1024)
FREQUENCIES = (1, 10, 100, 1000)
FAR = 1024  # tokens: only hits of at least this distance count in frequency bins, as in the paper
RESULT = "perplexity.json"

Slice = tuple[str, str, str]
"""A set of tokens whose losses are averaged: "hit" or "other"; by "all", "distance" or "frequency"; the bin's name."""


def texts(path: Path | None) -> list[str]:
    """The documents of a text file or of a folder's .txt files; None: reference pages of the running Python's modules.

    Raises ValueError if there is no such file, or if one is not UTF-8."""
    if path is None:
        return [page.text for page in library_pages()]
    files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise ValueError(f"{path}: expected a text file, or a folder with .txt files")
    return [read_text(file) for file in files]


def run(
    specs: Sequence[ModelSpec],
    documents: Sequence[str],
    output: Path,
    limit: int | None = None,
    batch_size: int = 16,
    resume: bool = False,
) -> tuple[list[dict], dict[str, str]]:
    """Measures all models on the same text, and writes perplexity.json (after each model) and a manifest to `output`.

    Args:
        limit: the most sequences; None: all.
        batch_size: prompts that `jrt eval` would read at once; here a quarter, because all logits are kept.
        resume: keep the models that the folder already holds, and measure the others.

    Returns:
        The records, and for each model that could not be measured the reason: it cannot be opened, or the text is
        shorter than one of its sequences. The manifest records the reasons too.

    Raises:
        ValueError: no model could be measured, or the folder holds something else.
    """
    identity = {
        "models": [spec.identity() for spec in specs],
        "text": digest({"text": document} for document in documents),
        "limit": limit,
    }
    records: list[dict] = []
    if former_manifest(output, identity, resume) is not None and (output / RESULT).is_file():
        records = read_json(output / RESULT)
        check_each(str(output / RESULT), records, {"model": str}, ("model",))
    kept = {"identity": identity, **origin(specs[0].device)}
    failed: dict[str, str] = {}
    for spec in specs:
        if any(record["model"] == spec.name for record in records):
            continue
        try:
            found = measure(open_model(spec), documents, limit, batch_size)
        except ValueError as error:
            failed[spec.name] = " ".join(str(error).split())
            found = []
        records += [{"model": spec.name, **record} for record in found]
        if records:
            output.mkdir(parents=True, exist_ok=True)
            complete = not failed and {spec.name for spec in specs} <= {record["model"] for record in records}
            write_json(output / MANIFEST, {**kept, "failed": failed, "complete": complete})
            write_json(output / RESULT, records)
    if not records:
        raise ValueError("; ".join(f"{name}: {reason}" for name, reason in failed.items()))
    return records, failed


def measure(model: OpenModel, documents: Sequence[str], limit: int | None, batch_size: int) -> list[dict]:
    """One record for each `Slice`: its three names (slice, by, bin), its perplexity, its number of tokens, how many
    sequences are left out because the model has no rows for some of their tokens, and notes on the model.

    Raises ValueError if the text is shorter than one sequence, if no sequence is left, or if the code of a model that is
    not ours failed."""
    length = LENGTH if model.max_length is None else min(LENGTH, model.max_length)
    cut = sequences(model.tokenizer, documents, length)[:limit]
    if not cut:
        raise ValueError(f"the text is shorter than one sequence of {length} tokens")
    rows = [row for row in cut if max(row) < model.vocabulary]
    if not rows:
        raise ValueError(f"each sequence of the text has a token beyond the model's {model.vocabulary} rows")
    notes = model.notes()
    if invalid := len(cut) - len(rows):
        notes.append(f"{invalid} sequences left out: they have tokens beyond the model's {model.vocabulary} rows")
    counts = Counter(pair for row in rows for pair in pairwise(row))
    sums: dict[Slice, float] = defaultdict(float)
    sizes: Counter[Slice] = Counter()
    batch_size = max(1, batch_size // 4 if model.mode.batches else 1)  # logits of half a sequence take much memory
    for start in tqdm(range(0, len(rows), batch_size), desc=model.spec.name, unit="batch"):
        batch = rows[start : start + batch_size]
        for row, losses in zip(batch, _losses(model, batch), strict=True):
            for keys, loss in zip(slices(row, counts), losses, strict=True):
                for key in keys:
                    sums[key] += loss
                    sizes[key] += 1
    return [
        {
            "slice": kind,
            "by": by,
            "bin": bin_,
            "perplexity": math.exp(sums[kind, by, bin_] / size),
            "tokens": size,
            "invalid": invalid,
            "notes": notes,
        }
        for (kind, by, bin_), size in sorted(sizes.items())
    ]


def sequences(tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], length: int) -> list[list[int]]:
    """The documents joined to one stream of token ids and cut into sequences of `length`; a shorter rest is left out.

    A document that spells a special token is ordinary text."""
    stream: list[int] = []
    for document in documents:
        stream += token_ids(tokenizer, document + "\n", special_is_text=True)
    return [stream[start : start + length] for start in range(0, len(stream) - length + 1, length)]


def slices(row: Sequence[int], counts: Counter) -> list[list[Slice]]:
    """For each token of the second half, the slices that it belongs to. counts: of each pair in all sequences."""
    last: dict[tuple[int, int], int] = {}
    own = Counter(pairwise(row))
    found = []
    for place, pair in enumerate(pairwise(row), start=1):
        if place >= len(row) // 2:
            keys = [("other", "all", "")]
            if pair in last:
                distance = place - last[pair]
                keys = [("hit", "all", ""), ("hit", "distance", _bin(distance, DISTANCES))]
                if distance >= min(FAR, len(row) // 2):
                    keys.append(("hit", "frequency", _bin(counts[pair] - own[pair], FREQUENCIES)))
            found.append(keys)
        last[pair] = place
    return found


@torch.no_grad()
def _losses(model: OpenModel, rows: list[list[int]]) -> list[list[float]]:
    """Negative log-likelihoods (nats) of the tokens in the second half of each row; rows have equal length."""
    ids = torch.tensor(rows, device=model.device)  # (B, T)
    half = ids.shape[1] // 2
    options = {}
    if model.ours and model.ours.core.has("P"):
        prefix = min(half, model.ours.core.enc_length)
        options["prefix_length"] = torch.full(ids.shape[:1], prefix, device=ids.device)  # (B,)
    with model.cores, as_value_error(f"{model.spec.name} cannot be run on {ids.shape[1]} tokens"):
        output = model.model(input_ids=ids, use_cache=False, logits_to_keep=ids.shape[1] - half + 1, **options)
    logits = output.logits[:, :-1].float()  # (B, T - half, V)
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, half:], reduction="none").tolist()


def table(records: Sequence[dict], failed: Mapping[str, str] = MappingProxyType({})) -> str:
    """The records as text, one column for each model. failed: models that could not be measured, and why."""
    models = [*dict.fromkeys(record["model"] for record in records), *failed]
    by_slice: dict[Slice, dict[str, str]] = {}
    for record in records:
        text = f"{record['perplexity']:.2f} ({record['tokens']})"
        by_slice.setdefault((record["slice"], record["by"], record["bin"]), {})[record["model"]] = text
    rows = [
        [" ".join(filter(None, key)), *(found.get(model, "-") for model in models)] for key, found in by_slice.items()
    ]
    title = "recall_perplexity: second half of each sequence; perplexity (tokens)"
    reasons = (f"{model}: not run: {why}" for model, why in failed.items())
    notes = {record["model"]: record.get("notes", []) for record in records}  # older files have none
    told = (f"{model}: {note}" for model, all_notes in notes.items() for note in all_notes)
    return "\n".join([title, aligned(("slice", *models), rows), *told, *reasons])


def _bin(value: int, borders: Sequence[int]) -> str:
    """The name of a value's bin. Numbers are padded to four digits, so that names sort as the bins do."""
    low = 0
    for border in borders:
        if value < border:
            return f"{low:4d} to {border - 1:4d}"
        low = border
    return f"{low:4d} and more"
