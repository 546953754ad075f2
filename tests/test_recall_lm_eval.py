"""The protocols of lm-eval's own swde, fda and squad_completion against the installed lm-eval; windows by number."""

import dataclasses
import json

import pytest
from jrt_recall import data, fixtures, items, prompt, protocol_named
from jrt_recall.scoring import contains

from jrt.evaluate import LocalPool, ModelSpec, Request, plan, run
from jrt.evaluate.tables.side_by_side import agreements, protocols_side_by_side

NAMES = ("swde", "fda", "squad")


def upstream(name: str):
    """lm-eval's own task without its dataset, which is on the hub: its prompts, answers and scores need none."""
    from lm_eval.tasks.fda.task import FDA
    from lm_eval.tasks.squad_completion.task import SQUADCompletion
    from lm_eval.tasks.swde.task import SWDE

    return object.__new__({"swde": SWDE, "fda": FDA, "squad": SQUADCompletion}[name])


@pytest.fixture(scope="module")
def mirror(tmp_path_factory):
    """Generated documents with white space around text and value, as the published ones have it."""
    folder = tmp_path_factory.mktemp("mirror")
    for name in NAMES:
        rows = fixtures.documents(name, count=4, sentences=6)
        rows = [{**row, "text": f" \n{row['text']} \n", "value": f" {row['value']}\n"} for row in rows]
        rows[0] = {**rows[0], "text": "Summary of information above... " + rows[0]["text"]}
        data.store(name, rows, fixtures.SOURCE, folder)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_version_1_is_the_installed_lm_eval(name, mirror):
    task, rows = upstream(name), data.load(name, mirror).rows
    assert task.VERSION == protocol_named("lm-eval-v1", name).version == 1
    run_items = items(name, protocol="lm-eval-v1", data=mirror)
    assert (run_items.dropped, run_items.invalid, len(run_items.items)) == (0, (), len(rows))
    for item, row in zip(run_items.items, rows, strict=True):
        assert item.prompt == prompt(name, row, protocol="lm-eval-v1") == task.doc_to_text(row)
        assert item.answers == (task.doc_to_target(row),)
        value = row["value"].strip()
        for written in (value, value.upper(), f"the {value}.", value[:-1], "", row["value"]):
            assert contains(written, item.answers) == bool(task.process_results(row, [written])["contains"])


@pytest.mark.parametrize("name", NAMES)
def test_version_1_asks_for_generation_as_the_installed_lm_eval(name):
    from types import SimpleNamespace

    task, protocol = upstream(name), protocol_named("lm-eval-v1", name)
    task._config = SimpleNamespace(generation_kwargs={})
    settings = task.construct_requests({}, "context")[0].arguments[1]
    assert settings == {"until": list(protocol.stop), "max_gen_toks": protocol.max_new_tokens}


@pytest.mark.parametrize("name", NAMES)
def test_version_0_takes_text_and_value_as_they_are(name, mirror):
    rows = data.load(name, mirror).rows
    for item, row in zip(items(name, protocol="lm-eval-v0", data=mirror).items, rows, strict=True):
        assert item.prompt == row["text"] == prompt(name, row, "once", "lm-eval-v0")
        assert item.answers == (row["value"],)
    assert protocol_named("lm-eval-v0", name).version == 0


def test_reading_twice_repeats_the_whole_text():
    row = {"text": " a page Key: ", "key": "key", "value": "v"}
    assert prompt("fda", row, "twice", "lm-eval-v1") == "a page Key:\na page Key:"
    assert prompt("fda", row, "3x", "lm-eval-v0") == "\n".join([" a page Key: "] * 3)
    with pytest.raises(ValueError, match="no question apart"):
        prompt("fda", row, "question_first", "lm-eval-v1")
    with pytest.raises(ValueError, match="'text' is empty"):
        prompt("fda", {**row, "text": " "}, "once", "lm-eval-v1")
    assert prompt("fda", row, "twice", "jrt-table1") == prompt("fda", row, "twice")


