"""`jrt-recall --repeat N`: lm-eval tasks with their context shown N times.

The prompt templates of ruler, longbench and babilong are tested, but not their datasets, which are on the hub. A task
of the same form is made here and run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jinja2
import lm_eval
import pytest
import yaml
from jrt_recall.harness.repeat import repeated_template, repeating, run, write_repeated
from jrt_recall.tokenizers import shipped_tokenizer
from lm_eval.tasks import TaskManager
from transformers import GPT2Config, GPT2LMHeadModel

TASKS = Path(lm_eval.__file__).parent / "tasks"
LONGBENCH = "Read this.\n{{context}}\nNow answer.\nQuestion: {{question}}\nAnswer:"


def template_of(file: str) -> str:
    """The prompt's template in an installed task file (its functions are left out)."""
    lines = [line for line in (TASKS / file).read_text().splitlines() if line.startswith("doc_to_text")]
    return yaml.safe_load(lines[0])["doc_to_text"]


def test_a_named_column_that_is_shown_twice_is_refused():
    with pytest.raises(ValueError, match="shows the column 'page' 2 times"):
        repeated_template("{{page}}\n{{page}}\n{{question}}", 2, "page")


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
def installed():
    return TaskManager().task_index


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Four tasks: longbench's form, one that is scored by likelihood, one whose prompt is a function, and a Python class."""
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
    (folder / "utils.py").write_text("def text(doc):\n    return f\"Page: {doc['context']} {doc['question']}\"\n")
    (folder / "made_class.yaml").write_text("task: made_class\nclass: !function utils.text\n")
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
    for name, said in (
        ("made_choice", "does not generate"),
        ("made_class", "Python class"),
        ("nothing", "unknown task"),
    ):
        with pytest.raises(ValueError, match=said):
            write_repeated(index, [name], 2, tmp_path, None)


@pytest.mark.parametrize("name", ["longbench_2wikimqa", "niah_single_2", "babilong_qa1", "coqa"])
def test_installed_tasks_are_accepted_as_they_are(name, tmp_path, installed):
    """Settings that a task leaves to lm-eval's defaults or to the file that it includes are those of the task."""
    assert write_repeated(installed, [name], 2, tmp_path, None) == [f"{name}_2x"]


def test_a_prompt_that_a_function_makes_is_repeated_by_a_function(made, tmp_path):
    index = TaskManager(include_path=made, include_defaults=False).task_index
    whole = "Page: The key is blue. Key?"
    context = "Page: The key is blue.\nThe key is blue.\nThe key is blue. Key?"
    for copies, column, expected in ((2, None, f"{whole}\n{whole}"), (3, "context", context)):
        folder = tmp_path / str(copies)
        folder.mkdir()
        (name,) = write_repeated(index, ["made_code"], copies, folder, column)
        loaded = TaskManager(include_path=folder, include_defaults=False).load(name)
        task = loaded["tasks"][name] if "tasks" in loaded else loaded[name]
        assert task.doc_to_text(next(iter(task.test_docs()))) == expected
        assert task.config.metadata["repeated"] == ("context" if column else "whole prompt")
    with pytest.raises(ValueError, match="does not show the column 'answers' once"):
        repeating(str(made / "made_code.yaml"), 2, "answers")({"context": "a", "question": "b", "answers": "c"})


def test_tasks_of_a_relative_folder_are_found(made, tmp_path, monkeypatch):
    monkeypatch.chdir(made.parent)
    index = TaskManager(include_path=made.name, include_defaults=False).task_index
    names = write_repeated(index, ["made_long", "made_code"], 2, tmp_path, None)
    monkeypatch.chdir(tmp_path)
    for name in names:
        loaded = TaskManager(include_path=tmp_path, include_defaults=False).load(name)
        task = loaded["tasks"][name] if "tasks" in loaded else loaded[name]
        assert task.doc_to_text(next(iter(task.test_docs()))).count("The key is blue.") == 2


