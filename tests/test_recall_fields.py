"""Fields of documents: clear values are read, others make one document invalid, and none ends in a traceback."""

import copy
import datetime
import decimal
import json
import re
import unicodedata

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jrt_recall import data, items
from jrt_recall.fields import answers_in
from jrt_recall.harness.hooks import documents
from jrt_recall.harness.settings import as_dict, check, checked, names_of, response_cache, whole_number
from jrt_recall.items import _position
from jrt_recall.protocols import PASSAGES
from jrt_recall.tokenizers import shipped_tokenizer, token_ids
from tokenizers.normalizers import NFC

PASSAGE = {"id": "a", "context": "A small page.\nopen_valve(pressure, angle)", "question": "open_valve("}
CLOZE = {"context": "The valve opens at noon.", "question": "The valve opens at", "orig_question": "When?"}


@pytest.mark.parametrize(
    ("value", "answers"),
    [
        ("pressure", ("pressure",)),
        (["a", "b"], ("a", "b")),
        ({"text": ["a", "b"], "answer_start": [1, 2]}, ("a", "b")),
        ({"text": "a"}, ("a",)),
        ([{"text": "a"}, "b"], ("a", "b")),
        ({"value": "a", "aliases": ["b"]}, ("a", "b")),
        ({"value": "a", "aliases": None}, ("a",)),
        ([{"value": "a", "aliases": ["b"]}, {"text": ["c"]}], ("a", "b", "c")),
        ([" a "], (" a ",)),
    ],
)
def test_answers_are_read_in_all_clear_shapes(value, answers):
    assert answers_in("here", value) == answers


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "null"),
        (12, "a number"),
        (True, "true or false"),
        ([], "empty"),
        ([" "], "blank"),
        (["\u200b"], "blank"),
        ("\ufeff\u2060 ", "blank"),
        ("", "blank"),
        (["a", 3], "a number"),
        ([["a"]], "a list"),
        ({"text": None}, "null"),
        ({"value": "a", "aliases": 0}, "a number"),
        ({"value": "a", "aliases": ""}, "blank"),
        ({"answer_start": [1]}, "an object"),
        (["\ud83d"], "surrogate"),
    ],
)
def test_other_answers_say_why_they_are_not_read(value, said):
    with pytest.raises(ValueError, match=f"here.*{said}"):
        answers_in("here", value)


def passages(folder, rows, name="squad"):
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return items(f"qa_{name}", data=folder)


def test_ids_never_alias(tmp_path):
    ids = ["q1", "q1", None, 2, "2", "q1#1", "q1"]
    found = passages(tmp_path, [PASSAGE | {"id": own, "answers": [f"a{n}"]} for n, own in enumerate(ids)])
    assert len({item.id for item in found.items}) == len(ids)
    assert [item.answers for item in found.items] == [(f"a{n}",) for n in range(len(ids))]
    assert found.items[0].id == "qa_squad/q1" and found.items[2].id == "qa_squad/2"
    again = passages(tmp_path, [PASSAGE | {"id": own, "answers": [f"a{n}"]} for n, own in enumerate(ids[:3])])
    assert [item.id for item in again.items] == [item.id for item in found.items[:3]]  # whatever follows


def test_ids_of_a_mirror_never_alias(tmp_path):
    data.store(
        "drop", [CLOZE | {"id": None, "answers": ["noon"]}, CLOZE | {"id": None, "answers": ["zebra"]}], "t", tmp_path
    )
    assert [item.id for item in items("drop", protocol="full", data=tmp_path).items] == ["drop/0", "drop/1"]


def test_fields_that_are_no_text_make_a_document_invalid_and_are_counted(tmp_path):
    good = PASSAGE | {"answers": ["pressure"]}
    bad = [good | {"context": None}, good | {"question": 3}, good | {"answers": None}, good | {"context": "a\ud83d"}]
    found = passages(tmp_path, [*bad, good])
    assert len(found.items) == 1 and len(found.invalid) == 4
    for said in ("'context' must be a string, got null", "'question' must be a string", "'answers'", "surrogate"):
        assert any(said in reason for reason in found.invalid)
    pages = [
        {"doc_id": 1, "text": "made by Ann", "attributes": a} for a in ({"maker": "Ann"}, None, ["x"], {"maker": 7})
    ]
    found = passages(tmp_path, pages, "fda")
    assert [item.answers for item in found.items] == [("Ann",)] and len(found.invalid) == 3


