"""The task files of jrt_recall in stock lm-eval: loaded, answered by a tiny GPT-2, run by both commands."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from jrt_recall import PUBLISHED, fixtures, harness, items, task_folder
from jrt_recall.harness import hooks, settings, super_glue
from jrt_recall.harness.hf_models import acting_settings
from jrt_recall.protocols import PASSAGES
from lm_eval._cli import HarnessCLI
from transformers import GenerationConfig

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "lm-eval-harness"


@pytest.fixture(scope="module")
def mirror(tmp_path_factory, shared):
    """Generated documents, with GPT-2's tokenizer beside them."""
    folder = fixtures.write(tmp_path_factory.mktemp("mirror"), count=6, sentences=12)
    (folder / "gpt2").symlink_to(shared / "gpt2")
    return folder


@pytest.fixture
def sources(monkeypatch, mirror, shared):
    monkeypatch.setenv("JRT_DATA", str(mirror))
    monkeypatch.setenv("JRT_PASSAGES", str(shared / "qa"))


def manager(**metadata):
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(task_folder()), include_defaults=False, metadata=metadata)


def test_task_files_are_those_the_tables_make():
    path = PACKAGE / "write_tasks.py"
    if not path.is_file():
        pytest.skip("the script that writes task files is part of a checkout only")
    spec = importlib.util.spec_from_file_location("write_tasks", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    on_disk = {file.name: file.read_text(encoding="utf-8") for file in task_folder().iterdir() if file.is_file()}
    assert on_disk == module.task_files()


def test_every_task_loads_and_asks_what_items_asks(sources):
    names = [name for name in manager().all_subtasks if "pages_1024" not in name and "pages_2048" not in name]
    expected = {f"recall_{task}" for task in PUBLISHED} | {"recall_reference_pages_512", *PASSAGES}
    names.remove("recall_record")
    assert {name for name in names if not name.endswith(("_twice", "_n_times", "_question_first"))} == expected
    loaded = manager(n=4, max_items=3).load(names)["tasks"]
    assert len(loaded) == 4 * len(expected)
    for name, task in loaded.items():
        config = task.config.dataset_kwargs
        strategy = "4x" if config["reading"] == "n_times" else config["reading"]
        run = items(config["recall_task"], strategy, task.config.metadata["protocol"], limit=3)
        rows = list(task.test_docs())
        assert [task.doc_to_text(row) for row in rows] == [item.prompt for item in run.items], name
        assert {row["protocol"] for row in rows} == {run.protocol.label()}
        assert task.process_results(rows[0], [f" {rows[0]['answers'][0].upper()} "])["contains"] == 1.0
        assert task.process_results(rows[0], ["#"])["contains"] == 0.0
        assert task.config.generation_kwargs["until"] == ["\n"]
        assert task.config.generation_kwargs["max_gen_toks"] == 48


def test_metadata_choose_protocol_and_cutting_tokenizer(sources):
    task = manager(protocol="jrt-table2-512", cut_with="shipped", pretrained="ignored").load(["recall_fda"])["tasks"]
    row = task["recall_fda"].test_docs()[0]
    assert row["protocol"] == "jrt-table2-512+cut-by-shipped v1 (512/50)"
    with pytest.raises(ValueError, match="unknown protocol"):
        hooks.documents("fda", "once", protocol="table1")
    with pytest.raises(ValueError, match="pages-1024 is not for reference_pages_512"):
        hooks.documents("reference_pages_512", "once", protocol="pages-1024")
    with pytest.raises(ValueError, match="leaves documents whole"):
        hooks.documents("qa_fda", "once", protocol="full", cut_with="shipped")


def test_a_score_states_its_protocol_and_counts(sources, tiny_gpt2):
    """Also what the model's own tokens say, where its arguments name a tokenizer and a length."""
    row = hooks.documents("drop", "twice", protocol="jrt-table1", pretrained=str(tiny_gpt2), max_length=100)["test"][0]
    scored = hooks.score(row, [" nothing"])
    assert scored["protocol"] == "jrt-table1 v1 (1000/50)" and scored["contains"] == 0.0
    assert (scored["prompt_tokens"], scored["truncated"]) == (100 - 48, 1)
    row = hooks.documents("drop", "twice", protocol="full", pretrained="no/model")["test"][0]
    assert hooks.average([hooks.score(row, [""])["prompt_tokens"]]) == "unknown"
    assert row["protocol"] == "full v1 (documents whole)"


def test_batches_give_the_answers_of_single_prompts(sources, tiny_gpt2):
    from lm_eval import simple_evaluate

    answers = {}
    for size in (1, 8, 32):
        result = simple_evaluate(
            model="hf",
            model_args={"pretrained": str(tiny_gpt2), "max_length": 2048, "dtype": "float32", "device": "cpu"},
            tasks=["recall_squad_twice", "recall_nq_512", "qa_nq"],
            task_manager=manager(max_items=6, pretrained=str(tiny_gpt2), max_length=2048),
            batch_size=size,
            bootstrap_iters=0,
        )
        answers[size] = {
            (name, sample["doc"]["id"]): sample["filtered_resps"]
            for name in result["samples"]
            for sample in result["samples"][name]
        }
        squad = result["results"]["recall_squad_twice"]
        assert squad["documents,none"] == 6 and squad["dropped,none"] == squad["truncated,none"] == 0
        assert squad["protocol,none"] == "jrt-table1 v1 (1000/50)" and squad["prompt_tokens,none"] > 400
    assert len(answers[1]) == 18
    assert answers[8] == answers[32] == answers[1]
    assert len({str(found) for found in answers[1].values()}) > 9, "a model that always says the same shows nothing"


def samples_of(command: list[str], folder: Path, mirror: Path) -> tuple[dict[str, str], str]:
    """Answers by item, and the screen, of a command line with lm-eval's options."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "JRT_DATA": str(mirror), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PACKAGE), os.environ.get("PYTHONPATH")]))
    command = [*command, "--output_path", str(folder), "--log_samples"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = next(folder.rglob("samples_recall_squad_twice_*.jsonl")).read_text(encoding="utf-8").splitlines()
    samples = [json.loads(line) for line in lines]
    return {sample["doc"]["id"]: sample["filtered_resps"][0] for sample in samples}, done.stdout


def test_every_command_gives_the_same_answers(tiny_gpt2, mirror, tmp_path):
    """Stock lm-eval with one option, jrt-recall, and jrt eval."""
    from jrt.cli import main

    options = ["--model", "hf", "--device", "cpu", "--tasks", "recall_squad_twice", "--limit", "3", "--batch_size", "2"]
    options += ["--model_args", f"pretrained={tiny_gpt2},max_length=2048"]
    stock = [sys.executable, "-m", "lm_eval", "--include_path", str(task_folder()), *options]
    ours = [sys.executable, "-c", "from jrt_recall.harness import main; main()", *options]
    answers, screen = samples_of(stock, tmp_path / "stock", mirror)
    assert len(answers) == 3 and len(set(answers.values())) > 1
    assert "contains" in screen and "jrt-table1 v1 (1000/50)" in screen
    assert samples_of(ours, tmp_path / "ours", mirror)[0] == answers
    run = ["eval", "--model", str(tiny_gpt2), "--tasks", "squad", "--strategy", "twice", "--limit", "3"]
    assert main([*run, "--data", str(mirror), "--output", str(tmp_path / "run")]) == 0
    lines = (tmp_path / "run" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert {row["id"]: row["prediction"] for row in map(json.loads, lines)} == answers


def test_saved_settings_that_change_answers_are_told(tmp_path):
    quiet, loud = tmp_path / "quiet", tmp_path / "loud"
    GenerationConfig(do_sample=True, temperature=0.7, repetition_penalty=1.0, eos_token_id=3).save_pretrained(quiet)
    GenerationConfig(repetition_penalty=1.3, min_length=2, suppress_tokens=[5]).save_pretrained(loud)
    assert acting_settings({"model": "hf", "model_args": f"pretrained={quiet}"}) is None
    assert acting_settings({"model": "jrt", "model_args": f"pretrained={loud}"}) is None
    assert acting_settings({"model": "hf", "model_args": f"pretrained={tmp_path / 'absent'}"}) is None
    told = acting_settings({"model_args": {"pretrained": str(loud)}})
    assert told is not None and "min_length=2, repetition_penalty=1.3, suppress_tokens=[5]" in told
    command = [sys.executable, "-c", "from jrt_recall.harness import main; main()", "--model", "hf", "--device", "cpu"]
    command += ["--tasks", "recall_squad", "--limit", "1", "--model_args", f"pretrained={loud}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and told in done.stderr  # the folder has no weights


def test_the_command_adds_the_include_path_and_nothing_else(capsys, monkeypatch):
    assert harness.arguments(["--tasks", "a"]) == ["run", "--include_path", str(task_folder()), "--tasks", "a"]
    assert harness.arguments(["run", "--tasks", "a"]) == harness.arguments(["--tasks", "a"])
    monkeypatch.setattr(sys, "argv", ["jrt-recall", "--path"])
    harness.main()
    assert Path(capsys.readouterr().out.strip()) == task_folder()
    monkeypatch.setattr(sys, "argv", ["jrt-recall", "--protocols"])
    harness.main()
    assert "jrt-table1 v1: window 1000" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["jrt-recall", "--include_path", "x", "--tasks", "a"])
    with pytest.raises(SystemExit) as stopped:
        harness.main()
    assert stopped.value.code == 2 and "--include_path" in capsys.readouterr().err


BASE = ("run", "--model", "jrt", "--tasks", "qa_squad")


def parsed(*options):
    return settings.parsed(HarnessCLI()._parser.parse_args([*BASE, *options]))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--gen_kwargs", "max_gen_toks=3"], "contradicts the protocol"),
        (["--gen_kwarg", "max_gen_toks=3"], "contradicts the protocol"),
        (["--cache_requests", "true"], "request cache"),
        (["--apply_chat_template"], "prompts"),
        (["--num_fewshot", "2"], "strategies"),
        (["--metadata", '{"protocl": "full", "max_item": 1}'], "protocl, max_item"),
        (["--metadata", "protocl=full"], "protocl"),
    ],
)
def test_what_would_change_the_protocol_is_refused_by_what_was_parsed(options, said):
    with pytest.raises(ValueError, match=said):
        settings.check(parsed(*options))


def test_a_config_file_is_judged_like_the_command_line(tmp_path):
    file = tmp_path / "c.yaml"
    for text, said in (
        ("gen_kwargs: {max_gen_toks: 3}\n", "contradicts"),
        ("metadata: {sed: 1}\n", "sed"),
        ("no_such_setting: 1\n", "no_such_setting"),
        ("- a list\n", "mapping"),
        ("a: [\n", "YAML"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=said):
            settings.check(parsed("--config", str(file)))
    settings.check(parsed("--metadata", '{"protocol": "full", "max_items": "2", "tokenizer": "gpt2"}', "--limit", "3"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("limit: many", "--limit: expected a number above 0"),
        ("limit: [1]", "--limit"),
        ("limit: -5", "--limit"),
        ("limit: true", "--limit"),
        ("batch_size: [1]", "--batch_size: expected a whole number"),
        ("batch_size: -1", "--batch_size"),
        ("max_batch_size: much", "--max_batch_size"),
        ("device: 3", "--device: expected text"),
        ("use_cache: 3", "--use_cache"),
        ("verbosity: 3", "--verbosity"),
        ("log_samples: 'no'", "--log_samples: expected true or false"),
        ("trust_remote_code: x", "--trust_remote_code"),
        ("wandb_args: 3", "--wandb_args"),
        ("hf_hub_log_args: [1]", "--hf_hub_log_args"),
        ("samples: 3", "--samples"),
        ("samples: {qa_squad: 3}", "--samples"),
        ("samples: {qa_squad: [a]}", "--samples"),
        ("samples: no_such_file", "--samples.*file"),
    ],
)
def test_values_of_a_wrong_kind_are_named(text, said, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=said):
        parsed("--config", str(file))


def test_values_in_quotes_and_of_the_right_kind_are_read(tmp_path):
    file, numbers = tmp_path / "c.yaml", tmp_path / "numbers.json"
    numbers.write_text('{"qa_squad": [0, 2]}')
    file.write_text(f"limit: '1'\nbatch_size: '2'\nmax_batch_size: '4'\nsamples: {numbers}\nwandb_args: project=a\n")
    found = parsed("--config", str(file))
    assert (found["limit"], found["batch_size"], found["max_batch_size"]) == (1, 2, 4)
    assert found["samples"] == {"qa_squad": [0, 2]}
    assert parsed("--batch_size", "auto:4", "--limit", "0.5")["batch_size"] == "auto:4"


def test_other_tasks_keep_their_own_settings():
    given = [
        "run",
        "--model",
        "hf",
        "--tasks",
        "mmlu,recall_super_glue",
        "--num_fewshot",
        "5",
        "--metadata",
        '{"x": 1}',
    ]
    settings.check(settings.parsed(HarnessCLI()._parser.parse_args(given)))


def test_numbers_in_quotes_are_numbers():
    assert settings.whole_number("n", "2") == settings.whole_number("n", 2) == 2
    for wrong in ("two", "", 1.5, True, None, "²"):
        with pytest.raises(ValueError, match="max_items: expected a whole number"):
            settings.whole_number("max_items", wrong)
    with pytest.raises(ValueError, match="at least 1"):
        settings.whole_number("max_items", "0", least=1)


@pytest.mark.parametrize(
    ("given", "tasks"),
    [
        (
            ["--tasks", "fda,recall_squad_twice,nq_512_n_times,qa_nq,mmlu", "--limit", "3"],
            ["recall_fda", "recall_squad_twice", "recall_nq_512_n_times", "qa_nq", "mmlu"],
        ),
        (["-t", "drop", "squad", "--device", "drop"], ["recall_drop", "recall_squad"]),
        (["--tasks=reference_pages_512"], ["recall_reference_pages_512"]),
        (["--task", "fda", "--tasks", "swde"], ["recall_fda", "recall_swde"]),
    ],
)
def test_the_command_knows_tasks_by_both_spellings(monkeypatch, given, tasks):
    """A name that is none of this package's is left to lm-eval."""
    ran = []
    monkeypatch.setattr(HarnessCLI, "execute", lambda _, namespace: ran.append(namespace))
    monkeypatch.setattr(sys, "argv", ["jrt-recall", *given])
    with pytest.raises(SystemExit) as stopped:
        harness.main()
    assert stopped.value.code == 0
    assert [one.tasks for one in ran] == [tasks]
    assert ran[0].device != "recall_drop"


def test_super_glue_is_upstream_with_documents_from_the_mirror(tmp_path, monkeypatch):
    """All eight tasks, few-shot and offline: prompts and choices are those of upstream's own files."""
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("JRT_DATA", str(fixtures.write_super_glue(tmp_path)))
    found = TaskManager(include_path=str(task_folder())).load(["recall_super_glue"])["tasks"]
    assert set(found) == set(super_glue.TASKS.values()) and len(found) == 8
    for task in found.values():
        task.set_config("num_fewshot", 2)
        task.build_all_requests(limit=2, rank=0, world_size=1)
        contexts = [request.args[0] for request in task.instances if request.doc_id == 1]
        choices = task.doc_to_choice(task.eval_docs[1])
        assert len(contexts) == len(choices) >= 2
        assert contexts[0].count("\n\n") >= 2 and task.doc_to_text(task.eval_docs[1]) in contexts[0]
    (tmp_path / "super_glue" / "cb" / "train.jsonl").write_text('{"premise": "a"}\n')
    with pytest.raises(ValueError, match="cb: the train split lacks hypothesis, label"):
        super_glue.documents("cb")


def test_record_is_upstreams_task():
    """Its prompts, and its scores against SQuAD's metric, worked out by hand."""
    doc = {"passage": "Ann met Bob.\n@highlight\nIt rained\n@highlight\nIt was May ", "query": "Then @placeholder left"}
    doc |= {"entities": ["Ann Lee", "Bob", "The Bob!"], "answers": ["Ann B. Lee", "bob"]}
    assert super_glue.record_text(doc) == "Ann met Bob.\n\n  - It rained.\n  - It was May.\n"
    assert super_glue.record_choices(doc)[1] == "  - Then Bob left"
    assert super_glue.record_target(doc) == "  - Then Ann B. Lee left"

    def scored(*likelihoods: float) -> dict:
        return super_glue.record_score(doc, [(likelihood, False) for likelihood in likelihoods])

    assert scored(-1, -2, -3) == {"f1": 2 * 2 / 5, "em": 0.0}
    assert scored(-3, -1, -2) == scored(-3, -2, -1) == {"f1": 1.0, "em": 1.0}


def test_importing_the_package_loads_nothing_heavy():
    heavy = ("torch", "transformers", "datasets", "lm_eval", "numpy", "tokenizers", "jrt")
    code = f"import sys, jrt_recall; print([m for m in {heavy!r} if m in sys.modules])"
    environment = os.environ | {"PYTHONPATH": str(PACKAGE)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
