"""The command line: `jrt demo | eval | report | generate | info | convert | data | doctor | lm-eval`.

A user's mistake is one line on stderr and exit status 2; what a command computes comes from the modules it imports.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:  # the commands import what they need, so that `jrt --help` is quick
    from jrt.evaluate import ModelSpec, Outcome, Plan

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


def main(given: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    arguments = list(sys.argv[1:] if given is None else given)
    if arguments[:1] == ["lm-eval"]:
        return _reported(lambda: _lm_eval(arguments[1:]))
    parsed = _parser().parse_args(arguments)
    if not parsed.verbose:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.basicConfig(level=logging.INFO if parsed.verbose else logging.WARNING, format="%(message)s")
    return _reported(lambda: parsed.command(parsed), getattr(parsed, "kept", ""))


def _reported(command: Callable[[], int | None], kept: str = "") -> int:
    """Runs a command; `kept` is what it says of its work when it is interrupted."""
    try:
        return command() or OK
    except ValueError as error:
        print(f"jrt: {' '.join(str(error).split())}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        print(f"jrt: stopped{kept}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of a pipe has seen enough
        sys.stderr.close()
        return OK
    except OSError as error:  # a folder that cannot be written, a full disk
        print(f"jrt: {' '.join(str(error).split())}", file=sys.stderr)
        return USAGE


class _Parser(argparse.ArgumentParser):
    """argparse with its errors on one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _parser() -> _Parser:
    parser = _Parser(
        prog="jrt", description="Recall of language models: evaluate it, and close the gap by reading twice."
    )
    parser.add_argument("--verbose", "-v", action="store_true", help="say what is done")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)
    for add in (_add_demo, _add_eval, _add_report, _add_generate, _add_info, _add_convert, _add_data, _add_doctor):
        add(commands)
    commands.add_parser(
        "lm-eval", help="stock lm-eval with `--model jrt` and the recall tasks; all options are lm_eval's"
    )
    return parser


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _positive(text: str) -> int:
    return _whole(text, 1)


def _seed(text: str) -> int:
    return _whole(text, 0)


def _whole(text: str, least: int) -> int:
    if not text.strip().removeprefix("-").isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number, not {text!r}")
    if int(text) < least:
        raise argparse.ArgumentTypeError(f"expected a number of at least {least}, not {text}")
    return int(text)


def _model_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--device", default="cpu", help="cpu (default), cuda, cuda:1 ...")
    add("--dtype", help="float32 (default), bfloat16, float16, float64")
    add("--compat", choices=("released",), help="compute as the published numbers were measured")
    add(
        "--short-prompt", choices=("none", "pad", "repeat", "iterate"), help="rule for prompts shorter than the encoder"
    )


def _spec(arguments: argparse.Namespace, name: str) -> ModelSpec:
    """A model as the options of `_model_options` say how to compute with it."""
    from jrt.evaluate import ModelSpec

    return ModelSpec(name, arguments.device, arguments.dtype, arguments.compat, arguments.short_prompt)


# demo


