"""Documents of every kind of source: which files are read, which documents there are, and what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from jrt_recall.tokenizers import shipped_tokenizer

pytest.importorskip("datasets")

from jrt.system.locks import only_writer
from train.data.documents import find_documents
from train.data.files import sampled_sha256
from train.data.indexed import HEADER, MAGIC, read_index, write_index
from train.data.library import LibraryText, make_library_text
from train.data.vocabulary import load_tokenizer, vocabulary_size
from train.prepare import prepare

TEXTS = [f"Page {i} über № {i}: a door\n" for i in range(30)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)


def texts_of(source: Path, **settings) -> list[str]:
    return list(find_documents(str(source), **settings).start(0))


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.ndjson", "a.jsonl.zst", "a.ndjson.gz"])
def test_rows_of_json_by_any_of_their_names(tmp_path, name):
    import pyarrow

    kind = {"zst": "zstd", "gz": "gzip"}.get(name.rsplit(".", 1)[1])
    with pyarrow.output_stream(str(tmp_path / name), compression=kind) as file:
        file.write(LINES.encode())
    assert texts_of(tmp_path / name) == texts_of(tmp_path) == TEXTS


def test_a_cut_compressed_file_is_named(tmp_path):
    import pyarrow

    with pyarrow.output_stream(str(tmp_path / "a.jsonl.zst"), compression="zstd") as file:
        file.write(LINES.encode())
    (tmp_path / "a.jsonl.zst").write_bytes((tmp_path / "a.jsonl.zst").read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"a\.jsonl\.zst (cannot be read|is damaged)"):
        texts_of(tmp_path)


@pytest.mark.parametrize("row", ['{"text": "x", "n": ' + "9" * 5000 + "}", '{"text": "x", "n": ' + "[" * 100_000])
def test_a_row_that_json_cannot_hold_is_named(tmp_path, row):
    (tmp_path / "a.jsonl").write_text(LINES + row + "\n")
    with pytest.raises(ValueError, match=rf"a\.jsonl, row {len(TEXTS) + 1}: expected a JSON object"):
        texts_of(tmp_path)


def test_a_parquet_row_that_is_not_utf8_is_named(tmp_path):
    import pyarrow
    import pyarrow.parquet

    column = pyarrow.array([b"good", b"caf\xe9"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet, row 2: 'text' is not in UTF-8"):
        texts_of(tmp_path)


def test_the_end_of_a_document_stands_at_its_end_only():
    """A Unigram vocabulary takes the text "</s>" for its entry of that name."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from train.data.sources import encode_documents

    vocabulary = Tokenizer(models.Unigram([("<unk>", 0.0), ("</s>", -1.0), ("a", -2.0), ("b", -2.0)], unk_id=0))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=vocabulary, eos_token="</s>", unk_token="<unk>")
    assert encode_documents(["a</s>b", "b", ""], tokenizer) == [[2, 3, 1], [3, 1], [1]]


def test_token_files_without_documents_are_named(tmp_path):
    write_index(tmp_path / "a.idx", np.zeros(0, np.int64), np.dtype(np.uint16))
    (tmp_path / "a.bin").touch()
    with pytest.raises(ValueError, match=r"a\.bin holds no documents"):
        find_documents(str(tmp_path / "a.bin"))


@pytest.mark.parametrize("kind", ["large_string", "string_view", "dictionary"])
def test_text_of_parquet_in_any_of_its_types(tmp_path, kind):
    import pyarrow
    import pyarrow.parquet

    column = pyarrow.array(TEXTS)
    column = column.dictionary_encode() if kind == "dictionary" else column.cast(getattr(pyarrow, kind)())
    table = pyarrow.table({"id": range(30), "a.text": column})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    assert texts_of(tmp_path / "a.parquet", column="a.text") == TEXTS


