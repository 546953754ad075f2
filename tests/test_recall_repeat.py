"""`jrt-recall --repeat N`: other people's tasks with their context shown N times, on tasks in the exact form of lm-eval's.

The datasets of ruler, longbench and babilong are on the hub and were not run: their prompts' templates are, and a task made here is."""

import json
from pathlib import Path

import lm_eval
import pytest
import yaml
from jrt_recall.harness.repeat import repeated_template, write_repeated
from lm_eval.tasks import TaskManager

TASKS = Path(lm_eval.__file__).parent / "tasks"
LONGBENCH = "Read this.\n{{context}}\nNow answer.\nQuestion: {{question}}\nAnswer:"


def template_of(file: str) -> str:
    """The prompt's template in an installed task file (its functions are left out)."""
    lines = [line for line in (TASKS / file).read_text().splitlines() if line.startswith("doc_to_text")]
    return yaml.safe_load(lines[0])["doc_to_text"]


def test_the_context_is_repeated_where_the_task_names_it():
    assert repeated_template(LONGBENCH, 2) == (LONGBENCH.replace("{{context}}", "{{context}}\n{{context}}"), "context")
    text, what = repeated_template(template_of("longbench/2wikimqa.yaml"), 3)
    assert what == "context" and text.count("{{context}}") == 3 and text.count("{{question}}") == 1
    text, what = repeated_template(template_of("babilong/babilong_qa1.yaml"), 2)
    assert (text, what) == ("{{input.strip()}}\n{{input.strip()}}\n{{question.strip()}}", "context")


def test_the_whole_prompt_is_repeated_otherwise():
    assert repeated_template(template_of("ruler/niah_single_1.yaml"), 2) == ("{{input}}\n{{input}}", "whole prompt")
    assert repeated_template("{{story}} {{question}}", 2, "story")[0] == "{{story}}\n{{story}} {{question}}"
    with pytest.raises(ValueError, match="does not show the column 'page'"):
        repeated_template(LONGBENCH, 2, "page")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Three tasks: longbench's form, one that is scored by likelihood, one whose prompt is a function."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "rows.jsonl").write_text(
        json.dumps({"context": "The key is blue.", "question": "Key?", "answers": ["blue"]}) + "\n"
    )
    common = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}}}
    common |= {"test_split": "test", "doc_to_target": "{{answers[0]}}", "metadata": {"version": 2.0}, "tag": ["made"]}
    generate = {"output_type": "generate_until", "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4}}
    generate |= {"metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]}
    tasks = {"made_long": {**common, **generate, "doc_to_text": LONGBENCH}}
    tasks["made_choice"] = {**common, "output_type": "multiple_choice", "doc_to_text": LONGBENCH, "tag": []}
    for name, settings in tasks.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **settings}))
    code = (
        yaml.safe_dump({"task": "made_code", **common, **generate, "tag": []}) + "doc_to_text: !function utils.text\n"
    )
    (folder / "made_code.yaml").write_text(code)
    (folder / "utils.py").write_text("def text(doc):\n    return doc['context']\n")
    return folder


def test_a_repeated_task_is_lm_evals_own_under_another_name(made, tmp_path):
    index = TaskManager(include_path=made, include_defaults=False).task_index
    assert write_repeated(index, ["made_long"], 2, tmp_path, None) == ["made_long_2x"]
    assert write_repeated(index, ["made"], 2, tmp_path, None) == ["made_long_2x"]  # a tag stands for its members
    loaded = TaskManager(include_path=tmp_path, include_defaults=False).load("made_long_2x")
    task = loaded["tasks"]["made_long_2x"] if "tasks" in loaded else loaded["made_long_2x"]
    doc = next(iter(task.test_docs()))
    assert (
        task.doc_to_text(doc) == "Read this.\nThe key is blue.\nThe key is blue.\nNow answer.\nQuestion: Key?\nAnswer:"
    )
    metadata = task.config.metadata
    assert (metadata["version"], metadata["strategy"], metadata["repeated"]) == (2.0, "twice", "context")
    for name, said in (("made_choice", "does not generate"), ("made_code", "by code"), ("nothing", "unknown task")):
        with pytest.raises(ValueError, match=said):
            write_repeated(index, [name], 2, tmp_path, None)