def test_any_answer_counts_and_the_window_lies_around_the_first_that_stands(tmp_path, monkeypatch):
    words = [f"w{n}" for n in range(400)]
    row = PASSAGE | {"context": " ".join(words), "question": "which?", "answers": ["nowhere", "w300", "w20"]}
    (tmp_path / "squad.jsonl").write_text(json.dumps(row) + "\n")
    found = items("qa_squad", protocol="w2000-a50", tokenizer="shipped", data=tmp_path)
    assert found.protocol.version == 2 and found.items[0].answers == ("nowhere", "w300", "w20")
    narrow = items("qa_squad", protocol="jrt-table2-512", tokenizer="shipped", data=tmp_path).items[0]
    assert "w300" in narrow.doc["text"] and "w20 " not in narrow.doc["text"] and not narrow.lost


def test_text_of_a_special_token_stays_in_a_window(tmp_path):
    row = PASSAGE | {"context": "before <|endoftext|> after", "answers": ["<|endoftext|>"]}
    (tmp_path / "squad.jsonl").write_text(json.dumps(row) + "\n")
    (item,) = items("qa_squad", protocol="w40-a2", tokenizer="shipped", data=tmp_path).items
    assert "before <|endoftext|> after" in item.prompt and not item.lost


def test_answers_with_a_line_feed_are_counted_as_unreachable(tmp_path):
    rows = [PASSAGE | {"answers": answers} for answers in (["open_valve\n("], ["a\nb", "angle"], ["angle"])]
    assert passages(tmp_path, rows).unreachable == 1


def test_spellings_that_the_models_tokenizer_normalises_are_unreachable_in_lm_eval_too(tmp_path):
    tokenizer = copy.deepcopy(shipped_tokenizer())
    tokenizer._tokenizer.normalizer = NFC()
    tokenizer.save_pretrained(tmp_path / "model")
    answers = [unicodedata.normalize("NFD", "café"), "café", "two\nlines"]
    passages(tmp_path, [PASSAGE | {"answers": [answer]} for answer in answers])
    model = {"pretrained": str(tmp_path / "model")}
    for arguments, counted in ((model, [1, 0, 1]), ({"pretrained": "no/model"}, [0, 0, 1])):
        rows = documents("qa_squad", "once", data=str(tmp_path), **arguments)["test"]
        assert rows["unreachable"] == counted


def test_a_window_of_a_passage_keeps_its_question(tmp_path):
    row = PASSAGE | {"context": " ".join(f"w{n}" for n in range(400)), "question": "which one?", "answers": ["w20"]}
    (tmp_path / "squad.jsonl").write_text(json.dumps(row) + "\n")
    for strategy, times in (("once", 1), ("twice", 2)):
        asked = items("qa_squad", strategy, protocol="w200-a50", tokenizer="shipped", data=tmp_path)
        (item,) = asked.items
        assert item.prompt.endswith("\nQuestion: which one?\nAnswer:") and not item.lost
        assert item.prompt.count("w20 ") == times and "w399" not in item.prompt
        assert len(token_ids(shipped_tokenizer(), item.doc["text"])) <= 150
    with pytest.raises(ValueError, match="leaves no context beside the question"):
        items("qa_squad", protocol="w60-a50", tokenizer="shipped", data=tmp_path)


def test_answers_are_located_in_the_passage_and_not_in_the_question(tmp_path):
    words = " ".join(f"w{n}" for n in range(400))
    row = PASSAGE | {"context": words, "question": "zebra or w20?", "answers": ["zebra", "w20"]}
    (tmp_path / "squad.jsonl").write_text(json.dumps(row) + "\n")
    (item,) = items("qa_squad", protocol="w100-a10", tokenizer="shipped", data=tmp_path).items
    assert "w20 " in item.doc["context"] and not item.lost
    for answer in ("zebra", "Answer", "question:"):
        found = passages(tmp_path, [row | {"answers": [answer]}])
        assert found.items[0].position is None and found.absent == 1


def test_a_passage_may_say_question(tmp_path):
    row = PASSAGE | {"context": "Question: when? Reply: at noon.", "answers": ["noon"]}
    (tmp_path / "squad.jsonl").write_text(json.dumps(row) + "\n")
    assert items("qa_squad", "twice", data=tmp_path).items[0].prompt.count("Reply: at noon.") == 2