def test_a_folder_with_both_kinds_says_what_it_leaves_out(tmp_path, caplog):
    """The packages of a Python environment hold a few Parquet files beside their text."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.jsonl").write_text(LINES)
    for name in ("one.txt", "TWO.TXT", "three.py"):
        (tmp_path / name).write_text(name)
    assert texts_of(tmp_path) == TEXTS
    assert "its 2 text files are left out" in caplog.text
    assert texts_of(tmp_path, suffixes=(".txt", "py")) == ["TWO.TXT", "one.txt", "three.py"]  # in order of their names
    assert texts_of(tmp_path, suffixes=("jsonl",)) == TEXTS


@pytest.mark.parametrize("name", ["a.csv", "a.json", "a.txt"])
def test_a_file_that_is_one_document_is_refused(tmp_path, name):
    (tmp_path / name).write_text(LINES)
    with pytest.raises(
        ValueError, match="is one document, too few for training and validation text: expected a folder"
    ):
        prepare(str(tmp_path / name), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_text_in_another_encoding_is_told(tmp_path, caplog):
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "utf8.txt").write_text("café \N{REPLACEMENT CHARACTER}", encoding="utf-8")
    assert texts_of(tmp_path) == ["caf\N{REPLACEMENT CHARACTER}", "café \N{REPLACEMENT CHARACTER}"]
    assert "latin.txt is not all UTF-8: 1 characters" in caplog.text and "utf8.txt" not in caplog.text


def test_a_dataset_that_was_saved_is_read(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    train = datasets.Dataset.from_dict({"text": TEXTS})
    datasets.DatasetDict(train=train, validation=train.select(range(4))).save_to_disk(str(tmp_path / "saved"))
    assert texts_of(tmp_path / "saved") == TEXTS
    assert texts_of(tmp_path / "saved", split="validation") == TEXTS[:4]


def test_a_single_dataset_that_was_saved_is_read_and_a_change_is_noticed(tmp_path):
    """`datasets` saves a dataset without splits in another layout."""
    import datasets

    for texts in (TEXTS, [text.swapcase() for text in TEXTS]):
        shutil.rmtree(tmp_path / "saved", ignore_errors=True)
        datasets.Dataset.from_dict({"text": texts}).save_to_disk(str(tmp_path / "saved"))
        assert texts_of(tmp_path / "saved") == texts
        assert list(find_documents(str(tmp_path / "saved")).start(7)) == texts[7:]
        if texts == TEXTS:
            prepare(str(tmp_path / "saved"), tmp_path / "out", validation=0.1)
    with pytest.raises(ValueError, match="begun with other inputs"):
        prepare(str(tmp_path / "saved"), tmp_path / "out", validation=0.1)
    for settings, told in (
        ({"split": "validation"}, "has no splits: leave out --split"),
        ({"column": "body"}, "expected 'body'"),
    ):
        with pytest.raises(ValueError, match=told):
            texts_of(tmp_path / "saved", **settings)
    datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": TEXTS})).save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(ValueError, match=r"has splits train: expected one of them for --split, not 'validation'"):
        texts_of(tmp_path / "splits", split="validation")
    for damaged in (tmp_path / "splits" / "train").glob("*.arrow"):
        damaged.write_bytes(b"no table")
    with pytest.raises(ValueError, match="cannot be read as a dataset"):
        texts_of(tmp_path / "splits")


def test_settings_that_the_source_has_no_use_for_are_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text(LINES)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "one.txt").write_text("one")
    for source, settings, told in (
        ("text", {"split": "validation"}, "--split chooses a part of a dataset"),
        ("rows.jsonl", {"split": "validation"}, "--split chooses a part of a dataset"),
        ("rows.jsonl", {"suffixes": ("txt",)}, "--suffixes chooses files of a folder"),
        ("text", {"column": "body"}, "--column names a field of JSONL"),
    ):
        with pytest.raises(ValueError, match=told):
            find_documents(str(tmp_path / source), **settings)


def test_the_first_document_that_is_not_empty_is_held_out(tmp_path):
    for number in range(12):
        (tmp_path / f"{number:02}.txt").write_text("" if number < 3 else f"page {number}")
    splits = prepare(str(tmp_path), tmp_path / "out", validation=0.005)["splits"]
    assert (splits["validation"]["documents"], splits["train"]["documents"]) == (1, 8)
    ids = np.fromfile(tmp_path / "out" / "validation.bin", np.uint16)
    assert load_tokenizer("mini").decode(ids[:-1]) == "page 3"


def test_a_source_that_was_changed_is_noticed(tmp_path):
    """The file has the same name and size as before."""
    (tmp_path / "a.jsonl").write_text(LINES)
    prepare(str(tmp_path / "a.jsonl"), tmp_path / "out", validation=0.1)
    (tmp_path / "a.jsonl").write_text(LINES.replace("Page 7", "Sage 7"))
    with pytest.raises(ValueError, match="begun with other inputs"):
        prepare(str(tmp_path / "a.jsonl"), tmp_path / "out", validation=0.1)


def test_a_hash_of_samples_reads_both_ends_of_a_large_file(tmp_path):
    path = tmp_path / "large.bin"
    path.write_bytes(bytes(3_000_000))
    before = {sampled_sha256(path)}
    for place in (0, 2_999_999):
        content = bytearray(3_000_000)
        content[place] = 1
        path.write_bytes(content)
        before.add(sampled_sha256(path))
    path.write_bytes(bytes(3_000_001))
    assert len(before | {sampled_sha256(path)}) == 4


def index(path: Path, sizes: list[int], firsts: list[int]) -> Path:
    tokens = np.asarray(sizes, np.int32)
    offsets = (np.cumsum(tokens, dtype=np.int64) - tokens) * 2
    head = HEADER.pack(MAGIC, 1, 8, len(sizes), len(firsts))
    path.write_bytes(head + tokens.tobytes() + offsets.tobytes() + np.asarray(firsts, np.int64).tobytes())
    return path


@pytest.mark.parametrize(
    ("firsts", "ends"),
    [
        ([], [5, 11, 18]),
        ([0, 1, 2, 3], [5, 11, 18]),
        ([0, 2, 3], [11, 18]),
        ([0, 0, 2, 3], [0, 11, 18]),
        ([0, 1, 3, 3], [5, 18, 18]),
        ([0, 1, 1, 1, 3], [5, 5, 5, 18]),
    ],
)
def test_documents_of_several_sequences_or_none(tmp_path, firsts, ends):
    assert read_index(index(tmp_path / "a.idx", [5, 6, 7], firsts)).ends.tolist() == ends


@pytest.mark.parametrize("firsts", [[1, 2, 3], [0, 2, 1, 3], [0, 1, 2], [0, -1, 3], [0, 4, 3]])
def test_boundaries_that_contradict_themselves_are_refused(tmp_path, firsts):
    with pytest.raises(ValueError, match="contradicts itself"):
        read_index(index(tmp_path / "a.idx", [5, 6, 7], firsts))


def test_ids_of_a_vocabulary_with_gaps_are_kept(tmp_path):
    """Three entries, but ids up to 70,000: they do not fit into 16 bits."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"a": 0, "<eos>": 1, "b": 70_000, "<unk>": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", unk_token="<unk>")
    tokenizer.save_pretrained(tmp_path / "words")
    assert vocabulary_size(tokenizer) == 70_001 and vocabulary_size(shipped_tokenizer()) == 4096
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b a b"}\n')
    manifest = prepare(str(tmp_path / "a.jsonl"), tmp_path / "out", tokenizer=str(tmp_path / "words"))
    assert manifest["tokenizer"]["vocabulary"] == 70_001
    assert np.fromfile(tmp_path / "out" / "train.bin", manifest["dtype"]).tolist() == [70_000, 0, 70_000, 1]