def test_passages_have_the_same_prompts_under_lm_evals_rules_as_whole(tmp_path):
    line = {"context": "The river Ane ends at Tol.", "question": "Where does the Ane end?", "answers": ["Tol"]}
    (tmp_path / "squad.jsonl").write_text(json.dumps(line) + "\n")
    prompts = [
        items("qa_squad", protocol=name, data=tmp_path).items[0].prompt for name in ("lm-eval-v0", "lm-eval-v1", "full")
    ]
    assert prompts == ["The river Ane ends at Tol.\nQuestion: Where does the Ane end?\nAnswer:"] * 3


@pytest.mark.parametrize("task", ["drop", "nq_1024", "triviaqa", "qa_fda", "reference_pages_512"])
def test_tasks_that_lm_eval_has_not(task):
    with pytest.raises(ValueError, match="not for"):
        protocol_named("lm-eval-v1", task)


@pytest.mark.parametrize(("name", "limit"), [("w1536-a64", 2000), ("w2048-a0", 2000), ("w4096-a64", None)])
def test_a_window_by_number(name, limit, mirror):
    found = protocol_named(name, "squad")
    assert f"w{found.window}-a{found.answer_room}" == found.name == name
    assert (found.max_prompt_tokens, found.cutting_tokenizer) == (limit, "gpt2")
    assert items("squad", protocol="w300-a50", tokenizer="shipped", data=mirror).protocol.window == 300


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("w64-a64", "leaves nothing"),
        ("w50-a64", "leaves nothing"),
        *(
            (name, "such as w1536-a64")
            for name in ("w0-a0", "w01536-a64", "w1536", "w1536-a064", "W1536-a64", "w1e3-a5")
        ),
        *(
            (name, "a window by number is w, its tokens")
            for name in ("w0-a64", "W512-A32", "w512a32", " w512-a32", "w-512-a32", "w99999999999-a1")
        ),
        (1536, "named by text"),
    ],
)
def test_windows_that_contradict_are_refused(name, said):
    with pytest.raises(ValueError, match=said):
        protocol_named(name, "squad")


@pytest.mark.parametrize("name", [1536, ["full"], {"full"}, {"full": 1}, b"full", ("full",)])
def test_names_that_are_no_text_are_refused(name):
    doc = {"text": "Price: 5", "key": "Price", "value": "5"}
    with pytest.raises(ValueError, match="named by text"):
        prompt("fda", doc, protocol=name)
    with pytest.raises(ValueError, match="unknown task"):
        prompt(name, doc)
    with pytest.raises(ValueError, match="unknown task"):
        protocol_named("full", name)


def test_one_run_under_several_protocols(mirror, tmp_path):
    names = ("lm-eval-v0", "lm-eval-v1", "full", "w1536-a64")
    with pytest.raises(ValueError, match="named twice"):
        plan(Request((ModelSpec("mini-based"),), ("squad",), protocol=("full", "full"), data=mirror))
    request = Request((ModelSpec("mini-based"),), ("squad",), protocol=names[:3], limit=3, data=mirror)
    outcome = run(plan(request), LocalPool(), tmp_path / "run")
    text = protocols_side_by_side(outcome)
    assert text.splitlines()[0].split()[-3:] == list(names[:3])
    by_cell = {(row["protocol"], row["id"]): row for row in outcome.predictions}
    for item in (row["id"] for row in outcome.predictions if row["protocol"] == "full"):
        stripped, published = by_cell["lm-eval-v1", item], by_cell["full", item]
        assert stripped["prompt"] == published["prompt"] != by_cell["lm-eval-v0", item]["prompt"]
        assert stripped["prediction"] == published["prediction"]
    assert "lm-eval-v1 and full: 3 of 3 prompts are equal, 3 of these have the same answer" in text
    assert (
        agreements([]) == [] and protocols_side_by_side(dataclasses.replace(outcome, records=outcome.records[:1])) == ""
    )