def test_examples_are_of_another_passage(tmp_path):
    rows = [PASSAGE | {"question": f"which {n}?", "answers": ["angle"]} for n in range(3)]
    (tmp_path / "squad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="other documents"):
        items("qa_squad", "1shot", data=tmp_path)


def test_a_blank_question_is_invalid_and_a_column_named_problem_is_not(tmp_path):
    good = PASSAGE | {"answers": ["angle"], "problem": "two trains"}
    found = passages(tmp_path, [good, good | {"question": " \n"}])
    assert len(found.items) == 1 and "'question' is empty" in found.invalid[0]


def test_position_is_where_the_metric_finds_the_answer():
    text = "İ" * 10 + " Straße ends"  # lower() makes the first letters longer
    assert _position(("ENDS",), text) == text.index("ends") / len(text)
    assert _position(("strasse",), text) is None and not re.search("strasse", text, re.IGNORECASE)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (json.dumps(PASSAGE).encode("utf-16"), r"squad.jsonl, line 1: .*UTF-16"),
        (json.dumps(PASSAGE).encode("utf-16-le"), r"squad.jsonl, line 1: .*UTF-16.*save it as UTF-8"),
        (json.dumps(PASSAGE).encode("utf-32"), r"squad.jsonl, line 1: .*UTF-32"),
        (b'{"id": 1}\n{"id": "\xe9"}\n', r"squad.jsonl, line 2: not UTF-8 \(byte 0xe9\)"),
        (b"[" * 100_000, r"squad.jsonl, line 1: JSON that cannot be read"),
        (b'{"id": ' + b"9" * 5000 + b"}", r"squad.jsonl, line 1: JSON that cannot be read"),
    ],
)
def test_broken_files_are_one_line_with_file_and_row(tmp_path, content, said):
    (tmp_path / "squad.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=said):
        items("qa_squad", data=tmp_path)


def test_a_byte_order_mark_is_read(tmp_path):
    (tmp_path / "squad.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(PASSAGE | {"answers": "x"}).encode())
    assert len(items("qa_squad", data=tmp_path).items) == 1


@pytest.mark.parametrize("value", [datetime.datetime(2024, 1, 2), decimal.Decimal("1.5"), b"x", {"a": [b"x"]}])
def test_parquet_columns_that_json_cannot_hold_are_left_out(tmp_path, value):
    file = tmp_path / "in.parquet"
    rows = [CLOZE | {"answers": ["noon"], "more": value, "kept": {"a": [1]}}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    data.import_file("drop", file, tmp_path / "mirror")
    (row,) = data.load("drop", tmp_path / "mirror").rows
    assert row == CLOZE | {"answers": ["noon"], "kept": {"a": [1]}}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([CLOZE | {"answers": [b"noon"]}]), file)
    with pytest.raises(ValueError, match=r"no text in answers \(list\)"):
        data.import_file("drop", file, tmp_path / "mirror")


@pytest.mark.parametrize(
    "column",
    [
        pyarrow.array([570_000_000_000_000, None], pyarrow.timestamp("ms")),  # in the year 20,032
        pyarrow.array([[570_000_000_000_000], []], pyarrow.list_(pyarrow.timestamp("ms"))),
        pyarrow.array([2**60, 1], pyarrow.date64()),
        pyarrow.array([2**62, 1], pyarrow.duration("s")),
        pyarrow.array([1, 2], pyarrow.timestamp("us", tz="Mars/Phobos")),
        pyarrow.array([b"ok", b"\xff"]).view(pyarrow.string()),
    ],
    ids=lambda column: str(column.type),
)
def test_parquet_values_that_python_cannot_hold_spoil_their_column_only(column, tmp_path):
    file, rows = tmp_path / "in.parquet", [CLOZE | {"answers": ["noon"]}] * 2
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table.append_column("more", column), file)
    data.import_file("drop", file, tmp_path / "mirror")
    assert list(data.load("drop", tmp_path / "mirror").rows) == rows
    pyarrow.parquet.write_table(table.set_column(0, "context", column), file)
    with pytest.raises(ValueError, match=r"in.parquet, column 'context', row \d: cannot be read"):
        data.import_file("drop", file, tmp_path / "mirror")


def test_a_file_that_is_no_parquet_is_one_line(tmp_path):
    (tmp_path / "in.parquet").write_bytes(b"no table")
    with pytest.raises(ValueError, match="cannot be read as Parquet"):
        data.import_file("drop", tmp_path / "in.parquet", tmp_path / "mirror")


def test_a_lone_surrogate_goes_through_a_mirror_and_makes_one_document_invalid(tmp_path):
    file = tmp_path / "in.jsonl"
    rows = [CLOZE | {"answers": ["noon"]}, CLOZE | {"answers": ["noon"], "context": "cut \ud83d"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data.import_file("drop", file, tmp_path / "mirror")
    found = items("drop", protocol="full", data=tmp_path / "mirror")
    assert len(found.items) == 1 and "surrogate" in found.invalid[0]


def test_each_model_has_its_own_cache_of_responses():
    args = [{"pretrained": "a"}, "pretrained=b", "pretrained=b,dtype=bfloat16", None]
    found = [
        response_cache({"use_cache": "c", "model": name, "model_args": one}) for name in ("jrt", "hf") for one in args
    ]
    assert len(set(found)) == 8 and all(name.startswith("c-") for name in found)
    assert response_cache({"use_cache": "c", "model": "jrt", "model_args": "pretrained=a"}) == found[0]
    assert response_cache({"model": "jrt", "model_args": "pretrained=a"}) is None


@pytest.mark.parametrize("size", ["auto:x", "auto:-1", "auto:", "autos", "AUTO"])
def test_a_batch_size_is_a_number_or_auto(size):
    with pytest.raises(ValueError, match="--batch_size"):
        checked({"batch_size": size})
    assert checked({"batch_size": "auto:4"}) == {"batch_size": "auto:4"}


@pytest.mark.parametrize("tasks", [[None], [["recall_fda"]], ["recall_fda", 5], {"a": 1}])
def test_names_of_tasks_are_text(tasks):
    with pytest.raises(ValueError, match="--tasks: expected names"):
        names_of(tasks)


def test_a_model_without_room_for_an_answer_is_refused(tmp_path):
    (tmp_path / "squad.jsonl").write_text(json.dumps(PASSAGE | {"answers": "angle"}) + "\n")
    for length in (40, "48"):
        with pytest.raises(ValueError, match="leaves no prompt beside the 48"):
            documents("qa_squad", "once", data=str(tmp_path), max_length=length)


# Whatever a user may have: no error but ValueError.

TEXT = st.text(st.characters(codec=None, categories=("L", "N", "P", "Z", "Cs", "Cc")), max_size=30)
SCALAR = st.none() | st.booleans() | st.integers() | st.floats() | TEXT
VALUE = st.recursive(
    SCALAR, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=6
)
ANSWERS = (
    VALUE
    | st.lists(TEXT, max_size=3)
    | st.fixed_dictionaries({"text": VALUE})
    | st.fixed_dictionaries({"aliases": VALUE})
)
ROWS = {
    "qa_squad": st.fixed_dictionaries(
        {"context": VALUE, "question": VALUE, "answers": ANSWERS}, optional={"id": VALUE, "problem": TEXT}
    ),
    "qa_fda": st.fixed_dictionaries({"text": VALUE, "attributes": VALUE}, optional={"doc_id": VALUE}),
}
QUIET = {"deadline": None, "suppress_health_check": list(HealthCheck)}


def documents_never_end_in_a_traceback(folder):
    @given(st.sampled_from(sorted(PASSAGES)), st.data(), st.sampled_from(["once", "twice", "3x"]))
    def run(task, draw, strategy):
        rows = draw.draw(st.lists(ROWS["qa_fda" if task == "qa_fda" else "qa_squad"], max_size=4))
        (folder / f"{task.removeprefix('qa_')}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        try:
            found = items(task, strategy, data=folder)
        except ValueError as error:
            assert str(error)
        else:
            assert len({item.id for item in found.items}) == len(found.items) > 0
            assert len(found.items) + found.dropped + len(found.invalid) == found.documents
            json.dumps([item.prompt for item in found.items]).encode("utf-8")

    return run


def files_never_end_in_a_traceback(folder):
    @given(
        st.binary(max_size=60) | TEXT.map(lambda text: text.encode("utf-8", "surrogatepass")),
        st.sampled_from(["jsonl", "json"]),
    )
    def run(content, kind):
        file = folder / f"in.{kind}"
        file.write_bytes(content)
        try:
            data.import_file("drop", file, folder / "mirror")
        except ValueError as error:
            assert str(error)

    return run


def options_never_end_in_a_traceback(_):
    @given(
        st.dictionaries(
            st.sampled_from(["tasks", "metadata", "model_args", "gen_kwargs", "num_fewshot", "limit", "samples"])
            | st.sampled_from(["batch_size", "max_batch_size", "device", "wandb_args", "log_samples"])
            | TEXT,
            VALUE,
        )
    )
    def run(options):
        try:
            check(checked(options))
            as_dict("model_args", options.get("model_args"))
            whole_number("n", options.get("n"))
            names_of(options.get("tasks"))
        except ValueError as error:
            assert str(error)

    return run


KINDS = [
    (documents_never_end_in_a_traceback, 12_000, 300),
    (files_never_end_in_a_traceback, 4_000, 100),
    (options_never_end_in_a_traceback, 4_000, 100),
]


@pytest.mark.parametrize(("kind", "examples"), [(kind, few) for kind, _, few in KINDS])
def test_generated_inputs(kind, examples, tmp_path):
    settings(max_examples=examples, **QUIET)(kind(tmp_path))()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "examples"), [(kind, many) for kind, many, _ in KINDS])
def test_many_generated_inputs(kind, examples, tmp_path):
    settings(max_examples=examples, **QUIET)(kind(tmp_path))()
