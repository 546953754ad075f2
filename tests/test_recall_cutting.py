"""Cutting of documents in jrt_recall: the published windows, and every special case of the rule."""

import copy
import json

import pytest
from jrt_recall import cut, prompt
from jrt_recall.prompts import SWDE_SUMMARY
from jrt_recall.tokenizers import cutting_tokenizer, is_gpt2, model_tokenizer, shipped_tokenizer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoTokenizer, PreTrainedTokenizerFast


@pytest.fixture(scope="module")
def gpt2(shared):
    return AutoTokenizer.from_pretrained(shared / "gpt2")


@pytest.fixture(scope="module")
def words():
    """One token a word, so that positions can be counted by hand; w0 ... w199."""
    vocabulary = {"?": 0} | {f"w{number}": number + 1 for number in range(200)}
    model = Tokenizer(WordLevel(vocabulary, unk_token="?"))
    model.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=model, unk_token="?")


def passage(count: int = 100) -> str:
    return " ".join(f"w{number}" for number in range(count))


def golden_cases(shared) -> list[dict]:
    cases = json.loads((shared / "golden" / "cutting_context.json").read_text(encoding="utf-8"))["cases"]
    first = {}
    for case in cases:
        case["docs"] = first.setdefault(case["task"], case["docs"])
    return cases


def test_windows_equal_the_published_ones(shared, gpt2):
    compared = 0
    for case in golden_cases(shared):
        task, key = case["task"], case["context_key"]
        documents = copy.deepcopy(case["docs"])
        kept = [cut(task, doc, gpt2, case["context_length"], case["answer_length"]) for doc in documents]
        assert documents == case["docs"], "a document was changed"
        kept = [doc for doc in kept if doc is not None]
        assert len(kept) == len(case["result"]) > 0
        for doc, expected in zip(kept, case["result"], strict=True):
            assert prompt(task, doc, "twice" if case["twice"] else "once") == expected["ctx"]
            if task not in ("swde", "fda"):  # the original's prompts rewrote these two after the cut
                assert doc[key] == expected["cut"]
                assert len(gpt2(doc[key])["input_ids"]) == expected["n_cut_tokens"]
            elif task == "swde":
                text = doc[key].split(SWDE_SUMMARY)[0]
                assert text.startswith(expected["cut"])
            compared += 1
    assert compared == 64


def test_window_is_centred_and_not_shifted_at_the_end(words):
    doc = {"text": passage(), "context": "", "question": "", "value": "w50"}
    assert cut("squad", doc, words, 24, 4)["text"].split() == [f"w{n}" for n in range(40, 60)]
    near_end = cut("squad", doc | {"value": "w95"}, words, 24, 4)["text"].split()
    assert near_end == [f"w{n}" for n in range(85, 100)]
    near_start = cut("squad", doc | {"value": "w3 "}, words, 24, 4)["text"].split()
    assert near_start == [f"w{n}" for n in range(20)]


def test_first_hit_in_any_case_and_the_earlier_of_key_and_value(words):
    doc = {"text": passage(), "key": "W70", "value": "w30"}
    assert cut("swde", doc, words, 10, 0)["text"].split()[5] == "w30"
    assert cut("swde", doc | {"value": "w90"}, words, 10, 0)["text"].split()[5] == "w70"
    assert cut("fda", doc | {"key": "(absent)"}, words, 10, 0)["text"].split()[5] == "w30"


def test_answers_are_literal_not_patterns(words):
    doc = {"text": passage(), "context": "", "question": "", "value": "w5."}
    assert cut("squad", doc, words, 10, 0)["text"].split()[-1] == "w99"


def test_no_hit_takes_the_end_unless_an_alternative_stands_there(words):
    doc = {"context": passage(), "question": "q", "orig_question": "q", "answers": ["absent", "w10"]}
    # all but the last character: w99 becomes w9, still 100 words
    assert cut("nq", doc, words, 20, 0)["context"].split() == [f"w{n}" for n in range(90, 100)]
    assert cut("nq", doc | {"alt_answers": ["zz", "w40", "w20"]}, words, 20, 0)["context"].split()[10] == "w40"
    assert cut("nq", doc | {"tok_pos": 30}, words, 20, 0)["context"].split() == [f"w{n}" for n in range(20, 40)]
    short = doc | {"context": passage(15), "tok_pos": 3}
    assert len(cut("nq", short, words, 20, 0)["context"].split()) == 10, "tok_pos counts only beyond the window"


