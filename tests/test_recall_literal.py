"""Prompts and windows of generated documents, compared with a second implementation of the published rules.

The second implementation was written from the rules, independently of the code under test."""

import copy
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jrt_recall import PUBLISHED, contains, cut, prompt
from transformers import AutoTokenizer


def literal_prompt(task: str, doc: dict, twice: bool) -> str:
    """The published prompt, one task after the other as the release spells it."""
    if task in ("swde", "fda"):
        key, text = doc["key"], doc["text"]
        if task == "swde" and "Summary of information above..." in text:
            text = text[: text.index("Summary of information above...")]
        while text.lower().endswith(key.lower() + ":"):
            text = text[: len(text) - len(key) - 1]
        name = key[0].upper() + key[1:]
        if task == "swde" and not twice:
            return text.strip("\n").strip().strip("\n").strip().strip(".") + "." + " " + name + ":"
        if task == "swde":
            text = text.strip("\n").strip(".").strip().strip("\n").strip()
        else:
            text = text.strip("\n").strip(".")
        if not text.endswith("."):
            text += "."
        return f"Information about {name}. {text}\n{text} {name}:" if twice else f"{text} {name}:"
    if task == "squad":
        if twice:
            return f"{doc['question']} {doc['context'].split('Question:')[0]}\n{doc['text'].strip()}"
        return doc["text"].strip()
    context, question = doc["context"], doc["question"].strip()
    if task == "triviaqa":
        context = context.replace("[PAR]", "").replace("[DOC]", "").replace("[TLE]", "")
    context = context.strip()
    if task.startswith("nq") and not twice:
        if context.endswith(question):
            context = context[: len(context) - len(question)]
    else:
        while context.lower().endswith(question.lower()):
            context = context[: len(context) - len(question)]
    if not twice:
        return context.strip().strip(".") + ". " + question
    context = context.strip().strip(".").strip() + "."
    asked = doc["orig_question"] if task == "triviaqa" else doc["orig_question"].strip(":")
    return f"{asked} {context}\n{context} {question}"


def literal_cut(doc: dict, column: str, keys: list[str], tokenizer, window: int, room: int) -> dict | None:
    """The published `truncate_context`; None where it skips the document."""

    def encoded(text: str) -> list[int]:
        return tokenizer(text)["input_ids"]

    desired = window - room
    context = doc[column].strip()
    tokens = encoded(context)
    position = -1
    for key in keys:
        answer = doc[key][0] if isinstance(doc[key], list) else doc[key]
        if answer == "" or len(answer) <= 1:
            return None
        match = re.search(re.escape(answer), context, re.IGNORECASE)
        if match and (position < 0 or match.start() < position):
            position = match.start()
    if position < 0 and "alt_answers" in doc:
        for answer in doc["alt_answers"]:
            match = re.search(re.escape(answer), context, re.IGNORECASE)
            if match:
                position = match.start()
                break
    if not keys:
        position = 0
    before = len(encoded(context[:position]))
    if position == -1 and "tok_pos" in doc and before > desired:
        before = doc["tok_pos"]
    start = max(0, before - desired // 2)
    end = min(len(tokens), before + desired - (before - start))
    return {**doc, column: tokenizer.decode(tokens[start:end], skip_special_tokens=True)}


# Small alphabets, so that keys, answers and questions do come back inside and at the end of a text.
PIECES = [
    "a",
    "B",
    "é",
    "ß",
    "数",
    " ",
    "  ",
    ".",
    "..",
    "\n",
    "\n\n",
    ":",
    "?",
    "(",
    "[a",
    "\\",
    "*",
    "[PAR]",
    "[DOC]",
]
PIECES += [
    "Question:",
    "Summary of information above...",
    "maker",
    "Maker:",
    "the end",
    "THE END",
    " won",
    "<|endoftext|>",
]
TEXT = st.lists(st.sampled_from(PIECES), max_size=24).map("".join)
FILLED = st.lists(st.sampled_from(PIECES), min_size=1, max_size=3).map("".join).filter(lambda text: text.strip())
LONG = st.lists(st.sampled_from(PIECES), min_size=30, max_size=90).map("".join)


@st.composite
def documents(draw, text=TEXT) -> dict:
    """A document with every task's fields; its key, question and answer may stand at its end, in any letter case."""
    key, question = draw(st.sampled_from(["maker", "the end", "Ünit"]) | FILLED), draw(FILLED)
    answers = draw(st.lists(FILLED, min_size=1, max_size=3))
    endings = ["", key + ":", key.upper() + ":" + key + ":", question, question.upper() + question, answers[0]]
    body = draw(text) + draw(st.sampled_from(endings)) + draw(st.sampled_from(["", "\n", ". ", "\n\n"]))
    doc = {"text": body, "context": body, "key": key, "question": question, "value": answers[0], "answers": answers}
    doc |= {"orig_question": draw(TEXT), "doc_id": "d"}
    if draw(st.booleans()):
        doc["alt_answers"] = draw(st.lists(FILLED, max_size=2))
    if draw(st.booleans()):
        doc["tok_pos"] = draw(st.integers(0, 60))
    return doc


KEYS = {"swde": ["key", "value"], "fda": ["key", "value"], "squad": ["value"], "drop": [], "triviaqa": []}


@pytest.fixture(scope="module")
def gpt2(shared):
    return AutoTokenizer.from_pretrained(shared / "gpt2")


@settings(max_examples=400, deadline=None)
@given(doc=documents(), task=st.sampled_from(sorted(PUBLISHED)), twice=st.booleans())
def test_prompts_follow_the_literal_rules(doc, task, twice):
    before = copy.deepcopy(doc)
    assert prompt(task, doc, "twice" if twice else "once") == literal_prompt(task, doc, twice)
    assert doc == before


def test_windows_follow_the_literal_rules(gpt2):
    kept = dropped = moved = 0

    @settings(max_examples=600, deadline=None, derandomize=True)
    @given(doc=documents(LONG), task=st.sampled_from(sorted(PUBLISHED)), desired=st.integers(2, 40))
    def compare(doc, task, desired):
        nonlocal kept, dropped, moved
        before = copy.deepcopy(doc)
        found = cut(task, doc, gpt2, desired + 5, 5)
        expected = literal_cut(doc, PUBLISHED[task].context, KEYS.get(task, ["answers"]), gpt2, desired + 5, 5)
        assert doc == before
        assert found == expected
        if found is None:
            dropped += 1
            return
        kept += 1
        moved += not doc[PUBLISHED[task].context].strip().startswith(found[PUBLISHED[task].context] or "\0")
        for twice in (False, True):
            assert prompt(task, found, "twice" if twice else "once") == literal_prompt(task, found, twice)

    compare()
    assert min(kept, dropped, moved) > 20, "the documents do not reach all rules"


@settings(max_examples=200, deadline=None)
@given(prediction=TEXT, labels=st.lists(FILLED, min_size=1, max_size=3))
def test_contains_is_the_published_search(prediction, labels):
    published = max(bool(re.search(re.escape(label), prediction, re.IGNORECASE)) for label in labels)
    assert contains(prediction, labels) == published
