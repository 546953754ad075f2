"""`jrt demo`: the main comparison of this project on one screen: prompts that hold a page once or twice.

The mini models are asked for an argument list on a page of reference documentation, with the page in the prompt once
and twice. SmolLM2-135M, an off-the-shelf Transformer, can be compared through the same code.
"""

from pathlib import Path

from jrt.evaluate.folder import Results
from jrt.evaluate.models import SMOLLM2, ModelSpec
from jrt.evaluate.report.html import write_page
from jrt.evaluate.run import Plan, Request, plan, run
from jrt.evaluate.workers import LocalPool

MINIS = ("mini-attention", "mini-mamba", "mini-based", "mini-jrt")
PAGES = "recall_reference_pages_512"
STRATEGIES = ("once", "twice")
ITEMS = 160
REAL_ITEMS = 24  # for each task; few, because SmolLM2 reads only a few hundred tokens a second on two cores
BATCH = 32


def mini_plan(models: tuple[str, ...] = MINIS, limit: int = ITEMS, device: str = "cpu") -> Plan:
    """Mini models on reference pages of 512 tokens. limit: items for each model and strategy."""
    specs = tuple(ModelSpec(name, device) for name in models)
    return plan(Request(specs, (PAGES,), STRATEGIES, limit=limit))


def real_plan(passages: Path | None, limit: int = REAL_ITEMS, device: str = "cpu") -> Plan:
    """SmolLM2 on the passages of a folder, or on reference pages if none is given.

    Raises ValueError if the folder has none of squad.jsonl, nq.jsonl and drop.jsonl."""
    spec = ModelSpec(SMOLLM2, device)
    if passages is None:
        return plan(Request((spec,), (PAGES,), STRATEGIES, limit=limit))
    tasks = tuple(f"qa_{name}" for name in ("squad", "nq", "drop") if (passages / f"{name}.jsonl").is_file())
    if not tasks:
        raise ValueError(f"{passages} holds none of squad.jsonl, nq.jsonl, drop.jsonl")
    return plan(Request((spec,), tasks, STRATEGIES, "full", limit, passages=passages))


def demo(chosen: Plan, output: Path, title: str) -> Results:
    """Runs a plan and writes its results, figures (PNG and SVG) and report.html to `output`.

    If the folder holds the same demo, finished or not, only what is missing is computed."""
    results = run(chosen, LocalPool(), output, BATCH, resume=True)
    write_page(title, output, results)
    return results