def test_the_command_runs_repeated_tasks_end_to_end(made, tmp_path):
    """`jrt-recall --repeat 2`, through lm-eval's whole command line: two tasks, their prompts, results under their own names."""
    GPT2LMHeadModel(GPT2Config(vocab_size=4096, n_embd=16, n_layer=1, n_head=1)).save_pretrained(tmp_path / "model")
    shipped_tokenizer().save_pretrained(tmp_path / "model")
    command = [sys.executable, "-c", "from jrt_recall.harness import main; main()", "--repeat", "2"]
    command += ["--tasks", "made_long,made_code", "--include_path", str(made), "--model", "hf", "--device", "cpu"]
    command += [
        "--model_args",
        f"pretrained={tmp_path / 'model'}",
        "--log_samples",
        "--output_path",
        str(tmp_path / "out"),
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(next((tmp_path / "out").rglob("results_*.json")).read_text())
    assert set(results["results"]) == {"made_long_2x", "made_code_2x"}
    assert results["configs"]["made_long_2x"]["metadata"]["strategy"] == "twice"
    prompts = {}
    for file in (tmp_path / "out").rglob("samples_*.jsonl"):
        (sample,) = map(json.loads, file.read_text().splitlines())
        prompts[file.name.split("_2x")[0]] = sample["arguments"]["gen_args_0"]["arg_0"]
    assert prompts["samples_made_long"].count("The key is blue.\nThe key is blue.\n") == 1
    assert prompts["samples_made_code"] == "Page: The key is blue. Key?\nPage: The key is blue. Key?"


@pytest.mark.parametrize("more", [["--task", "b"], ["--tas=b"]])
def test_a_second_list_of_tasks_is_refused(more):
    with pytest.raises(ValueError, match="write --tasks in full"):
        run(["--repeat", "2", "--tasks", "a", *more])


def test_minus_signs_of_jinja_do_not_join_the_copies():
    for template, what, shown in (
        ("{{- context -}} Key?", "context", "blue\nblueKey?"),
        ("{%- if context %}{{ question }}{% endif -%}", "whole prompt", "Key?\nKey?"),
    ):
        text, repeated = repeated_template(template, 2)
        assert repeated == what
        assert jinja2.Template(text).render(context="blue", question="Key?") == shown


def test_a_column_in_a_comment_of_the_template_is_not_the_context():
    text, what = repeated_template("{# {{context}} #}{{document}} Key?", 2)
    assert what == "context" and jinja2.Template(text).render(context="x", document="blue") == "blue\nblue Key?"
    assert repeated_template("{# {{context}} #}{{page}}", 2)[1] == "whole prompt"
    assert repeated_template("{{+ context }} Key?", 2) == ("{{+ context }}\n{{+ context }} Key?", "context")


def written(folder: Path, name: str, text: str, **more: object) -> None:
    settings = {"task": name, "dataset_path": "json", "output_type": "generate_until", "doc_to_text": text, **more}
    (folder / f"{name.replace('/', '-')}.yaml").write_text(yaml.safe_dump(settings))


def test_a_prompt_that_a_new_doc_to_text_would_not_reach_is_refused(tmp_path):
    written(tmp_path, "source", "{{context}}", use_prompt="promptsource:a")
    index = TaskManager(include_path=tmp_path, include_defaults=False).task_index
    with pytest.raises(ValueError, match="use_prompt"):
        write_repeated(index, ["source"], 2, tmp_path, None)


def test_examples_with_a_prompt_of_their_own_are_marked(tmp_path):
    written(tmp_path, "own", "{{context}}", fewshot_config={"doc_to_text": "Example: {{context}}"})
    written(tmp_path, "usual", "{{context}}", fewshot_config={"sampler": "first_n"})
    index = TaskManager(include_path=tmp_path, include_defaults=False).task_index
    write_repeated(index, ["own", "usual"], 2, tmp_path, None)
    said = [yaml.safe_load((tmp_path / f"{name}_2x.yaml").read_text())["metadata"] for name in ("own", "usual")]
    assert said[0]["examples"] == "once" and "examples" not in said[1]


def test_a_name_with_a_slash_is_repeated(tmp_path):
    written(tmp_path, "suite/a", "{{context}}")
    index = TaskManager(include_path=tmp_path, include_defaults=False).task_index
    (tmp_path / "new").mkdir()
    assert write_repeated(index, ["suite/a"], 2, tmp_path / "new", None) == ["suite/a_2x"]
    assert "suite/a_2x" in TaskManager(include_path=tmp_path / "new", include_defaults=False).task_index


def test_groups_without_an_end_or_without_tasks_are_refused(tmp_path):
    for name, members in (("outer", ["inner"]), ("inner", ["outer"]), ("nothing", [])):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"group": name, "task": members}))
    index = TaskManager(include_path=tmp_path, include_defaults=False).task_index
    for name, told in (("outer", "outer > inner > outer"), ("nothing", "nothing to repeat")):
        with pytest.raises(ValueError, match=told):
            write_repeated(index, [name], 2, tmp_path, None)


def test_a_name_that_is_taken_and_a_prompt_without_a_column_are_refused(tmp_path):
    for name, text in (("a", "{{context}}"), ("a_2x", "{{context}}"), ("fixed", "Say something."), ("empty", "")):
        written(tmp_path, name, text)
    index = TaskManager(include_path=tmp_path, include_defaults=False).task_index
    for name, told in (
        ("a", "task a_2x already"),
        ("fixed", "same prompt for every"),
        ("empty", "same prompt for every"),
    ):
        with pytest.raises(ValueError, match=told):
            write_repeated(index, [name], 2, tmp_path, None)
    assert not list(tmp_path.glob("*_2x_2x.yaml"))


def test_groups_inside_a_group_are_repeated_and_settings_inside_it_refused(tmp_path):
    for name in ("a", "b"):
        written(tmp_path, name, "{{context}}")
    inner = {"group": "inner", "task": ["b"]}
    (tmp_path / "outer.yaml").write_text(yaml.safe_dump({"group": "outer", "task": ["a", inner]}))
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"group": "own", "task": [{"task": "a", "num_fewshot": 3}]}))
    index = TaskManager(include_path=tmp_path, include_defaults=False).task_index
    assert write_repeated(index, ["outer"], 2, tmp_path, None) == ["a_2x", "b_2x"]
    with pytest.raises(ValueError, match="runs a with settings of its own"):
        write_repeated(index, ["own"], 2, tmp_path, None)