def test_a_folder_is_a_folder_whatever_its_name(tmp_path, monkeypatch):
    (tmp_path / "data.bin").mkdir()
    (tmp_path / "data.bin" / "a.txt").write_text("a door\n")
    assert texts_of(tmp_path / "data.bin") == ["a door\n"]
    monkeypatch.chdir(tmp_path / "data.bin")
    assert texts_of(Path()) == ["a door\n"]


def test_a_dataset_without_a_name_is_refused():
    with pytest.raises(ValueError, match="hub: names no dataset: expected hub:NAME"):
        find_documents("hub:")


def test_a_folder_is_written_by_one_process_at_a_time(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text(LINES)
    (tmp_path / "out").mkdir()
    monkeypatch.setattr("train.prepare.PATIENCE", 0.2)
    with only_writer(tmp_path / "out", 0), pytest.raises(ValueError, match="another process is writing to"):
        prepare(str(tmp_path / "a.jsonl"), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
    prepare(str(tmp_path / "a.jsonl"), tmp_path / "out")


def test_a_library_text_that_was_stopped_is_finished(tmp_path, monkeypatch):
    monkeypatch.setattr("train.prepare._Writer.finish", lambda *arguments: None)
    make_library_text(tmp_path)
    assert (tmp_path / "progress.json").is_file()
    monkeypatch.undo()
    (tmp_path / "train.bin.partial").rename(tmp_path / "train.bin")  # between the renames of its end
    assert LibraryText(str(tmp_path), 128, 1, 4, 4, 0).windows
