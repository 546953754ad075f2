"""`jrt demo`: the main question on one screen. Which models find an argument list on a page, once and twice read?

The mini models answer the same reference pages with both strategies; SmolLM2-135M, an off-the-shelf Transformer, can
join through the same code.
"""

from pathlib import Path

from jrt.evaluate.folder import read_run
from jrt.evaluate.models import SMOLLM2, ModelSpec
from jrt.evaluate.report import write_page
from jrt.evaluate.run import Outcome, Plan, Request, plan, run
from jrt.evaluate.workers import LocalPool

MINIS = ("mini-attention", "mini-mamba", "mini-based", "mini-jrt")
PAGES = "recall_reference_pages_512"
STRATEGIES = ("once", "twice")
ITEMS = 160
REAL_ITEMS = 24  # of a task: SmolLM2 reads some hundred tokens a second on two cores
BATCH = 32


def mini_plan(models: tuple[str, ...] = MINIS, limit: int = ITEMS, device: str = "cpu") -> Plan:
    """The minis on reference pages of 512 tokens."""
    specs = tuple(ModelSpec(name, device) for name in models)
    return plan(Request(specs, (PAGES,), STRATEGIES, limit=limit))


def real_plan(passages: Path | None, limit: int = REAL_ITEMS, device: str = "cpu") -> Plan:
    """SmolLM2 on real passages where a folder is given, else on reference pages."""
    spec = ModelSpec(SMOLLM2, device)
    if passages is None:
        return plan(Request((spec,), (PAGES,), STRATEGIES, limit=limit))
    tasks = tuple(f"qa_{name}" for name in ("squad", "nq", "drop") if (passages / f"{name}.jsonl").is_file())
    if not tasks:
        raise ValueError(f"{passages} holds none of squad.jsonl, nq.jsonl, drop.jsonl")
    return plan(Request((spec,), tasks, STRATEGIES, "full", limit, passages=passages))


def demo(chosen: Plan, output: Path, title: str) -> Outcome:
    """Runs a plan and writes, beside its results, figures (PNG and SVG) and report.html.

    A folder that holds the same demo, whole or in part, is gone on with."""
    outcome = run(chosen, LocalPool(), output, BATCH, resume=True)
    manifest = read_run(output)[2]
    records, predictions = outcome.records, outcome.predictions
    write_page(title, output, records, outcome.comparisons, predictions, manifest, failed=outcome.failed)
    return outcome
