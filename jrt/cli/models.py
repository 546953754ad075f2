"""The commands for one model: `jrt generate | info | doctor | convert`."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import nullcontext
from typing import Any

from jrt.cli.options import FAILED, OK, Parser, model_options, model_spec, path, positive


def add_generate(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = commands.add_parser("generate", help="a model's continuation of a prompt")
    add = parser.add_argument
    add("--model", required=True)
    add("--prompt", help="the text (default: standard input)")
    add("--twice", action="store_true", help="show the prompt twice, on lines of its own")
    add("--max-new-tokens", type=positive, default=64)
    model_options(parser)
    parser.set_defaults(command=_generate)


def _generate(arguments: argparse.Namespace) -> None:
    from transformers import TextStreamer

    from jrt.evaluate.answering import encode, left_padded
    from jrt.evaluate.models import open_model, position_bound
    from jrt.system.breaks import as_value_error

    prompt = sys.stdin.read() if arguments.prompt is None else arguments.prompt
    if not prompt.strip():
        raise ValueError("the prompt is empty: give --prompt TEXT, or text on standard input")
    if arguments.twice:
        prompt = f"{prompt}\n{prompt}"
    opened = open_model(model_spec(arguments, arguments.model))
    (encoded,) = encode(opened.tokenizer, [prompt], None, opened.vocabulary)
    if encoded.problem:
        raise ValueError(f"the prompt cannot be read: {encoded.problem}")
    ids, mask = left_padded([encoded.ids], opened.pad_token_id, opened.device)
    generate: Any = opened.model.generate  # transformers does not annotate it
    tokens = f"{len(encoded.ids)} + {arguments.max_new_tokens} tokens (it reads at most {position_bound(opened.model)})"
    with nullcontext() if opened.ours else as_value_error(f"{arguments.model} cannot be run on {tokens}"):
        generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=arguments.max_new_tokens,
            do_sample=False,
            pad_token_id=opened.pad_token_id,
            streamer=TextStreamer(opened.tokenizer, skip_prompt=True, skip_special_tokens=True),
        )


def add_info(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = commands.add_parser("info", help="what a model is and costs")
    parser.add_argument("name", help="a preset, a mini, a folder or a hub id")
    parser.add_argument("--length", type=positive, nargs="+", help="tokens read, where a figure depends on them")
    parser.set_defaults(command=_info)


def _info(arguments: argparse.Namespace) -> None:
    from jrt.info import LENGTHS, describe

    pairs = describe(arguments.name, arguments.length or LENGTHS)
    width = max(len(label) for label, _ in pairs)
    for label, value in pairs:
        print(f"{label.ljust(width)}  {value}")


def add_doctor(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = commands.add_parser("doctor", help="what is installed and works; with a model: what it gets wrong")
    parser.add_argument("model", nargs="?", help="a mini, a folder or a hub id: probe it (default: this installation)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    model_options(parser)
    parser.set_defaults(command=_doctor)


def _doctor(arguments: argparse.Namespace) -> int:
    from jrt import doctor
    from jrt.evaluate.models import open_for_probe

    found: doctor.Installation | doctor.Examination
    if arguments.model is None:
        found = doctor.inspect_installation()
    else:
        model, pad_token_id = open_for_probe(model_spec(arguments, arguments.model))
        found = doctor.examine(model, arguments.model, pad_token_id)
    print(json.dumps(found.to_dict(), indent=1) if arguments.json else found.text())
    return OK if found.is_sound else FAILED


def add_convert(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = commands.add_parser("convert", help="a released checkpoint into a Hugging Face folder")
    parser.add_argument("source", help="folder or hub id")
    parser.add_argument("out", type=path, help="new folder")
    parser.add_argument(
        "--self-contained", action="store_true", help="add the model's source files: loads where jrt is not installed"
    )
    parser.set_defaults(command=_convert)


def _convert(arguments: argparse.Namespace) -> None:
    from jrt.checkpoints.convert import convert

    convert(arguments.source, arguments.out, self_contained=arguments.self_contained)
    print(f"written to {arguments.out}")
