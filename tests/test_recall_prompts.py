"""Prompts of jrt_recall: byte-equal to the published ones, and properties that follow from their definition."""

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jrt_recall import PUBLISHED, contains, fixtures, prompt, strategy_named
from jrt_recall.scoring import IRRELEVANT, NO_ANSWER, REPETITION, error_kind

TEXT = st.text(alphabet=st.sampled_from("ab .:\n?Question[PAR]é"), max_size=40)
FILLED = st.text(alphabet=st.sampled_from("abc d:"), min_size=1, max_size=12).filter(lambda text: text.strip())


@pytest.fixture(scope="module")
def published(shared) -> list[dict]:
    return json.loads((shared / "golden" / "prompts.json").read_text(encoding="utf-8"))


def test_prompts_equal_the_published_ones(published):
    assert {case["task"] for case in published} == {"swde", "fda", "squad", "drop", "nq", "triviaqa"}
    for case in published:
        doc = copy.deepcopy(case["doc"])
        assert prompt(case["task"], doc) == case["default"]
        assert prompt(case["task"], doc, "twice") == case["twice"]
        assert doc == case["doc"], "a document was changed"


def test_contains_equals_the_published_metric(published):
    scored = [score for case in published for score in case["contains"] if score["score"] is not None]
    assert {score["score"] for score in scored} == {0, 1}
    for score in scored:
        assert contains(score["prediction"], score["labels"]) == bool(score["score"])


def test_nq_sizes_share_their_prompts(published):
    for case in published:
        if case["task"] == "nq":
            assert {prompt(f"nq_{size}", case["doc"], "twice") for size in (512, 1024, 2048)} == {case["twice"]}


@pytest.mark.parametrize("task", PUBLISHED)
def test_n_times_repeats_the_context_of_the_twice_form(task):
    doc = fixtures.documents(task, 1, sentences=4)[0]
    first, twice, thrice = (prompt(task, doc, strategy) for strategy in ("question_first", "twice", "3x"))
    repeated = len(twice) - len(first)
    # From the end both forms agree; each further reading adds the same lines after the announcement.
    assert twice.endswith(first[-repeated:]) and thrice.endswith(twice[-repeated:])
    assert len(thrice) - len(twice) == repeated > 0
    assert thrice.count("\n") - twice.count("\n") == twice.count("\n") - first.count("\n") >= 1
    assert prompt(task, doc, "2x") == twice and prompt(task, doc, "1-times") == first


@pytest.mark.parametrize("task", PUBLISHED)
def test_both_spellings_of_a_task_ask_the_same(task):
    doc = fixtures.documents(task, 1, sentences=4)[0]
    assert prompt(f"recall_{task}", doc, "twice") == prompt(task, doc, "twice")


def test_squad_reads_the_uncut_context_first():
    doc = {"text": "the cut window", "context": "the whole passage\nQuestion: q?", "question": "Q?", "value": "whole"}
    assert prompt("squad", doc, "twice") == "Q? the whole passage\n\nthe cut window"
    assert prompt("squad", doc, "question_first") == "Q? the cut window"
    assert prompt("squad", doc) == "the cut window"


def test_the_key_is_cut_from_the_end_as_often_as_it_stands_there():
    doc = {"text": "Made by Ann. Maker:maker:MAKER:", "key": "maker", "value": "Ann"}
    assert prompt("swde", doc) == "Made by Ann. Maker:"
    assert prompt("fda", doc) == "Made by Ann. . Maker:"


def test_nq_cuts_one_question_in_its_own_case_and_drop_all_in_any():
    doc = {"context": "It rained. the end the end", "question": "the end", "orig_question": "What:", "answers": ["x"]}
    assert prompt("nq", doc) == "It rained. the end. the end"
    assert prompt("drop", doc | {"context": "It rained. THE ENDthe end"}) == "It rained. the end"
    assert prompt("nq", doc | {"context": "It rained. The End"}) == "It rained. The End. the end"
    assert prompt("nq", doc | {"context": "It rained. The End"}, "twice") == "What It rained.\nIt rained. the end"


