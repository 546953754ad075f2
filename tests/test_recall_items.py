"""Items and protocols of jrt_recall: which questions a run asks, and the counts that its results state."""

import json

import pytest
from jrt_recall import (
    PROTOCOLS,
    PUBLISHED,
    TASKS,
    data,
    fixtures,
    items,
    prompt,
    protocols,
    task_folder,
    task_named,
)
from jrt_recall.tokenizers import is_gpt2
from transformers import AutoTokenizer


@pytest.fixture(scope="module")
def gpt2(shared):
    return AutoTokenizer.from_pretrained(shared / "gpt2")


@pytest.fixture(scope="module")
def mirror(tmp_path_factory):
    return fixtures.write(tmp_path_factory.mktemp("mirror"), count=8, sentences=40)


def test_protocols_say_what_was_published():
    table1 = PROTOCOLS["jrt-table1"]
    assert (table1.window, table1.answer_room, table1.max_prompt_tokens) == (1000, 50, 2000)
    assert (table1.padding_side, table1.truncation_side, table1.max_new_tokens) == ("left", "left", 48)
    assert (table1.stop, table1.metric, table1.cutting_tokenizer) == (("\n",), "contains", "gpt2")
    assert [protocol.window for protocol in protocols.cells("jrt-table2", "swde")] == [512, 1024, 2048]
    assert [protocol.window for protocol in protocols.cells("jrt-table2", "nq_512")] == [2000]
    assert protocols.cells("full", "fda")[0].window is None
    for name in ("w2000-a50", "w2048-a48", "w2048-a50"):
        assert name == f"w{PROTOCOLS[name].window}-a{PROTOCOLS[name].answer_room}"
    assert json.loads(json.dumps(table1.as_dict()))["stop"] == ["\n"]
    assert "window 1000, answer room 50" in table1.describe()


@pytest.mark.parametrize(
    ("name", "task", "said"),
    [
        ("table1", "swde", "jrt-table1, .*jrt-table2"),
        ("pages-512", "swde", "not for swde"),
        ("jrt-table1", "reference_pages", "choose one of pages-512"),
        ("jrt-table2-512", "nq_512", "not for nq_512"),
        ("jrt-table2", "swde", "several windows"),
        (None, "reference_pages", "pages-512, pages-1024, pages-2048"),
    ],
)
def test_protocols_that_do_not_fit_are_refused(name, task, said):
    with pytest.raises(ValueError, match=said):
        protocols.protocol_named(name, task)


def test_a_task_has_one_name_here_and_in_lm_eval(mirror):
    assert all((task_folder() / f"{task}.yaml").is_file() for task in TASKS)
    for task in PUBLISHED:
        assert task_named(task) == task_named(f"recall_{task}") == f"recall_{task}"
    short, full = (items(name, "once", "full", limit=2, data=mirror) for name in ("fda", "recall_fda"))
    assert short == full and short.task == "recall_fda" and short.items[0].id == "fda/0"
    pages = [
        items("reference_pages", "once", "pages-1024", limit=2),
        items("reference_pages_1024", "once", limit=2),
        items("recall_reference_pages_1024", "once", "pages", limit=2),
    ]
    assert pages[0] == pages[1] == pages[2] and pages[0].task == "recall_reference_pages_1024"
    with pytest.raises(ValueError, match="pages-512 is not for reference_pages_1024: choose one of pages-1024"):
        items("reference_pages_1024", "once", "pages-512")


@pytest.mark.parametrize("task", PUBLISHED)
@pytest.mark.parametrize("strategy", ["once", "twice", "3x", "question_first"])
def test_every_task_and_strategy_runs_under_every_protocol(task, strategy, mirror, gpt2):
    for name in ("jrt-table1", "jrt-table2", "full", "w2048-a48"):
        for protocol in protocols.cells(name, task):
            run = items(task, strategy, protocol, gpt2, data=mirror)
            assert (len(run.items), run.documents, run.dropped, run.absent) == (8, 8, 0, 0)
            assert run.protocol == protocol
            assert [item.prompt for item in run.items] == [prompt(task, item.doc, strategy) for item in run.items]
            assert run.lost == sum(item.position is None for item in run.items)
            assert run.summary()["protocol"] == protocol.name
            if protocol.window is not None:
                column = PUBLISHED[task].context
                longest = max(len(gpt2(item.doc[column])["input_ids"]) for item in run.items)
                assert longest <= protocol.window - protocol.answer_room + 1  # cut text may split anew at its edges


