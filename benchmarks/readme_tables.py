"""Writes the tables of README.md and of some pages of docs/ from benchmarks/results/*.json.

In a document, `<!-- table: NAME -->` and `<!-- /table -->` mark the place of a table. The text between them is
replaced.

python benchmarks/readme_tables.py          # rewrites the documents
python benchmarks/readme_tables.py --check  # exit status 1 where it would change anything
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import record
import table_times

ROOT = Path(__file__).parent.parent
DOCUMENTS = (
    ROOT / "README.md",
    ROOT / "synthetics" / "README.md",
    *(ROOT / "docs" / name for name in ("figures.md", "batching.md", "tables.md")),
)
MARKED = re.compile(r"(<!-- table: ([\w ,]+) -->\n).*?(<!-- /table -->)", re.DOTALL)


def load(name: str) -> dict:
    return json.loads((record.RESULTS / f"{name}.json").read_text())


def rows_as_markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def origin(report: dict) -> str:
    """The line below a table. Rows that were kept from earlier runs of the benchmark have commits of their own."""
    commits = ", ".join(dict.fromkeys(row.get("commit", report["commit"]) for row in report["rows"]))
    return f"\n{report['device']}, torch {report['versions']['torch']}, commit {commits}, {report['date']}.\n"


def minis() -> str:
    report = load("recall_minis")
    cells = {(row["model"], row["protocol"], row["strategy"]): row for row in report["rows"]}
    models, protocols, strategies = (list(dict.fromkeys(key[i] for key in cells)) for i in range(3))
    header = ["model", "state, KiB"] + [
        f"{p.removeprefix('pages-')} {s.replace('_', ' ')}" for p in protocols for s in strategies
    ]
    rows = []
    for model in models:
        mine = [cells[(model, p, s)] for p in protocols for s in strategies]
        scores = [f"{100 * row['score']:.1f} ({100 * row['low']:.0f}-{100 * row['high']:.0f})" for row in mine]
        sizes = sorted({round(row["state_bytes"] / 1024) for row in mine})
        rows.append([model, f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}", *scores])
    items = sorted({row["n"] for row in report["rows"]})
    note = f"\nColumns: window in tokens, strategy; percent right (95% interval). {' or '.join(map(str, items))} items a cell.\n"
    return rows_as_markdown(header, rows) + note + origin(report)


def prefill() -> str:
    report = load("lin_attn_profile")
    methods = ("Based", "JRT-RNN", "JRT-Prompt", "FlashAttention-2", "cuDNN", "fla fused_chunk_based")
    wanted = [(16, 2048), (16, 8192), (16, 32768), (16, 131072), (1, 32768)]
    found = {(row["method"], row["shape"]["B"], row["shape"]["N"]): row for row in report["rows"]}

    def cell(method: str, batch: int, length: int) -> str:
        row = found.get((method, batch, length))
        if row is None or row["ms"] is None:
            return "-"
        floor = f" ({row['percent_of_floor']:.0f}% of the floor)" if method in methods[:2] else ""
        return f"{row['ms']:.3g}{floor}" if row["ms"] < 100 else f"{row['ms']:,.0f}"

    rows = [[method, *(cell(method, *shape) for shape in wanted)] for method in methods]
    ratios = (found["JRT-RNN", *shape]["x_flash_attention_2"] for shape in wanted)
    rows.append(["JRT-RNN, times FlashAttention-2", *(f"{ratio:.0f}" for ratio in ratios)])
    header = ["ms", *(f"B{batch} N{length:,}" for batch, length in wanted)]
    steps = [found["decode step", batch, 1] for batch in (1, 16, 128, 1024)]
    step_rows = [
        ["decode step, one layer", *(f"{row['ms']:.3g} ({row['percent_of_floor']:.0f}% of the floor)" for row in steps)]
    ]
    step_header = ["ms", *(f"B{row['shape']['B']:,}" for row in steps)]
    return rows_as_markdown(header, rows) + "\n" + rows_as_markdown(step_header, step_rows) + origin(report)


def prefill_in_short() -> str:
    report = load("lin_attn_profile")
    found = {(row["method"], row["shape"]["B"], row["shape"]["N"]): row for row in report["rows"]}
    methods, shapes = (
        ("Based", "JRT-RNN", "FlashAttention-2", "fla fused_chunk_based"),
        ((16, 2048), (16, 32768), (1, 32768)),
    )
    rows = [[method, *(f"{found[method, *shape]['ms']:.3g}" for shape in shapes)] for method in methods]
    return rows_as_markdown(["ms", *(f"B{b} N{n:,}" for b, n in shapes)], rows) + origin(report)


OP_ROWS = (  # method, backend
    ("Based", "cuda"),
    ("Based", "triton"),
    ("JRT-RNN", "cuda"),
    ("JRT-RNN", "triton"),
    ("Based", "chunked"),
    ("FlashAttention-2", "sdpa"),
    ("cuDNN", "sdpa"),
    ("fla parallel_based", "fla"),
    ("fla fused_chunk_based", "fla"),
    ("fla GLA", "fla"),
    ("fla gated delta rule", "fla"),
    ("power attention", "retention"),
)


OP_SHAPES = (  # pass, B, N
    ("forward", 8, 2048),
    ("forward+backward", 8, 2048),
    ("forward+backward", 1, 32768),
    ("forward", 16, 32768),
)


def op_training() -> str:
    report = load("op_training")
    found = {
        (row["method"], row["backend"], row["pass"], row["shape"]["B"], row["shape"]["N"]): row
        for row in report["rows"]
    }
    rows = []
    for method, backend in OP_ROWS:
        if not any((method, backend, *shape) in found for shape in OP_SHAPES):
            continue
        cells = []
        for shape in OP_SHAPES:
            row = found.get((method, backend, *shape))
            if row is None or row["ms"] is None:
                cells.append("-")
                continue
            extra = row["extra_bytes"] / row["input_bytes"]
            cells.append(f"{row['ms']:.3g} ({extra:.2f} x)")
        rows.append([f"{method}, {backend}", *cells])
    header = ["ms (memory beyond inputs, output and gradients, times the inputs)"]
    header += [f"{what.replace('+', ' + ')} B{batch} N{length:,}" for what, batch, length in OP_SHAPES]
    return rows_as_markdown(header, rows) + origin(report)


def layers() -> str:
    report = load("layers")
    found = {(row["layer"], row["implementation"], row["pass"]): row for row in report["rows"]}
    rows = []
    for layer, implementation in dict.fromkeys(key[:2] for key in found):
        ms = [found[layer, implementation, name]["ms"] for name in ("forward", "forward+backward")]
        if None not in ms:
            rows.append([layer, implementation, *(f"{each:.3g}" for each in ms)])
    return rows_as_markdown(["layer", "implementation", "forward, ms", "forward + backward, ms"], rows) + origin(report)


def training(name: str = "train_throughput") -> str:
    report = load(name)
    plain = {row["method"].rsplit(" ", 1)[1]: row for row in report["rows"] if row["method"].startswith("plain")}
    rows = []
    for row in report["rows"]:
        beside = plain[row["method"].replace("-", " ").rsplit(" ", 1)[1]]
        name = row["method"] + (", activation checkpointing" if row["activation_checkpointing"] else "")
        speed = f"{row['tokens_per_s'] / 1000:.1f} k ({row['tokens_per_s'] / beside['tokens_per_s']:.2f} x)"
        rows.append([name, str(row["shape"]["B"]), speed, f"{row['mfu']:.3f}", f"{row['memory_gib']:.1f}"])
        rows[-1] += [f"{row['first_step_s']:.0f}", row["backend"]]
    header = ["", "rows", "tokens/s (times plain)", "6N MFU", "GiB", "first step, s", "computed by"]
    return rows_as_markdown(header, rows) + origin(report)


def scaling() -> str:
    report = load("train_scaling")
    rows = []

    def place(row: dict) -> tuple:
        return row["method"], row["shape"]["B"] // row["gpus"], row["strategy"], row["gpus"]

    for row in sorted(report["rows"], key=place):
        gains = [
            f"{kind} {100 * row[key]:.1f}%"
            for kind in row["scaling"]
            if row["gpus"] > 1 and (key := f"{kind.replace(' ', '_')}_efficiency") in row
        ]
        if row["gpus"] > 1 and not gains:
            continue  # its run on one GPU is not there
        passes = row["shape"]["B"] // row["gpus"] // row["rows_a_pass"]
        rows.append([row["method"], str(row["gpus"]), row["strategy"] if row["gpus"] > 1 else "-"])
        rows[-1] += [f"{row['shape']['B']} ({passes})", f"{row['tokens_per_s'] / 1000:.1f} k", ", ".join(gains) or "-"]
        rows[-1] += [f"{row['mfu']:.3f}", f"{row['memory_gib']:.1f}"]
        rows[-1].append(f"{row['loss_difference']:.1e}" if "loss_difference" in row else "-")
    header = ["", "GPUs", "strategy", "rows a step (passes)", "tokens/s", "efficiency", "6N MFU", "GiB a GPU", "losses"]
    return rows_as_markdown(header, rows) + origin(report)


def generation() -> str:
    report = load("generation")
    found = {(row["method"], row["shape"]["B"], row["shape"]["N"]): row for row in report["rows"]}
    shapes = list(dict.fromkeys(key[1:] for key in found))

    def cell(method: str, shape: tuple[int, int]) -> str:
        row = found.get((method, *shape))
        if row is None or row["ms_per_token"] is None:
            return "-"
        floor = f" ({row['percent_of_floor']:.0f}%)"
        return f"{row['first_token_ms']:,.0f}; {row['ms_per_token']:.3g}{floor}; {row['tokens_per_s']:,.0f}"

    rows = [[method, *(cell(method, shape) for shape in shapes)] for method in dict.fromkeys(key[0] for key in found)]
    header = ["ms to the first token; then ms a token (% of the floor); tokens/s"]
    header += [f"B{batch} N{length:,}" for batch, length in shapes]
    return rows_as_markdown(header, rows) + generation_notes(report) + origin(report)


def generation_notes(report: dict) -> str:
    """Returns the notes below the generation table: differing tokens in bf16, and why."""
    compared = [row for row in report["rows"] if row["compared_tokens"]]
    header = ["bf16, B16", "tokens that differ", "error here", "error of transformers' loop", "gap"]
    rows = [
        [
            row["method"],
            f"{row['differing_tokens']} of {row['compared_tokens']:,}",
            *(f"{row[name]:.3f}" for name in ("error", "loop_error", "gap")),
        ]
        for row in compared
    ]
    note = (
        "\nTokens that differ from those of transformers' own loop. An error is the distance of the second token's logits"
        " from those in fp32, over their size; the gap, in the same unit, is the median distance between the two largest"
        " logits. The models have random weights, and where the gap is small rounding chooses the token.\n\n"
    )
    return note + rows_as_markdown(header, rows)


def generation_in_short() -> str:
    report = load("generation")
    found = {(row["method"], row["shape"]["B"]): row for row in report["rows"] if row["shape"]["N"] == 1024}
    rows = []
    for method in dict.fromkeys(key[0] for key in found):
        mine = [found.get((method, batch)) for batch in (1, 16, 128)]
        if mine[0] is None or mine[0]["ms_per_token"] is None:
            continue
        rates = ("-" if row is None or row["tokens_per_s"] is None else f"{row['tokens_per_s']:,.0f}" for row in mine)
        rows.append([method, f"{mine[0]['first_token_ms']:.0f}", f"{mine[0]['ms_per_token']:.3g}", *rates])
    header = [
        "prompt of 1,024 tokens, bf16",
        "first token, ms",
        "ms a token, batch 1",
        "tokens/s, batch 1",
        "batch 16",
        "batch 128",
    ]
    return rows_as_markdown(header, rows) + origin(report)


def whole_models() -> str:
    report = load("model_prefill")
    found = {(r["method"], r["shape"]["B"], r["shape"]["N"], r["kernels"]): r["ms"] for r in report["rows"]}
    shapes = list(dict.fromkeys(key[1:3] for key in found))
    rows = [
        [
            f"{model}, {'kernels' if kernels else 'PyTorch'}",
            *(f"{found[model, *shape, kernels]:.0f}" for shape in shapes),
        ]
        for model in dict.fromkeys(key[0] for key in found)
        for kernels in (True, False)
    ]
    return rows_as_markdown(["ms", *(f"B{b} N{n:,}" for b, n in shapes)], rows) + origin(report)


def cpu() -> str:
    ops, decode = load("cpu_ops"), load("cpu_decode")
    rows = [
        [
            f"{row['method']}, B1 H16 T{row['shape']['T']:,} d16 D64 fp32",
            f"{row['ms']:,.0f} ms",
            f"{row['x_quadratic']:.0f} x quadratic, extra memory {row['extra_memory_over_inputs']:.1f} x inputs",
        ]
        for row in ops["rows"]
    ]
    rows += [
        [
            f"decode {row['method']}, batch 1",
            f"{row['tokens_per_second']:.0f} tokens/s",
            f"{row['prefill_ms']:.0f} ms to read {row['shape']['T']} tokens",
        ]
        for row in decode["rows"]
    ]
    return rows_as_markdown(["what", "time", ""], rows) + origin(ops) + origin(decode)


def cpu_decode_before() -> str:
    report = load("cpu_decode_before")
    rows = [
        [
            row["method"],
            f"{row['tokens_per_processor_second']:.0f}",
            f"{row['tokens_per_processor_second_before']:.0f}",
            f"{row['times_before']:.2f} x",
        ]
        for row in report["rows"]
    ]
    header = ["tokens a processor second, batch 1", "now", f"commit {report['commit_before']}", ""]
    return rows_as_markdown(header, rows) + origin(report)


def evaluation() -> str:
    rows = []
    reports = [load("recall_eval_gpu"), load("recall_eval_gpu_attention"), load("recall_eval_cpu")]
    for report in reports:
        device = "CPU" if "threads" in report["device"] else "H100"
        cells: dict[tuple[str, str], dict[str, dict]] = {}
        for row in report["rows"]:
            cells.setdefault((row["shape"]["model"], row["shape"]["task"]), {})[row["method"]] = row
        for (model, task), ways in cells.items():
            speedups = [ways.get(f"lm-eval, batch {size}", {}).get("speedup_of_jrt_eval") for size in (1, 16, "auto")]
            rows.append(
                [
                    f"{device}, {model}",
                    task.removeprefix("recall_"),
                    f"{ways['jrt eval']['items_per_second']:.0f}",
                    *("-" if speedup is None else f"{speedup:.2f} x" for speedup in speedups),
                ]
            )
    header = ["", "task", "items/s", "lm-eval, batch 1", "batch 16", "batch auto"]
    return rows_as_markdown(header, rows) + "".join(dict.fromkeys(map(origin, reports)))


def evaluation_in_short() -> str:
    rows = []
    reports = [load("recall_eval_gpu"), load("recall_eval_gpu_attention"), load("recall_eval_cpu")]
    for name, parts in (("H100", reports[:2]), ("two CPU cores", reports[2:])):
        speedups: dict[str, list[float]] = {}
        for row in (row for part in parts for row in part["rows"]):
            if "speedup_of_jrt_eval" in row:
                speedups.setdefault(row["method"], []).append(row["speedup_of_jrt_eval"])
        found = (speedups.get(f"lm-eval, batch {size}") for size in (1, 16, "auto"))
        rows.append([name, *("-" if each is None else f"{min(each):.2f} to {max(each):.2f} x" for each in found)])
    header = ["`jrt eval`, times plain lm-eval", "batch 1", "batch 16", "batch auto"]
    return rows_as_markdown(header, rows) + "".join(dict.fromkeys(map(origin, reports)))


def busy_machine() -> str:
    report = load("busy_machine")
    found = {(row["model"], row["machine"], row["threads"]): row["seconds"] for row in report["rows"]}
    rows = [
        [f"{model}, {machine}", *(f"{found[model, machine, way]:.2f}" for way in ("chosen", "all cores", "one thread"))]
        for model, machine in dict.fromkeys(key[:2] for key in found)
    ]
    header = [f"seconds for {report['limit']} answers", "`jrt eval`", "all cores", "one thread"]
    return rows_as_markdown(header, rows) + origin(report)


def set_disjointness() -> str:
    report = load("set_disjointness")
    models = list(dict.fromkeys((row["width"], row["feature_dim"]) for row in report["rows"]))
    found = {(row["method"], row["width"], row["feature_dim"]): row for row in report["rows"]}
    panels = ("short list first", "long list first")
    rows = [
        [method, *(" / ".join(f"{100 * found[method, *model][panel]:.1f}" for panel in panels) for model in models)]
        for method in dict.fromkeys(row["method"] for row in report["rows"])
    ]
    sizes = [
        f"{next(row['state_bytes'] for key, row in found.items() if key[1:] == model):,} bytes" for model in models
    ]
    seeds = sorted({row["seeds"] for row in report["rows"]})
    note = f"\nPercent right, short list first / long list first, by size of the state; mean of {seeds[0]} seeds.\n"
    return rows_as_markdown(["", *sizes], rows) + note + origin(report)


def figure2(parts: tuple[str, ...]) -> str:
    """Percent right with the longer list first, by size of the state, of the two largest widths.

    parts: the ends of the names of the tables (`equal_state*.csv`) whose columns are shown."""
    folder = ROOT / "synthetics" / "results" / "figure2"
    tables = []
    for part in parts:
        with (folder / f"equal_state{part}.csv").open(newline="") as stream:
            tables.append([row for row in csv.DictReader(stream) if int(row["width"]) >= 96])

    def percent(row: dict[str, str], method: str) -> str:
        return f"{100 * float(row[method]):.1f} ± {100 * float(row[f'{method} ±']):.1f}" if row[method] else "-"

    methods = ("prefix", "causal", "twice")
    rows = [
        [f"{int(same[0]['state_bytes']):,}", same[0]["width"], same[0]["feature_dim"]]
        + [percent(row, method) for row in same for method in methods]
        for same in zip(*tables, strict=True)
    ]
    names = [method + (f", {part[1:].replace('-', ' ')}" if part else "") for part in parts for method in methods]
    runs = json.loads((folder / "results.json").read_text())["rows"]
    return rows_as_markdown(["state, bytes", "width", "feature size", *names], rows) + origin(runs[-1] | {"rows": runs})


def scaling_in_short() -> str:
    """Weak scaling of both models at the recipe's batch."""
    report = load("train_scaling")
    weak = [row for row in report["rows"] if "weak" in row["scaling"]]
    found = {(row["method"], row["gpus"]): row for row in weak}
    gpus = sorted({count for _, count in found})

    def cell(method: str, count: int) -> str:
        row = found.get((method, count))
        return "-" if row is None else f"{row['tokens_per_s'] / 1000:.1f} k ({100 * row['weak_efficiency']:.1f}%)"

    rows = [[method, *(cell(method, count) for count in gpus)] for method in ("jrt-360m", "jrt-1.3b")]
    header = ["tokens/s (% of N times one GPU)", *(f"{count} GPU" + "s" * (count > 1) for count in gpus)]
    return rows_as_markdown(header, rows) + origin(report | {"rows": weak})


