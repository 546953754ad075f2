"""From predictions to numbers: one record per cell with its interval, and paired differences between cells."""

from itertools import combinations

from jrt_recall.statistics import bootstrap, paired_difference

from jrt.evaluate.folder import cell_of
from jrt.evaluate.plan import Cell, Plan


def record(plan: Plan, cell: Cell, rows: list[dict], facts: dict, state_bytes: int) -> dict:
    """The record of one cell. score, low and high lie between 0 and 1; seconds is compute time summed over batches.

    truncated: items that lost prompt tokens to a limit; nan: items whose logits had a NaN (they count as wrong)."""
    found = plan.items(cell)
    interval = bootstrap([row["score"] for row in rows], seed=plan.request.seed)
    longest = max(row["prompt_tokens"] for row in rows)
    train_length = facts["train_length"]
    return {
        **cell._asdict(),
        "score": interval.mean,
        "low": interval.low,
        "high": interval.high,
        "n": len(rows),
        "documents": found.documents,
        "dropped": found.dropped,
        "invalid": len(found.invalid),
        "lost": found.lost,
        "absent": found.absent,
        "truncated": sum(row["truncated"] > 0 for row in rows),
        "nan": sum(not row["finite"] for row in rows),
        "prompt_tokens": sum(row["prompt_tokens"] for row in rows) / len(rows),
        "seconds": sum(row["seconds"] for row in rows),
        "state_bytes": state_bytes,
        "beyond_training": train_length is not None and longest > train_length,
        "source": found.source,
    }


def comparisons(rows: list[dict], seed: int = 0) -> list[dict]:
    """Paired differences over the same items: strategies of one model, then models under one strategy.

    difference = second - first, in score units, with its 95% interval."""
    cells: dict[Cell, dict[str, float]] = {}
    for row in rows:
        cells.setdefault(cell_of(row), {})[row["id"]] = row["score"]
    found = []
    for first, second in combinations(cells, 2):
        differing = [name for name in Cell._fields if getattr(first, name) != getattr(second, name)]
        if differing not in (["strategy"], ["model"]):
            continue
        shared = [item for item in cells[first] if item in cells[second]]
        if not shared:
            continue
        scores = [[cells[cell][item] for item in shared] for cell in (first, second)]
        interval = paired_difference(*scores, seed=seed)
        found.append(
            {
                "between": differing[0],
                "first": first._asdict(),
                "second": second._asdict(),
                "difference": interval.mean,
                "low": interval.low,
                "high": interval.high,
                "n": len(shared),
            }
        )
    return found
