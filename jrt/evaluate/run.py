"""A run from request to results: `run(plan, pool, output)`.

Batches are written as they come; everything else is computed from what was written, so a run that was interrupted,
went on elsewhere or was spread over workers ends with the same files.
"""

import hashlib
import logging
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import jrt_recall
from jrt_recall import contains
from tqdm import tqdm

import jrt
from jrt.evaluate.batching import Limits, batches
from jrt.evaluate.engine import Encoded, Generation, encode, prompt_limit
from jrt.evaluate.folder import RunFolder
from jrt.evaluate.plan import Cell, Plan
from jrt.evaluate.pools import Job, Pool
from jrt.evaluate.results import comparisons, record
from jrt.evaluate.subjects import ModelSpec, open_tokenizer

logger = logging.getLogger(__name__)

ON_CPU = Limits(
    size=16,
    tokens=8192,  # what more of them need falls out of a processor's caches, and small models read slower
    overhead=1024,
)
CPU_ALONE = 1024  # tokens: masked attention over padded rows costs more than decoding them together saves
ON_GPU = Limits(size=128)  # halved wherever it does not fit
_RECORDED = ("jrt", "torch", "transformers", "tokenizers", "lm_eval", "datasets", "numpy")


@dataclass(frozen=True)
class Outcome:
    """What a run ends with; the same as stands in its folder."""

    records: list[dict]
    comparisons: list[dict]
    predictions: list[dict]


def run(plan: Plan, pool: Pool, output: Path, batch_size: int | None = None, resume: bool = False) -> Outcome:
    """Answers all cells of a plan into the folder `output`.

    batch_size: prompts at once; None: as suits the device, on a CPU fewer where prompts are long.
    Raises ValueError for models that cannot be opened, a batch size below 1, and a folder that holds another run."""
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"a batch holds at least one item, got {batch_size}")
    pool.facts(plan.request.models[0])  # a model that cannot be opened fails before anything is written
    manifest = {
        "identity": plan.identity(),
        "versions": versions(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    with RunFolder(output, manifest, resume) as folder:
        return _run(plan, pool, folder, batch_size)


def _run(plan: Plan, pool: Pool, folder: RunFolder, batch_size: int | None) -> Outcome:
    prompts: dict[Cell, list[Encoded]] = {}
    state_bytes: dict[Cell, int] = {}
    cells = plan.cells()
    missing = {cell: _missing(plan, cell, folder) for cell in cells}

    def jobs() -> Iterator[Job]:
        for spec in plan.request.models:
            facts = pool.facts(spec)
            folder.note_model(facts)
            tokenizer = open_tokenizer(spec.name)
            for cell in (cell for cell in cells if cell.model == spec.name):
                found = plan.items(cell)
                limit = prompt_limit(found.protocol, facts["max_length"])
                encoded = prompts[cell] = encode(tokenizer, [item.prompt for item in found.items], limit)
                state_bytes[cell] = pool.state_bytes(spec, round(sum(len(e.ids) for e in encoded) / len(encoded)))
                for batch in batches([encoded[index].ids for index in missing[cell]], _limits(spec, facts, batch_size)):
                    chosen = [missing[cell][index] for index in batch]
                    yield Job(spec, cell, found.protocol, [encoded[index].ids for index in chosen], chosen)

    with tqdm(total=sum(map(len, missing.values())), unit="item", smoothing=0.05) as progress:
        for job, generations in pool.answers(jobs()):
            progress.set_description(f"{job.cell.model} {job.cell.task} {job.cell.strategy}", refresh=False)
            folder.append(_predictions(plan, job, prompts[job.cell], generations))
            progress.update(len(generations))

    rows = _ordered(plan, cells, folder.rows)
    models = folder.manifest["models"]
    records = [record(plan, cell, rows[cell], models[cell.model], state_bytes[cell]) for cell in cells]
    every = [row for cell in cells for row in rows[cell]]
    compared = comparisons(every, plan.request.seed)
    folder.finish(every, records, compared)
    return Outcome(records, compared, every)


def _limits(spec: ModelSpec, facts: dict, batch_size: int | None) -> Limits:
    if batch_size is not None:
        limits = Limits(batch_size)
    elif spec.device.startswith("cuda"):
        limits = ON_GPU
    else:
        limits = ON_CPU._replace(alone=CPU_ALONE if facts["attends_to_all"] else None)
    return limits._replace(shares=facts["shares_beginnings"])


def _missing(plan: Plan, cell: Cell, folder: RunFolder) -> list[int]:
    done = folder.done(cell)
    return [index for index, item in enumerate(plan.items(cell).items) if item.id not in done]


def _predictions(plan: Plan, job: Job, prompts: list[Encoded], generations: list[Generation]) -> list[dict]:
    rows = []
    for index, generation in zip(job.items, generations, strict=True):
        item, prompt = plan.items(job.cell).items[index], prompts[index]
        rows.append(
            {
                **job.cell._asdict(),
                "id": item.id,
                "prompt": item.prompt,
                "answers": list(item.answers),
                "prediction": generation.text,
                "score": int(generation.finite and contains(generation.text, item.answers)),
                "position": item.position,
                "lost": item.lost,
                "prompt_tokens": len(prompt.ids),
                "truncated": prompt.truncated,
                "new_tokens": generation.new_tokens,
                "finite": generation.finite,
                "seconds": generation.seconds,
            }
        )
    return rows


def _ordered(plan: Plan, cells: list[Cell], rows: list[dict]) -> dict[Cell, list[dict]]:
    """Predictions by cell, in the order of the items; of an item that was answered twice, the first."""
    found: dict[Cell, dict[str, dict]] = {cell: {} for cell in cells}
    for row in rows:
        found[Cell(row["model"], row["task"], row["strategy"], row["protocol"])].setdefault(row["id"], row)
    return {cell: [found[cell][item.id] for item in plan.items(cell).items] for cell in cells}


def versions() -> dict[str, str]:
    """Versions that a number depends on; `code` names the very sources that ran."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _RECORDED:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return {**found, "code": _code_sha256()}


def _code_sha256() -> str:
    """sha256 over the Python and task files of jrt and jrt_recall, by their paths within the packages."""
    digest = hashlib.sha256()
    for package in (jrt, jrt_recall):
        root = Path(package.__file__).parent
        for file in sorted(file for kind in ("*.py", "*.yaml") for file in root.rglob(kind)):
            digest.update(f"{package.__name__}/{file.relative_to(root).as_posix()}\n".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()
