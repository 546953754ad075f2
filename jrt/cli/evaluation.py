"""`jrt demo | eval | report | data`: recall evaluations, their tables, and the datasets that they read."""

from __future__ import annotations

import argparse
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from jrt.cli.options import FAILED, OK, Parser, add_names, model_options, model_spec, path, positive, seed

if TYPE_CHECKING:
    from jrt.evaluate import ModelSpec
    from jrt.evaluate.workers import Pool


def add_demo(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = commands.add_parser("demo", help="the mini models on reference pages, read once and twice")
    add = parser.add_argument
    add("--output", type=path, default=Path("demo"), help="folder (default: demo)")
    add_names(parser, "--models", "other models, separated by commas")
    add("--limit", type=positive, help="items for each model and strategy")
    add("--real", action="store_true", help="SmolLM2-135M, an off-the-shelf model, instead of the minis")
    add("--passages", type=path, help="with --real: folder of passages with questions, instead of pages")
    add("--device", default="cpu")
    parser.set_defaults(command=_demo, kept="; what was answered is kept: the same command goes on")


def _demo(arguments: argparse.Namespace) -> int:
    from jrt.evaluate import demo
    from jrt.evaluate.tables.results import comparisons_text, results_text

    if arguments.real:
        if arguments.models is not None:
            raise ValueError("--models goes without --real, which names its own model")
        chosen = demo.real_plan(arguments.passages, arguments.limit or demo.REAL_ITEMS, arguments.device)
        title = "SmolLM2-135M, once and twice"
    else:
        if arguments.passages is not None:
            raise ValueError("--passages goes with --real")
        models = demo.MINIS if arguments.models is None else arguments.models
        chosen = demo.mini_plan(models, arguments.limit or demo.ITEMS, arguments.device)
        title = "Just read twice: mini models on reference pages"
    results = demo.demo(chosen, arguments.output, title)
    print(f"{results_text(results)}\n{comparisons_text(results.comparisons)}")
    print(f"\nreport: {arguments.output / 'report.html'}   figures: accuracy, state, position (.png, .svg)")
    return FAILED if results.failed else OK


def add_eval(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = commands.add_parser("eval", help="recall of any causal language model")
    add = parser.add_argument
    add_names(parser, "--model", "mini-jrt, smollm2, folders, hub ids; separated by commas", required=True)
    tasks = "recall_fda (or fda), recall_nq_1024, recall_reference_pages_512, qa_squad ..."
    add_names(parser, "--tasks", tasks, required=True)
    add_names(parser, "--strategy", "once, twice, question_first, 3x ...; separated by commas", default=("once",))
    protocols = "jrt-table1, jrt-table2, full, w1536-a64 (any window), lm-eval-v1 ...; separated by commas"
    add_names(parser, "--protocol", f"{protocols} (default: the task's)")
    add("--limit", type=positive, help="items for each cell of the table (default: all)")
    add("--batch-size", type=positive, help="prompts at once (default: as suits the device)")
    add("--output", type=path, required=True, help="folder for results.json, predictions.jsonl, manifest.json")
    add("--resume", action="store_true", help="go on with the same run in that folder")
    add("--seed", type=seed, default=0, help="choice of reference pages, bootstrap")
    add("--data", type=path, help="mirror folder of the published datasets (default: $JRT_DATA, then the hub)")
    add("--passages", type=path, help="folder of the qa_ tasks (default: $JRT_PASSAGES)")
    add("--cut-with", help="another cutting tokenizer; renames the protocol")
    add(
        "--text", type=path, help="recall_perplexity: a text file, or a folder of .txt files (default: reference pages)"
    )
    add("--workers", type=positive, help="Ray actors, one model copy each (default: this process)")
    add("--ray-address", help="an existing Ray cluster")
    model_options(parser)
    parser.set_defaults(command=_eval, kept="; what was answered is kept: the same command with --resume goes on")


def _eval(arguments: argparse.Namespace) -> int:
    from jrt.evaluate import LocalPool, Request, plan, run
    from jrt.evaluate.tables.results import comparisons_text, results_text
    from jrt.evaluate.tables.side_by_side import protocols_side_by_side
    from jrt.evaluate.workers import RayPool

    specs = tuple(model_spec(arguments, name) for name in arguments.model)
    if "recall_perplexity" in arguments.tasks:
        return _perplexity(arguments, specs)
    if arguments.text is not None:
        raise ValueError("--text is what recall_perplexity reads: it goes with no other task")
    request = Request(
        models=specs,
        tasks=arguments.tasks,
        strategies=arguments.strategy,
        protocol=arguments.protocol,
        limit=arguments.limit,
        seed=arguments.seed,
        data=arguments.data,
        passages=arguments.passages,
        cut_with=arguments.cut_with,
    )
    chosen = plan(request)
    pool: AbstractContextManager[Pool]
    if arguments.workers is None and arguments.ray_address is None:
        pool = nullcontext(LocalPool())
    else:
        gpus = 1 if arguments.device.startswith("cuda") else 0
        pool = RayPool(arguments.workers or 1, arguments.ray_address, gpus)
    with pool as workers:
        results = run(chosen, workers, arguments.output, arguments.batch_size, arguments.resume)
    print(results_text(results))
    if several := protocols_side_by_side(results):
        print(f"{several}\n")
    if results.comparisons:
        print(comparisons_text(results.comparisons))
    print(f"\nresults: {arguments.output / 'results.json'}   report: jrt report {arguments.output}")
    return FAILED if results.failed else OK


def _perplexity(arguments: argparse.Namespace, specs: tuple[ModelSpec, ...]) -> int:
    from jrt.evaluate import perplexity
    from jrt.evaluate.report import plots

    if len(arguments.tasks) > 1:
        raise ValueError("recall_perplexity measures perplexity, not answers: ask for it alone")
    if arguments.strategy != ("once",) or arguments.protocol is not None:
        raise ValueError("recall_perplexity reads a text as it stands: it takes no strategy and no protocol")
    for option in ("workers", "ray_address", "data", "passages", "cut_with"):
        if getattr(arguments, option) is not None:
            raise ValueError(f"recall_perplexity takes no --{option.replace('_', '-')}: leave it out")
    documents = perplexity.texts(arguments.text)
    size = arguments.batch_size or 16
    records, failed = perplexity.run(specs, documents, arguments.output, arguments.limit, size, arguments.resume)
    plots.save(plots.by_recall(records), arguments.output)
    print(f"{perplexity.table(records, failed)}\n\nfigure: {arguments.output / 'figure3.png'} (and .svg)")
    return FAILED if failed else OK


def add_report(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = commands.add_parser("report", help="tables, figures and an HTML page from finished runs")
    add = parser.add_argument
    add("runs", type=path, nargs="+", help="output folders of `jrt eval`, or folders that hold them")
    add("--output", type=path, help="folder (default: the first run's)")
    add(
        "--layout",
        help="table1, 2, 3, 4, 5, 7, 8, 9, 10, 13, 14 or mean-gain of the paper, published values beside measured ones",
    )
    parser.set_defaults(command=_report)


def _report(arguments: argparse.Namespace) -> None:
    from jrt.evaluate.report.collected import collect

    output = arguments.output or arguments.runs[0]
    if arguments.output is None and output.is_file():
        output = output.parent
    text, files = collect(arguments.runs, output, arguments.layout)
    print(f"{text}\nwritten to {output}: {', '.join(files)}")


def add_data(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = commands.add_parser("data", help="a local mirror of the published datasets")
    actions = parser.add_subparsers(required=True, metavar="ACTION", parser_class=Parser)
    fetch = actions.add_parser("fetch", help="from the hub into the mirror")
    verify = actions.add_parser("verify", help="hashes and columns of the mirror's files")
    for action in (fetch, verify):
        action.add_argument("tasks", nargs="*", help="default: all published tasks")
    bring = actions.add_parser("import", help="from a .jsonl, .json or .parquet file into the mirror")
    bring.add_argument("task")
    bring.add_argument("file", type=path)
    for action, command in ((fetch, _fetch), (verify, _verify), (bring, _import)):
        action.add_argument("--folder", type=path, help="the mirror (default: $JRT_DATA)")
        action.set_defaults(command=command)


def _fetch(arguments: argparse.Namespace) -> None:
    from jrt_recall import PUBLISHED, data

    for file in data.fetch(arguments.tasks or PUBLISHED, arguments.folder):
        print(file)


def _verify(arguments: argparse.Namespace) -> int:
    from jrt_recall import data

    found = data.verify(arguments.tasks or None, arguments.folder)
    for checked in found:
        print(("ok   " if checked.ok else "WRONG") + f"  {checked.message}")
    return OK if all(checked.ok for checked in found) else FAILED


def _import(arguments: argparse.Namespace) -> None:
    from jrt_recall import data

    print(data.import_file(arguments.task, arguments.file, arguments.folder))
