"""Token sources, reading orders, and the command that turns text into token files."""

import gzip
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from train.data.batches import TextData
from train.data.indexed import read_index, write_index
from train.data.order import BLOCK, Mixture, NeoxOrder, Shuffle, Shuffled, Straight
from train.data.sources import DatasetTokens, Joined, StreamedTokens, TokenFile
from train.prepare import load_tokenizer, prepare

ROOT = Path(__file__).resolve().parents[1]


def token_file(folder: Path, tokens: np.ndarray, sizes: np.ndarray | None = None, name: str = "train") -> Path:
    tokens.astype(np.uint16).tofile(folder / f"{name}.bin")
    if sizes is not None:
        write_index(folder / f"{name}.idx", sizes, np.dtype(np.uint16))
    return folder / f"{name}.bin"


DOCUMENTS = [np.arange(start, start + size) for start, size in ((0, 13), (100, 40), (200, 1), (300, 30), (400, 60))]


@pytest.fixture
def sources(tmp_path) -> dict:
    """The same documents, as every kind of source."""
    import datasets

    flat, sizes = np.concatenate(DOCUMENTS), np.array([len(d) for d in DOCUMENTS])
    rows = datasets.Dataset.from_dict({"input_ids": [d.tolist() for d in DOCUMENTS]})
    return {
        "indexed": TokenFile(token_file(tmp_path, flat, sizes), 16),
        "dataset": DatasetTokens(rows, 16),
        "stream": StreamedTokens(rows.to_iterable_dataset(), 16, windows=8),
    }


def test_a_stream_goes_on_where_it_stood(monkeypatch):
    """Its state is JSON; no document before the place is encoded again."""
    import datasets

    rows = datasets.Dataset.from_dict({"input_ids": [d.tolist() for d in DOCUMENTS]})

    def stream():
        return StreamedTokens(rows.to_iterable_dataset(num_shards=2), 16, windows=8)

    whole, first, second = stream(), stream(), stream()
    windows = [whole.read(i).copy() for i in range(8)]
    for i in range(5):
        first.read(i)
    second.go_on(json.loads(json.dumps(first.state())))
    monkeypatch.setattr(second, "_start_again", lambda: pytest.fail("the stream was read from its start"))
    for i in (5, 7):
        assert (second.read(i) == windows[i]).all()
    monkeypatch.undo()
    assert (second.read(2) == windows[2]).all()  # backwards it has to


@pytest.mark.parametrize("kind", ["indexed", "dataset", "stream"])
def test_every_source_gives_the_same_windows_and_documents(sources, kind):
    flat = np.concatenate(DOCUMENTS)
    source = sources[kind]
    assert len(source) == (len(flat) - 1) // 16 == 8
    starts = np.cumsum([0] + [len(d) for d in DOCUMENTS])[:-1]
    for i in (0, 1, 3, 7, 2):  # backwards, too
        window = source.read(i)
        assert window.dtype == np.int64 and (window == flat[i * 16 : i * 16 + 17]).all()
        inside = starts[(starts >= i * 16) & (starts <= i * 16 + 16)] - i * 16
        assert source.document_starts(i).tolist() == inside.tolist()
    with pytest.raises(IndexError):
        source.read(8)


def test_documents_of_a_flat_file_are_found_by_their_end_token(tmp_path):
    tokens = np.array([5, 9, 0, 7, 7, 7, 0, 0, 8, 8, 8, 8, 8])
    source = TokenFile(token_file(tmp_path, tokens), 4, end_token=0)
    assert [source.document_starts(i).tolist() for i in range(len(source))] == [[0, 3], [3, 4], [0]]
    with pytest.raises(ValueError, match="end_token"):
        TokenFile(tmp_path / "train.bin", 4).document_starts(0)


