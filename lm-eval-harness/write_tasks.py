"""Writes the lm-eval task files of `jrt_recall/tasks`: one small YAML file for each task and strategy.

All of them include `_recall`, which holds what they share. Run this after a change of the tables below:
`python lm-eval-harness/write_tasks.py`. A test checks that the files agree with the tables.
"""

from pathlib import Path

from jrt_recall.harness.super_glue import TASKS as SUPER_GLUE
from jrt_recall.protocols import PAGE_WINDOWS, PASSAGES, PUBLISHED, default

FOLDER = Path(__file__).parent / "jrt_recall" / "tasks"
READINGS = {"": "once", "_twice": "twice", "_n_times": "n_times", "_question_first": "question_first"}

BASE = """\
# What all recall tasks share. Each row of the data is a finished prompt with its answers (jrt_recall/harness/hooks.py).
custom_dataset: !function jrt_recall.harness.hooks.documents
output_type: generate_until
test_split: test
doc_to_text: prompt
doc_to_target: !function jrt_recall.harness.hooks.target
process_results: !function jrt_recall.harness.hooks.score
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 48
  do_sample: false
metric_list:
  - metric: contains
    aggregation: mean
    higher_is_better: true
  - metric: protocol
    aggregation: !function jrt_recall.harness.hooks.first
    higher_is_better: true
  - metric: documents
    aggregation: !function jrt_recall.harness.hooks.first
    higher_is_better: true
  - metric: dropped
    aggregation: !function jrt_recall.harness.hooks.first
    higher_is_better: false
  - metric: invalid
    aggregation: !function jrt_recall.harness.hooks.first
    higher_is_better: false
  - metric: lost
    aggregation: !function jrt_recall.harness.hooks.total
    higher_is_better: false
  - metric: unreachable
    aggregation: !function jrt_recall.harness.hooks.total
    higher_is_better: false
  - metric: truncated
    aggregation: !function jrt_recall.harness.hooks.total
    higher_is_better: false
  - metric: prompt_tokens
    aggregation: !function jrt_recall.harness.hooks.average
    higher_is_better: true
"""

RECORD = """\
# SuperGLUE's record as upstream has it, without its import of a module that transformers 5 dropped.
task: recall_record
custom_dataset: !function jrt_recall.harness.super_glue.documents
dataset_kwargs: {configuration: record}
output_type: multiple_choice
training_split: train
validation_split: validation
process_docs: !function jrt_recall.harness.super_glue.record_documents
doc_to_text: !function jrt_recall.harness.super_glue.record_text
doc_to_target: !function jrt_recall.harness.super_glue.record_target
doc_to_choice: !function jrt_recall.harness.super_glue.record_choices
process_results: !function jrt_recall.harness.super_glue.record_score
metric_list:
  - metric: f1
    aggregation: mean
    higher_is_better: true
  - metric: em
    aggregation: mean
    higher_is_better: true
metadata: {version: 2.0}
"""


def task_file(name: str, recall_task: str, reading: str, protocol: str, tag: str) -> str:
    """Returns the text of one task file.

    Args:
        name: the task's name in lm-eval.
        recall_task: the task whose documents it asks.
        reading: a strategy's name or "n_times".
        protocol: name of the default protocol.
        tag: lm-eval's tag, under which all tasks of one kind and strategy can be run together.
    """
    return (
        f"include: _recall\ntask: {name}\ntag: {tag}\n"
        f"dataset_kwargs: {{recall_task: {recall_task}, reading: {reading}}}\n"
        f"metadata: {{version: 1.0, protocol: {protocol}}}\n"
    )


def task_files() -> dict[str, str]:
    """Returns the text of each file in the folder, by file name."""
    files = {"_recall": BASE}
    tables = [(f"recall_{task}", task, default(task)) for task in PUBLISHED]
    tables += [(f"recall_reference_pages_{size}", f"reference_pages_{size}", f"pages-{size}") for size in PAGE_WINDOWS]
    tables += [(task, task, default(task)) for task in PASSAGES]
    for name, task, protocol in tables:
        family = "recall" if task in PUBLISHED else ("recall_passages" if task in PASSAGES else "recall_pages")
        for suffix, reading in READINGS.items():
            files[f"{name}{suffix}.yaml"] = task_file(f"{name}{suffix}", task, reading, protocol, f"{family}{suffix}")
    members = "".join(
        f"  - task: {task}\n    custom_dataset: !function jrt_recall.harness.super_glue.documents\n"
        f"    dataset_kwargs: {{configuration: {configuration}}}\n"
        for configuration, task in SUPER_GLUE.items()
    )
    files["recall_super_glue.yaml"] = (
        "# SuperGLUE with upstream's tasks, prompts and metrics, from the mirror or the hub (jrt_recall/harness/super_glue.py);\n"
        "# the paper's tables use 0, 1 and 5 shots (--num_fewshot).\n"
        f"group: recall_super_glue\ntask:\n{members}metadata: {{version: 1.0}}\n"
    )
    files["recall_record.yaml"] = RECORD
    return files


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for file_name, text in task_files().items():
        (FOLDER / file_name).write_text(text, encoding="utf-8")
