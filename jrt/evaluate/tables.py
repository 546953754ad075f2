"""Results as plain text: aligned columns, each table under the protocol that its numbers belong to."""

from collections.abc import Sequence
from itertools import groupby

from jrt_recall import Protocol


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of equal width, the first to the left, the others to the right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    texts = []
    for line in lines:
        cells = [
            text.ljust(width) if column == 0 else text.rjust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        ]
        texts.append("  ".join(cells).rstrip())
    return "\n".join([texts[0], "  ".join("-" * width for width in widths), *texts[1:]])


def percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}"


def size(count: int) -> str:
    """Bytes with a binary unit."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError


def model_label(record: dict) -> str:
    """The model's name, marked where prompts are longer than its training sequences."""
    return record["model"] + (" *" if record["beyond_training"] else "")


HEADER = ("model", "strategy", "accuracy", "95% interval", "items", "prompt tokens", "truncated", "seconds", "state")


def result_row(record: dict) -> list[str]:
    """The cells under HEADER."""
    return [
        model_label(record),
        record["strategy"],
        percent(record["score"]),
        f"{percent(record['low'])} to {percent(record['high'])}",
        str(record["n"]),
        f"{record['prompt_tokens']:.0f}",
        str(record["truncated"]),
        f"{record['seconds']:.1f}",
        size(record["state_bytes"]),
    ]


def protocols_of(manifest: dict) -> list[Protocol]:
    """The protocols that a run's manifest records."""
    return [Protocol(**{**known, "stop": tuple(known["stop"])}) for known in manifest["identity"]["protocols"]]


def results_text(records: Sequence[dict], protocols: Sequence[Protocol]) -> str:
    """One table for each task and protocol, with the protocol in words and the counts that the scores rest on."""
    described = {protocol.name: protocol.describe() for protocol in protocols}
    parts = []

    def group(record: dict) -> tuple[str, str]:
        return record["task"], record["protocol"]

    for (task, protocol), members in groupby(sorted(records, key=group), key=group):
        found = list(members)
        parts += [
            f"{task} | {described[protocol]}",
            counts_line(found[0]),
            aligned(HEADER, [result_row(r) for r in found]),
        ]
        parts += notes(found)
        parts.append("")
    return "\n".join(parts)


def notes(records: Sequence[dict]) -> list[str]:
    """What has to be said below a table of one task and protocol: NaN logits, long prompts."""
    found = []
    if any(record["nan"] for record in records):
        counted = ", ".join(f"{r['model']} {r['strategy']}: {r['nan']}" for r in records if r["nan"])
        found.append(f"NaN logits, counted as wrong: {counted}")
    if any(record["beyond_training"] for record in records):
        found.append("* prompts longer than the model's training sequences")
    return found


def counts_line(record: dict) -> str:
    """What happened to a task's documents."""
    return (
        f"{record['n']} items of {record['documents']} documents ({record['source']}): {record['dropped']} dropped by the "
        f"task's rules, {record['invalid']} invalid, {record['lost']} with the answer cut away"
    )


def comparison_row(found: dict) -> list[str]:
    """A paired difference: task and protocol, what is compared, points, their interval, items."""
    first, second = found["first"], found["second"]
    if found["between"] == "strategy":
        what = f"{first['model']}: {second['strategy']} - {first['strategy']}"
    else:
        what = f"{first['strategy']}: {second['model']} - {first['model']}"
    points, low, high = (f"{100 * found[key]:+.1f}" for key in ("difference", "low", "high"))
    return [f"{first['task']} {first['protocol']}", what, points, f"{low} to {high}", str(found["n"])]


def comparisons_text(comparisons: Sequence[dict]) -> str:
    """Paired differences in points, one a line."""
    rows = [[f"{place} | {what}", *rest] for place, what, *rest in map(comparison_row, comparisons)]
    return aligned(("paired difference (points)", "mean", "95% interval", "items"), rows) if rows else ""