def test_only_the_first_answer_locates(words):
    doc = {"context": passage(), "question": "q", "orig_question": "q", "answers": ["w60", "w10"]}
    assert cut("nq_512", doc, words, 20, 0)["context"].split()[10] == "w60"


@pytest.mark.parametrize("task", ["drop", "triviaqa"])
def test_drop_and_trivia_keep_the_beginning(task, words):
    doc = {"context": f"  {passage()}  ", "question": "q", "orig_question": "q", "answers": ["w90"], "doc_id": "d"}
    assert cut(task, doc, words, 24, 4)["context"].split() == [f"w{n}" for n in range(20)]
    assert cut(task, doc | {"answers": []}, words, 24, 4) is not None


def test_answers_of_one_character_are_dropped(words):
    doc = {"text": passage(), "key": "maker", "value": "7", "context": "", "question": ""}
    assert cut("swde", doc, words, 20, 0) is None
    assert cut("squad", doc | {"value": ""}, words, 20, 0) is None
    assert cut("swde", doc | {"value": "77", "key": "k"}, words, 20, 0) is None
    assert cut("nq", {"context": passage(), "answers": ["a", "w10"]}, words, 20, 0) is None


def test_special_tokens_in_a_document_are_text_that_decoding_leaves_out(gpt2):
    doc = {"text": "one<|endoftext|>two three", "context": "", "question": "", "value": "two"}
    assert cut("squad", doc, gpt2, 50, 0)["text"] == "onetwo three"


@pytest.mark.parametrize(
    ("task", "doc", "window", "room", "said"),
    [
        ("squad", {"value": "ab"}, 20, 0, "'text'"),
        ("swde", {"text": "a", "key": "kk"}, 20, 0, "'value'"),
        ("nq", {"context": "a", "answers": []}, 20, 0, "list of answers is empty"),
        ("nq", {"context": "a", "answers": [3]}, 20, 0, "must be a string, got a number"),
        ("drop", {"context": "a"}, 20, 20, "no context"),
        ("drop", {"context": "a"}, 20, -1, "no context"),
        ("dorp", {"context": "a"}, 20, 0, "unknown task"),
        ("reference_pages_512", {"window": "a"}, 20, 0, "windows already"),
    ],
)
def test_bad_input_is_named(task, doc, window, room, said, words):
    with pytest.raises(ValueError, match=said):
        cut(task, doc, words, window, room)


@pytest.mark.parametrize(
    "field",
    [
        {"alt_answers": [None]},
        {"alt_answers": [3]},
        {"alt_answers": 5},
        {"alt_answers": "w40"},
        {"alt_answers": {"a": 1}},
        {"tok_pos": "3"},
        {"tok_pos": 2.5},
        {"tok_pos": [1]},
        {"tok_pos": -5},
        {"tok_pos": True},
    ],
)
def test_fields_that_only_some_documents_have_make_one_invalid(words, field):
    doc = {"context": passage(60), "question": "q", "answers": ["absent"]}
    with pytest.raises(ValueError, match=next(iter(field))):
        cut("nq", doc | field, words, 20, 0)
    assert cut("nq", doc | {"alt_answers": None, "tok_pos": None}, words, 20, 0) is not None


@pytest.mark.parametrize("content", ["{}", "[1", "5", '{"added_tokens": 1}'])
def test_a_cutting_tokenizer_with_a_broken_file_is_one_line(content, tmp_path):
    shipped_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=str(tmp_path)):
        cutting_tokenizer(str(tmp_path))
    assert model_tokenizer(str(tmp_path)) is None


def test_home_is_expanded_in_a_tokenizer_s_name(shared, monkeypatch):
    monkeypatch.setenv("HOME", str(shared))
    assert is_gpt2(cutting_tokenizer("~/gpt2"))