def times_of_tables() -> str:
    return rows_as_markdown(["table", "minutes of one H100, estimated"], table_times.estimates())


TABLES: dict[str, Callable[[], str]] = {
    "minis": minis,
    "prefill": prefill,
    "prefill, in short": prefill_in_short,
    "op training": op_training,
    "layers": layers,
    "training": training,
    "scaling": scaling,
    "training, large": lambda: training("train_throughput_1.3b"),
    "whole models": whole_models,
    "generation": generation,
    "generation, in short": generation_in_short,
    "cpu": cpu,
    "cpu decoding, before and now": cpu_decode_before,
    "evaluation": evaluation,
    "busy machine": busy_machine,
    "times of tables": times_of_tables,
    "evaluation, in short": evaluation_in_short,
    "scaling, in short": scaling_in_short,
    "set disjointness": set_disjointness,
    "figure 2": lambda: figure2(("", "-trained-lengths")),
    "figure 2, in short": lambda: figure2(("-trained-lengths",)),
}


def rewritten(text: str) -> str:
    """Returns the document with each marked table replaced. Raises KeyError for an unknown table name."""
    return MARKED.sub(lambda match: match[1] + TABLES[match[2]]() + match[3], text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    changed = {path: rewritten(path.read_text()) for path in DOCUMENTS}
    changed = {path: text for path, text in changed.items() if text != path.read_text()}
    if arguments.check:
        sys.exit(bool(changed))
    for path, text in changed.items():
        path.write_text(text)


if __name__ == "__main__":
    main()