def test_documents_that_cannot_be_asked_are_counted_with_their_reason(tmp_path, gpt2):
    good = fixtures.documents("nq_512", 1, sentences=3)[0]
    rows = [good, good | {"answers": []}, good | {"answers": ["x"]}, good | {"question": ""}, good | {"answers": [""]}]
    rows += [good | {"answers": ["nowhere"]}, good | {"context": None}]
    data.store("nq_512", rows, "test", tmp_path)
    run = items("nq_512", "twice", "jrt-table1", gpt2, data=tmp_path)
    assert (len(run.items), run.documents, run.dropped, run.absent, run.lost) == (2, 7, 1, 1, 0)
    assert len(run.invalid) == 4
    reasons = " / ".join(run.invalid)
    for said in ("document 1", "answers is empty", "'question' is empty", "an answer is blank", "null"):
        assert said in reasons
    # Nothing is cut under `full`, so nothing is dropped for its length: as published.
    assert len(items("nq_512", "once", "full", data=tmp_path).items) == 3
    data.store("nq_512", [good | {"answers": []}], "test", tmp_path)
    with pytest.raises(ValueError, match=r"no item is left of 1 documents.*answers is empty"):
        items("nq_512", "once", "full", data=tmp_path)


def test_lost_answers_are_those_cut_away(tmp_path, gpt2):
    filler = "the harbour was quiet. " * 400
    row = {"context": filler + "Ann won.", "question": "It was", "orig_question": "Who?", "answers": ["Ann"]}
    data.store("drop", [row, row | {"context": "Ann won. " + filler}, row | {"answers": ["Eve"]}], "test", tmp_path)
    run = items("drop", "once", "jrt-table1", gpt2, data=tmp_path)
    assert [item.lost for item in run.items] == [True, False, False]
    assert (run.lost, run.absent) == (1, 1)
    assert run.items[1].position == 0.0 and run.items[0].position is None


def test_swde_pages_end_before_their_summary(tmp_path, gpt2):
    page = "Film. Director: Ann Lee." + "Summary of information above... director:"
    data.store("swde", [{"text": page, "key": "director", "value": "Ann Lee"}], "test", tmp_path)
    run = items("swde", "once", "jrt-table1", gpt2, data=tmp_path)
    assert run.items[0].prompt == "Film. Director: Ann Lee. Director:"
    page = "Film. Maker: Eve." + "Summary of information above... Ann Lee"
    data.store("swde", [{"text": page, "key": "director", "value": "Ann Lee"}], "test", tmp_path)
    assert items("swde", "once", "jrt-table1", gpt2, data=tmp_path).absent == 1


def test_another_cutting_tokenizer_gives_the_protocol_another_name(mirror, gpt2, shared, tmp_path, monkeypatch):
    assert is_gpt2(gpt2)
    renamed = items("squad", "once", "jrt-table1", "shipped", data=mirror).protocol
    assert renamed.name == "jrt-table1+cut-by-shipped" and renamed.cutting_tokenizer == "shipped"
    assert items("squad", "once", "jrt-table1", str(shared / "gpt2"), data=mirror).protocol.name == "jrt-table1"
    # The mirror may hold GPT-2's tokenizer, for machines without network.
    (tmp_path / "gpt2").symlink_to(shared / "gpt2")
    monkeypatch.setenv(data.FOLDER_VARIABLE, str(tmp_path))
    assert items("squad", "once", "jrt-table1", data=mirror).protocol.name == "jrt-table1"


def test_a_missing_cutting_tokenizer_says_what_to_do(mirror, monkeypatch, tmp_path):
    monkeypatch.delenv(data.FOLDER_VARIABLE, raising=False)
    with pytest.raises(ValueError, match=r"nowhere.*JRT_DATA/gpt2.*shipped"):
        items("squad", "once", "jrt-table1", str(tmp_path / "nowhere"), data=mirror)


def test_limits_and_names_are_checked(mirror):
    assert len(items("fda", "once", "full", limit=3, data=mirror).items) == 3
    with pytest.raises(ValueError, match="at least 1"):
        items("fda", limit=0, data=mirror)
    with pytest.raises(ValueError, match=r"unknown task 'nope'.*reference_pages.*qa_squad"):
        items("nope")


def test_examples_are_other_documents_with_their_answers(mirror, gpt2):
    once = items("squad", "once", "full", data=mirror)
    run = items("squad", "2-shot", "full", data=mirror)
    assert run.strategy == "2shot" and run.summary()["seed"] == 0
    answered = {f"{item.prompt} {item.answers[0]}": item.id for item in once.items}
    for item, plain in zip(run.items, once.items, strict=True):
        *shown, asked = item.prompt.split("\n\n")
        assert asked == plain.prompt and item.answers == plain.answers and item.id == plain.id
        assert len({answered[example] for example in shown} - {item.id}) == 2
    assert items("squad", "2shot", "full", data=mirror) == run
    assert items("squad", "2shot", "full", seed=1, data=mirror).items != run.items
    with pytest.raises(ValueError, match="come from other documents of the run; item 0 has"):
        items("squad", "2shot", "full", limit=2, data=mirror)


def test_examples_of_pages_are_whole_headings():
    run = items("reference_pages", "1shot", "pages-512", limit=4)
    once = items("reference_pages", "once", "pages-512", limit=4)
    shown = [item.prompt.removesuffix(plain.prompt) for item, plain in zip(run.items, once.items, strict=True)]
    assert all(example in {f"{other.prompt}{other.answers[0]}\n\n" for other in once.items} for example in shown)