def _add_demo(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = commands.add_parser("demo", help="the mini models on reference pages, read once and twice")
    add = parser.add_argument
    add("--output", type=Path, default=Path("demo"), help="folder (default: demo)")
    add("--models", type=_names, help="other models, separated by commas")
    add("--limit", type=_positive, help="items for each model and strategy")
    add("--real", action="store_true", help="SmolLM2-135M, an off-the-shelf model, instead of the minis")
    add("--passages", type=Path, help="with --real: folder of passages with questions, instead of pages")
    add("--device", default="cpu")
    parser.set_defaults(command=_demo, kept="; what was answered is kept: the same command goes on")


def _demo(arguments: argparse.Namespace) -> None:
    from jrt.evaluate import demo
    from jrt.evaluate.tables import comparisons_text, results_text

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
    outcome = demo.demo(chosen, arguments.output, title)
    print(results_text(outcome.records, chosen.protocols()))
    print(comparisons_text(outcome.comparisons))
    print(f"\nreport: {arguments.output / 'report.html'}   figures: accuracy, state, position (.png, .svg)")


# eval


def _add_eval(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = commands.add_parser("eval", help="recall of any causal language model")
    add = parser.add_argument
    add("--model", type=_names, required=True, help="mini-jrt, smollm2, folders, hub ids; separated by commas")
    add(
        "--tasks",
        type=_names,
        required=True,
        help="recall_fda (or fda), recall_nq_1024, recall_reference_pages_512, qa_squad ...",
    )
    add("--strategy", type=_names, default=("once",), help="once, twice, question_first, 3x ...; separated by commas")
    add(
        "--protocol",
        type=_names,
        help="jrt-table1, jrt-table2, full, w1536-a64 (any window), lm-eval-v1 ...; separated by commas (default: the task's)",
    )
    add("--limit", type=_positive, help="items for each cell of the table (default: all)")
    add("--batch-size", type=_positive, help="prompts at once (default: as suits the device)")
    add("--output", type=Path, required=True, help="folder for results.json, predictions.jsonl, manifest.json")
    add("--resume", action="store_true", help="go on with the same run in that folder")
    add("--seed", type=_seed, default=0, help="choice of reference pages, bootstrap")
    add("--data", type=Path, help="mirror folder of the published datasets (default: $JRT_DATA, then the hub)")
    add("--passages", type=Path, help="folder of the qa_ tasks (default: $JRT_PASSAGES)")
    add("--cut-with", help="another cutting tokenizer; renames the protocol")
    add(
        "--text", type=Path, help="recall_perplexity: a text file, or a folder of .txt files (default: reference pages)"
    )
    add("--workers", type=_positive, help="Ray actors, one model copy each (default: this process)")
    add("--ray-address", help="an existing Ray cluster")
    _model_options(parser)
    parser.set_defaults(command=_eval, kept="; what was answered is kept: the same command with --resume goes on")


def _eval(arguments: argparse.Namespace) -> int:
    from jrt.evaluate import LocalPool, Request, plan, run
    from jrt.evaluate.tables import comparisons_text, results_text
    from jrt.evaluate.tables.side_by_side import protocols_side_by_side

    specs = tuple(_spec(arguments, name) for name in arguments.model)
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
    if arguments.workers is None and arguments.ray_address is None:
        outcome = run(chosen, LocalPool(), arguments.output, arguments.batch_size, arguments.resume)
    else:
        outcome = _on_workers(arguments, chosen)
    print(results_text(outcome.records, chosen.protocols(), outcome.failed))
    if several := protocols_side_by_side(outcome.records, outcome.predictions):
        print(f"{several}\n")
    if outcome.comparisons:
        print(comparisons_text(outcome.comparisons))
    print(f"\nresults: {arguments.output / 'results.json'}   report: jrt report {arguments.output}")
    return FAILED if outcome.failed else OK


def _on_workers(arguments: argparse.Namespace, chosen: Plan) -> Outcome:
    from importlib.util import find_spec

    from jrt.evaluate import run

    if find_spec("ray") is None:
        raise ValueError("--workers needs Ray: pip install 'jrt[scale]'")
    from jrt.evaluate.workers import RayPool

    gpus = 1 if arguments.device.startswith("cuda") else 0
    with RayPool(arguments.workers or 1, arguments.ray_address, gpus) as pool:
        return run(chosen, pool, arguments.output, arguments.batch_size, arguments.resume)


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
    records = perplexity.run(specs, documents, arguments.output, arguments.limit, size, arguments.resume)
    plots.save(plots.by_recall(records), arguments.output)
    print(f"{perplexity.table(records)}\n\nfigure: {arguments.output / 'figure3.png'} (and .svg)")
    return OK


# report


def _add_report(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = commands.add_parser("report", help="tables, figures and an HTML page from finished runs")
    add = parser.add_argument
    add("runs", type=Path, nargs="+", help="output folders of `jrt eval`, or folders that hold them")
    add("--output", type=Path, help="folder (default: the first run's)")
    add(
        "--layout",
        help="table1, 2, 3, 4, 5, 7, 8, 9, 10, 13, 14 or mean-gain of the paper, published values beside measured ones",
    )
    parser.set_defaults(command=_report)


def _report(arguments: argparse.Namespace) -> None:
    from jrt.evaluate.report import collect

    output = arguments.output or arguments.runs[0]
    if arguments.output is None and output.is_file():
        output = output.parent
    text, files = collect(arguments.runs, output, arguments.layout)
    print(f"{text}\nwritten to {output}: {', '.join(files)}")


# generate


def _add_generate(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = commands.add_parser("generate", help="a model's continuation of a prompt")
    add = parser.add_argument
    add("--model", required=True)
    add("--prompt", help="the text (default: standard input)")
    add("--twice", action="store_true", help="show the prompt twice, on lines of its own")
    add("--max-new-tokens", type=_positive, default=64)
    _model_options(parser)
    parser.set_defaults(command=_generate)


def _generate(arguments: argparse.Namespace) -> None:
    from transformers import TextStreamer

    from jrt.evaluate.answering import encode, left_padded
    from jrt.evaluate.models import open_model

    prompt = sys.stdin.read() if arguments.prompt is None else arguments.prompt
    if not prompt.strip():
        raise ValueError("the prompt is empty: give --prompt TEXT, or text on standard input")
    if arguments.twice:
        prompt = f"{prompt}\n{prompt}"
    opened = open_model(_spec(arguments, arguments.model))
    (encoded,) = encode(opened.tokenizer, [prompt], None, opened.vocabulary)
    if encoded.problem:
        raise ValueError(f"the prompt cannot be read: {encoded.problem}")
    ids, mask = left_padded([encoded.ids], opened.pad_token_id, opened.device)
    generate: Any = opened.model.generate  # transformers gives it no type of its own
    generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=arguments.max_new_tokens,
        do_sample=False,
        pad_token_id=opened.pad_token_id,
        streamer=TextStreamer(opened.tokenizer, skip_prompt=True, skip_special_tokens=True),
    )


# info, doctor


def _add_info(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = commands.add_parser("info", help="what a model is and costs")
    parser.add_argument("name", help="a preset, a mini, a folder or a hub id")
    parser.add_argument("--length", type=_positive, nargs="+", help="tokens read, where a figure depends on them")
    parser.set_defaults(command=_info)


def _info(arguments: argparse.Namespace) -> None:
    from jrt.info import LENGTHS, describe

    _print_pairs(describe(arguments.name, arguments.length or LENGTHS))


def _add_doctor(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = commands.add_parser("doctor", help="what is installed and works; with a model: what it gets wrong")
    parser.add_argument("model", nargs="?", help="a mini, a folder or a hub id: probe it (default: this installation)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    _model_options(parser)
    parser.set_defaults(command=_doctor)


def _doctor(arguments: argparse.Namespace) -> int:
    from jrt import doctor
    from jrt.evaluate.models import open_model

    found: doctor.Installation | doctor.Examination
    if arguments.model is None:
        found = doctor.inspect_installation()
    else:
        opened = open_model(_spec(arguments, arguments.model))
        found = doctor.examine(opened.model, arguments.model, opened.pad_token_id)
    print(json.dumps(found.to_dict(), indent=1) if arguments.json else found.text())
    return OK if found.is_sound else FAILED


def _print_pairs(pairs: Sequence[tuple[str, str]]) -> None:
    width = max(len(label) for label, _ in pairs)
    for label, value in pairs:
        print(f"{label.ljust(width)}  {value}")


# convert


def _add_convert(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = commands.add_parser("convert", help="a released checkpoint into a Hugging Face folder")
    parser.add_argument("source", help="folder or hub id")
    parser.add_argument("out", type=Path, help="new folder")
    parser.add_argument(
        "--self-contained", action="store_true", help="add the model's source files: loads where jrt is not installed"
    )
    parser.set_defaults(command=_convert)


def _convert(arguments: argparse.Namespace) -> None:
    from jrt.checkpoints.convert import convert

    convert(arguments.source, arguments.out, self_contained=arguments.self_contained)
    print(f"written to {arguments.out}")


# data


def _add_data(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = commands.add_parser("data", help="a local mirror of the published datasets")
    actions = parser.add_subparsers(required=True, metavar="ACTION", parser_class=_Parser)
    fetch = actions.add_parser("fetch", help="from the hub into the mirror")
    verify = actions.add_parser("verify", help="hashes and columns of the mirror's files")
    for action in (fetch, verify):
        action.add_argument("tasks", nargs="*", help="default: all published tasks")
    bring = actions.add_parser("import", help="from a .jsonl, .json or .parquet file into the mirror")
    bring.add_argument("task")
    bring.add_argument("file", type=Path)
    for action, command in ((fetch, _fetch), (verify, _verify), (bring, _import)):
        action.add_argument("--folder", type=Path, help="the mirror (default: $JRT_DATA)")
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


# lm-eval


def _lm_eval(given: list[str]) -> int:
    from jrt.evaluate import harness

    return harness.command(given)