def test_text_of_a_dataset_is_encoded(tmp_path):
    import datasets

    tokenizer = load_tokenizer("mini")
    texts = ["open(name, mode)\n" * 20, "close(file)\n" * 20]
    rows = datasets.Dataset.from_dict({"text": texts})
    expected = np.concatenate(
        [[*tokenizer(t, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for t in texts]
    )
    for source in (
        DatasetTokens(rows, 32, tokenizer),
        StreamedTokens(rows.to_iterable_dataset(), 32, 4, tokenizer),
    ):
        assert (source.read(1) == expected[32:65]).all()
    with pytest.raises(ValueError, match="give a tokenizer"):
        DatasetTokens(rows, 32)
    with pytest.raises(ValueError, match="expected input_ids or 'body'"):
        DatasetTokens(rows, 32, tokenizer, column="body")


def test_joined_files_keep_their_windows(tmp_path):
    one = TokenFile(token_file(tmp_path, np.arange(33), name="a"), 16)
    two = TokenFile(token_file(tmp_path, np.arange(100, 149), name="b"), 16)
    both = Joined([one, two])
    assert len(both) == 5 and [int(both.read(i)[0]) for i in range(5)] == [0, 16, 100, 116, 132]


@pytest.mark.parametrize("count", [1, 2, 3, 17, 1000, 4097])
def test_a_shuffle_gives_everything_once_an_epoch_and_another_order_in_the_next(count):
    first, second = np.split(Shuffle(count, 7)(np.arange(2 * count)), 2)
    assert sorted(first) == sorted(second) == list(range(count))
    if count > 10:
        assert (first != second).any() and (first != Shuffle(count, 8)(np.arange(count))).any()
        assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 3 / np.sqrt(count) + 0.1


def test_a_shuffle_is_a_function_of_the_position():
    shuffle = Shuffle(15_000_000, 3)
    positions = np.array([14_999_999, 0, 12_345, 29_999_999])
    assert shuffle(positions).tolist() == [int(shuffle(np.array([p]))[0]) for p in positions]


def test_a_mixture_keeps_its_shares_and_reads_each_source_in_order(tmp_path):
    files = [TokenFile(token_file(tmp_path, np.full(16 * n + 1, n), name=f"s{n}"), 16) for n in (3, 50)]
    mixture = Mixture([Straight(files[0]), Shuffled(files[1], 0)], [0.25, 0.75], seed=1)
    rows = mixture.rows(np.arange(2 * BLOCK))
    assert (rows[:BLOCK, 0] == 3).sum() == BLOCK // 4
    assert (mixture.rows(np.array([700, 3, 1999])) == rows[[700, 3, 1999]]).all()
    numbered = TokenFile(token_file(tmp_path, np.arange(16 * 400 + 1), name="numbered"), 16)
    alone = Mixture([Straight(numbered), Straight(files[0])], [0.2, 0.8], seed=1).rows(np.arange(BLOCK))
    mine = alone[alone[:, 1] != 3][:, 0]
    assert mine.tolist() == [16 * i for i in range(BLOCK // 5)]
    for weights in ([1.0], [1, -1], [1, 1e-9]):
        with pytest.raises(ValueError, match="weight"):
            Mixture([Straight(files[0]), Straight(files[1])], weights, seed=1)


@pytest.mark.parametrize("weights", [[0.9985, 0.0015], [1, 1, 1], [0.123, 0.456, 0.421]])
def test_the_shares_of_a_mixture_are_exact_in_a_long_run(tmp_path, weights):
    files = [TokenFile(token_file(tmp_path, np.full(33, n), name=f"s{n}"), 16) for n in range(len(weights))]
    rows = Mixture([Straight(file) for file in files], weights, seed=1).rows(np.arange(30 * BLOCK))
    expected = np.array(weights) / sum(weights) * 30 * BLOCK
    np.testing.assert_allclose(np.bincount(rows[:, 0]), expected, atol=0.51)


@pytest.fixture
def neox(shared, tmp_path) -> tuple[TokenFile, dict, dict]:
    golden = load_file(shared / "golden" / "neox_mlm.safetensors")
    told = json.loads((shared / "golden" / "neox_mlm.json").read_text())
    return TokenFile(token_file(tmp_path, golden["docs.flat"], golden["docs.sizes"]), told["L"]), golden, told


def test_the_released_order(neox):
    file, golden, told = neox
    order = NeoxOrder(file, told["num_samples"], told["seed"], sampler_seed=None)
    assert (order.documents == golden["doc_idx"]).all()
    assert (order.samples == golden["sample_idx"]).all()
    assert (order.order == golden["shuffle_idx"]).all()
    assert (order.rows(np.arange(8)) == golden["plain.text"]).all()
    sampled = NeoxOrder(file, told["num_samples"], told["seed"])
    assert sorted(sampled.sampled) == list(range(len(golden["shuffle_idx"])))


def test_the_released_items(neox):
    import torch

    from jrt.training.objective import IGNORED, Objective

    _, golden, told = neox
    windows = torch.from_numpy(golden["plain.text"])
    inputs = torch.from_numpy(golden["mlm.inputs"])
    prefix = torch.full((8,), told["E"])
    targets = Objective("jrt", told["mask_token_id"]).targets(windows, prefix, inputs == told["mask_token_id"])
    assert torch.equal(targets.input_ids, inputs)
    assert torch.equal(targets.labels, torch.from_numpy(golden["mlm.labels"]))
    assert (targets.labels == IGNORED).any()


def test_the_released_order_needs_an_index(tmp_path):
    with pytest.raises(ValueError, match=r"\.idx"):
        NeoxOrder(TokenFile(token_file(tmp_path, np.arange(100)), 16), 5)


@pytest.mark.slow
def test_the_released_order_of_a_billion_tokens(tmp_path):
    """Its arrays are made without a Python loop: with one they would take many minutes."""
    sizes = np.random.default_rng(0).integers(1, 1000, 2_000_000)
    path = tmp_path / "train.bin"
    with path.open("wb") as file:
        file.truncate(2 * int(sizes.sum()))
    write_index(tmp_path / "train.idx", sizes, np.dtype(np.uint16))
    order = NeoxOrder(TokenFile(path, 2048), 480_000)
    assert len(order.order) >= 480_000


def test_damaged_files_are_refused(tmp_path):
    path = token_file(tmp_path, np.arange(100), np.array([60, 40]))
    index = tmp_path / "train.idx"
    whole, tokens = index.read_bytes(), path.read_bytes()
    assert read_index(index).sizes().tolist() == [60, 40]
    for damaged, told in (
        (whole[:-3], "bytes"),
        (whole[:10], "start with"),
        (b"PK" + whole[2:], "start with"),
        (whole[:17] + b"\x77" + whole[18:], "dtype code"),
    ):
        index.write_bytes(damaged)
        with pytest.raises(ValueError, match=told):
            TokenFile(path, 16)
    index.write_bytes(whole)
    path.write_bytes(tokens[:-20])
    with pytest.raises(ValueError, match="cut or foreign"):
        TokenFile(path, 16)
    index.unlink()
    path.write_bytes(tokens[:-1])
    with pytest.raises(ValueError, match="whole number"):
        TokenFile(path, 16)
    path.write_bytes(tokens[:20])
    with pytest.raises(ValueError, match="a window needs 17"):
        TokenFile(path, 16)
    with pytest.raises(ValueError, match=r"prepare\.py"):
        TokenFile(tmp_path / "none.bin", 16)


TEXTS = [
    f"Page {i} says: open the {'red' if i % 3 else 'blue'} door number {i}, and close it.\n" * (1 + i % 5)
    for i in range(700)
]


def text_source(folder: Path, kind: str) -> Path:
    folder.mkdir(exist_ok=True)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    match kind:
        case "folder":
            for i, text in enumerate(TEXTS):
                (folder / f"{i:04d}.txt").write_text(text)
            return folder
        case "jsonl":
            (folder / "a.jsonl").write_text(lines)
        case "jsonl.gz":
            (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
        case "parquet":
            import pyarrow
            import pyarrow.parquet

            pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), folder / "a.parquet")
    return folder / f"a.{kind}"


@pytest.mark.parametrize("kind", ["folder", "jsonl", "jsonl.gz", "parquet"])
def test_every_kind_of_text_gives_the_same_tokens(tmp_path, kind):
    manifest = prepare(str(text_source(tmp_path / "source", kind)), tmp_path / "out", validation=0.01)
    assert manifest["splits"]["train"]["documents"] == 693 and manifest["splits"]["validation"]["documents"] == 7
    tokenizer = load_tokenizer("mini")
    tokens = np.fromfile(tmp_path / "out" / "train.bin", np.uint16)
    parts = tokenizer.decode(tokens).split(tokenizer.eos_token)
    held_out = [0, 100, 200, 300, 400, 500, 600]
    assert parts[:-1] == [text for i, text in enumerate(TEXTS) if i not in held_out]
    again = prepare(str(tmp_path / "out" / "train.bin"), tmp_path / "repacked", validation=0.01)
    assert again["splits"]["train"]["documents"] == 686


def test_the_tokens_do_not_depend_on_the_number_of_workers(tmp_path):
    source = str(text_source(tmp_path / "source", "jsonl"))
    hashes = [prepare(source, tmp_path / f"out{n}", workers=n)["splits"] for n in (1, 2)]
    assert hashes[0] == hashes[1]


def test_preparing_goes_on_where_it_was_killed(tmp_path, monkeypatch):
    source = str(text_source(tmp_path / "source", "jsonl"))
    whole = prepare(source, tmp_path / "whole")["splits"]
    monkeypatch.setattr("train.prepare.BLOCK", 16)
    monkeypatch.setattr("train.prepare.SAVED_EVERY", 2)
    child = os.fork()
    if child == 0:
        from train.prepare import _Writer

        add, count = _Writer.add, 0

        def killed(self, block, validation):
            nonlocal count
            count += 1
            if count == 12:
                self.files["train"].flush()
                os.kill(os.getpid(), signal.SIGKILL)
            add(self, block, validation)

        _Writer.add = killed
        prepare(source, tmp_path / "out")
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert not (tmp_path / "out" / "train.bin").exists()
    note = json.loads((tmp_path / "out" / "progress.json").read_text())
    assert note["documents"] == 160
    with pytest.raises(ValueError, match="validation"):
        prepare(source, tmp_path / "out", validation=0.2)
    assert prepare(source, tmp_path / "out")["splits"] == whole
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(
        ["train.bin", "train.idx", "validation.bin", "validation.idx", "manifest.json", "tokenizer"]
    )


@pytest.mark.parametrize("name", ["progress.json", "manifest.json"])
@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"settings": []}'])
def test_a_record_of_something_else_is_left_alone(tmp_path, name, content):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text(content)
    with pytest.raises(ValueError, match="out was begun with other inputs, tokenizer"):
        prepare(str(text_source(tmp_path / "source", "jsonl")), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]


@pytest.mark.parametrize("split", ["train", "validation"])
def test_finished_files_that_were_cut_or_are_foreign_are_named(tmp_path, split):
    source, out = str(text_source(tmp_path / "source", "jsonl")), tmp_path / "out"
    prepare(source, out)
    os.truncate(out / f"{split}.bin", 10)
    with pytest.raises(ValueError, match=rf"{split}\.bin is missing, or no longer has \d+ bytes"):
        prepare(source, out)
    (out / "manifest.json").unlink()
    other = "validation" if split == "train" else "train"
    (out / f"{other}.bin").unlink()
    with pytest.raises(ValueError, match=rf"holds a {split}\.bin that this command did not make"):
        prepare(source, out)


def test_text_that_cannot_be_read_is_named(tmp_path):
    out = tmp_path / "out"
    for name, content, told in (
        ("rows.jsonl", '{"text": "a"}\nnot json\n', "row 2"),
        ("fields.jsonl", '{"body": "a"}\n', "--column"),
        ("number.jsonl", '{"text": 3}\n', "expected text"),
        ("broken.parquet", "PAR1 no", "no Parquet"),
        ("one.txt", "only one document", "too few"),
    ):
        path = tmp_path / name
        path.write_text(content)
        with pytest.raises(ValueError, match=told):
            prepare(str(path), out / name)
    whole = gzip.compress(b'{"text": "a"}\n{"text": "b"}\n')
    for name, content in (
        ("cut.jsonl.gz", whole[:-6]),
        ("plain.jsonl.gz", b"no gzip"),
        ("latin.jsonl", b'{"text": "caf\xe9"}\n'),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name} is damaged, or not in UTF-8"):
            prepare(str(tmp_path / name), out / name)
    for name, value in (("workers", 0), ("max_documents", -1)):
        with pytest.raises(ValueError, match=f"{name} is {value}: expected at least 1"):
            prepare(str(tmp_path / "one.txt"), out / name, **{name: value})
        assert not (out / name).exists()
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table({"text": ["a", None]}), tmp_path / "null.parquet")
    with pytest.raises(ValueError, match=r"null.parquet, row 2: 'text' is a NoneType; expected text"):
        prepare(str(tmp_path / "null.parquet"), out / "null")
    with pytest.raises(ValueError, match="nothing at"):
        prepare(str(tmp_path / "none"), out / "x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no text"):
        prepare(str(tmp_path / "empty"), out / "x")
    with pytest.raises(ValueError, match="no tokenizer"):
        prepare(str(tmp_path / "rows.jsonl"), out / "x", tokenizer=str(tmp_path / "no-tokenizer"))
    other = tmp_path / "other"
    other.mkdir()
    token_file(other, np.arange(100))
    with pytest.raises(ValueError, match="did not make"):
        prepare(str(tmp_path / "rows.jsonl"), other)


def test_a_damaged_parquet_file_is_named(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    path, table = tmp_path / "a.parquet", pyarrow.table({"text": [f"row {i}" for i in range(5000)]})
    pytest.importorskip("pyarrow.parquet").write_table(table, path, compression="none", use_dictionary=False)
    content = bytearray(path.read_bytes())
    content[3000:5000] = b"\xff" * 2000
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.parquet is damaged after row \d+"):
        prepare(str(path), tmp_path / "out")


def test_files_that_are_no_text_are_left_out_with_a_warning(tmp_path, caplog):
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.txt").write_text(f"page {number}\r\nline\r")
    expected = prepare(str(folder), tmp_path / "one")["splits"]
    (folder / "3.txt").write_bytes(bytes(range(256)))
    (folder / "4.txt").write_text("half of the text", encoding="utf-16")
    assert prepare(str(folder), tmp_path / "two")["splits"] == expected
    assert [name for name in ("3.txt", "4.txt") if f"{name} is left out" in caplog.text] == ["3.txt", "4.txt"]
    assert load_tokenizer("mini").decode(np.fromfile(tmp_path / "two" / "train.bin", np.uint16)).count("\r") == 0


def test_ids_outside_the_tokenizer_are_refused(tmp_path):
    for number, wrong in enumerate((-3, 5000)):
        folder = tmp_path / str(number)
        folder.mkdir()
        np.array([5, wrong, 7], np.int32).tofile(folder / "train.bin")
        write_index(folder / "train.idx", np.array([1, 2]), np.dtype(np.int32))
        with pytest.raises(ValueError, match=f"id {wrong}, outside"):
            prepare(str(folder / "train.bin"), folder / "out")


def test_an_index_without_documents_is_refused_beside_tokens(tmp_path):
    np.arange(100, dtype=np.uint16).tofile(tmp_path / "train.bin")
    write_index(tmp_path / "train.idx", np.zeros(0, np.int64), np.dtype(np.uint16))
    with pytest.raises(ValueError, match="cut or foreign"):
        TokenFile(tmp_path / "train.bin", 16)


def test_half_characters_and_empty_texts(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "held out"}\n{"text": "bad \\ud800 half"}\n{"text": ""}\n{"text": "last"}\n')
    manifest = prepare(str(path), tmp_path / "out")
    assert manifest["splits"]["train"]["documents"] == 2
    assert "bad ? half" in load_tokenizer("mini").decode(np.fromfile(tmp_path / "out" / "train.bin", np.uint16))


def test_the_command_says_one_line(tmp_path):
    command = [sys.executable, str(ROOT / "train" / "prepare.py"), str(tmp_path / "none"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1 and "nothing at" in done.stderr


def test_a_file_that_is_cut_while_it_is_read_is_named(tmp_path):
    """A mapped file would end the process."""
    file = TokenFile(token_file(tmp_path, np.arange(16 * 4000 + 1)), 16)
    assert file.read(3999)[-1] == 16 * 4000
    os.truncate(file.path, 16 * 4000)
    assert file.read(10)[0] == 160
    with pytest.raises(ValueError, match=r"train\.bin has no ids 63984 to 64001: it was cut after it was opened"):
        file.read(3999)


def test_text_data_reads_each_window_once_an_epoch_whatever_the_split(tmp_path):
    token_file(tmp_path, np.arange(16 * 40 + 1))
    token_file(tmp_path, np.arange(16 * 10 + 1), name="validation")
    data = TextData(16, seed=0, folder=str(tmp_path), validation_windows=5, validation_rows=2)
    step = [data.part(2, 8, first, 4)["ids"] for first in (0, 4)]
    assert [*step[0].tolist(), *step[1].tolist()] == data.part(2, 8, 0, 8)["ids"].tolist()
    epoch = np.concatenate([data.part(s, 8, 0, 8)["ids"][:, 0] for s in range(5)])
    assert sorted(epoch) == [16 * i for i in range(40)]
    held_out = [data.validation(i)["ids"][:, 0].tolist() for i in range(data.validation_batches)]
    assert held_out == [[0, 32], [64, 96], [128]]


@pytest.mark.parametrize("part", [{"folder": "a"}, {"folder": "a", "weight": "x"}, {"path": "a", "weight": 1}])
def test_parts_of_a_mixture_have_a_folder_and_a_weight(part):
    with pytest.raises(ValueError, match=r"data\.mixture has .* expected \{folder: A, weight: 0\.7\}"):
        TextData(16, 0, mixture=[part])


def test_text_data_says_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match=r"no train\.bin"):
        TextData(16, seed=0, folder=str(tmp_path))
    token_file(tmp_path, np.arange(100))
    with pytest.raises(ValueError, match="held out"):
        TextData(16, seed=0, folder=str(tmp_path))
    with pytest.raises(ValueError, match="one of the two"):
        TextData(16, seed=0)
    with pytest.raises(ValueError, match="shuffle, neox, straight"):
        TextData(16, seed=0, folder=str(tmp_path), order="random")


def test_a_large_sparse_file_is_read_without_a_pass_over_it(tmp_path):
    """30 billion tokens. With a permutation of all windows in memory for each batch this would not end."""
    path = tmp_path / "train.bin"
    with path.open("wb") as file:
        file.truncate(60_000_000_000)
    token_file(tmp_path, np.arange(3000), name="validation")
    data = TextData(2048, seed=0, folder=str(tmp_path))
    windows = data.part(59_999, 256, 0, 256)["ids"]
    assert windows.shape == (256, 2049)