def test_trivia_announces_its_question_as_it_stands_and_drop_without_colons():
    doc = {"context": "[TLE]It rained.", "question": "It", "orig_question": ":What: ", "answers": ["x"], "doc_id": "d"}
    assert prompt("triviaqa", doc, "question_first") == ":What:  It rained. It"
    assert prompt("drop", doc | {"context": "It rained.", "orig_question": ":What:"}, "1x") == "What It rained. It"


@settings(max_examples=60, deadline=None)
@given(text=TEXT, question=FILLED, other=TEXT, task=st.sampled_from(sorted(PUBLISHED)))
def test_any_document_ends_with_its_question_and_stays_as_it_was(text, question, other, task):
    doc = {"text": text, "key": question, "value": other, "context": text, "question": question}
    doc |= {"orig_question": other, "answers": [other], "doc_id": ""}
    before = copy.deepcopy(doc)
    made = {name: prompt(task, doc, name) for name in ("once", "question_first", "twice", "4x")}
    assert doc == before
    if task != "squad":
        ending = question[0].upper() + question[1:] + ":" if task in ("swde", "fda") else question.strip()
        assert all(text.endswith(" " + ending) for text in made.values())
        assert made["4x"].count("\n") - made["twice"].count("\n") == 2 * (
            made["twice"].count("\n") - made["question_first"].count("\n")
        )


@pytest.mark.parametrize(
    ("task", "doc", "strategy", "said"),
    [
        ("swde", {"text": "a"}, "once", "'key'"),
        ("fda", {"key": "k"}, "twice", "'text'"),
        ("squad", {"text": "a"}, "twice", "'context'"),
        ("drop", {"context": "a", "question": "q"}, "twice", "'orig_question'"),
        ("nq", {"context": "a", "question": " ", "orig_question": "q"}, "once", "empty"),
        ("swde", {"text": "a", "key": ""}, "once", "empty"),
        ("swde", {"text": None, "key": "k"}, "once", "got null"),
        ("squad", {"text": "a"}, "thrice", "once, twice"),
        ("squad", {"text": "a"}, "0x", "1 to"),
        ("squad", {"text": "a"}, "99shot", "1 to"),
        ("squad", {"text": "a"}, "2shot", "use jrt_recall.items"),
        ("recall_squat", {"text": "a"}, "once", "unknown task"),
        ("squad", ["a"], "once", "dict"),
    ],
)
def test_bad_input_is_named(task, doc, strategy, said):
    with pytest.raises(ValueError, match=said):
        prompt(task, doc, strategy)


def test_once_needs_only_what_it_reads():
    assert prompt("drop", {"context": "A.", "question": "B"}) == "A. B"


def test_strategy_spellings():
    assert strategy_named("question-first").name == strategy_named("1x").name == "question_first"
    assert strategy_named("3-times") == strategy_named("3x") == strategy_named("3 times")
    assert strategy_named("2-shot") == strategy_named("2shot") == strategy_named("2 shots")
    assert strategy_named("Twice").name == strategy_named("2_times").name == "twice"


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [(" a.b", ["a.b"], True), ("axb", ["a.b"], False), ("STRASSE", ["straße"], False), ("x", ["y", "X"], True)],
)
def test_contains_is_literal_and_ignores_case(prediction, answers, expected):
    assert contains(prediction, answers) is expected


def test_contains_refuses_no_answers():
    with pytest.raises(ValueError, match="at least one"):
        contains("x", [])
    assert contains("a cat", "CAT")


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        (" It was Ann Lee.", None),
        ("", NO_ANSWER),
        (" ... - \n", NO_ANSWER),
        (" Ann. Ann. Ann. Ann. Ann.", REPETITION),
        (" the old man and the old man and the old man and the old", REPETITION),
        (" of oil and gas of oil and gas", REPETITION),
        (" one two three four, and then one two three four", REPETITION),
        (" Ann Ann", IRRELEVANT),
        (" a b a c", IRRELEVANT),
        (" the harbour opened before winter came to the town", IRRELEVANT),
        (" Ann Lee Ann Lee Ann Lee", None),
    ],
)
def test_errors_have_one_kind_each(prediction, expected):
    assert error_kind(prediction, ["ann lee"]) == expected
