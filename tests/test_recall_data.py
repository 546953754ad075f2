"""Mirror folders, generated fixtures and passages of jrt_recall."""

import gzip
import json

import pytest
from jrt_recall import PUBLISHED, data, fixtures, items
from jrt_recall.protocols import PASSAGES


@pytest.fixture
def mirror(tmp_path):
    return fixtures.write(tmp_path / "mirror", count=5, sentences=6)


@pytest.fixture
def offline(monkeypatch):
    """As with HF_HUB_OFFLINE=1, which is read at import."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.delenv(data.FOLDER_VARIABLE, raising=False)
    monkeypatch.delenv(data.PASSAGES_VARIABLE, raising=False)


@pytest.mark.parametrize("task", PUBLISHED)
def test_generated_documents_have_the_exact_columns_and_their_answers(task, mirror):
    loaded = data.load(task, mirror)
    assert loaded.source == "generated fixtures (seed 0)"
    assert len(loaded.rows) == 5 and loaded.sha256 == data.digest(loaded.rows)
    for row in loaded.rows:
        assert set(row) == set(PUBLISHED[task].columns)
        assert row.get("value", (row.get("answers") or [""])[0]) in row[PUBLISHED[task].context]
    assert fixtures.documents(task, 5, sentences=6) == loaded.rows
    assert fixtures.documents(task, 5, seed=1, sentences=6) != loaded.rows


def test_verify_finds_damage_absence_and_strangers(mirror):
    assert all(checked.ok for checked in data.verify(folder=mirror))
    (mirror / "fda.jsonl").write_text('{"text": "a"}\n')
    (mirror / "drop.jsonl").unlink()
    found = {checked.task: checked for checked in data.verify(folder=mirror)}
    assert [task for task, checked in found.items() if not checked.ok] == ["fda", "drop"]
    assert "sha256" in found["fda"].message and "holds no drop.jsonl" in found["drop"].message
    with pytest.raises(ValueError, match="sha256"):
        data.load("fda", mirror)
    with pytest.raises(data.MissingDataset, match="jrt data fetch drop"):
        data.load("drop", mirror)
    (mirror / "manifest.json").unlink()
    assert "not in manifest.json" in data.verify(["squad"], mirror)[0].message


def test_import_checks_columns_and_keeps_every_character(tmp_path):
    rows = [{"text": "a\u2028b\nc", "key": "kk", "value": "é"}]
    brought = tmp_path / "brought.jsonl"
    brought.write_text(json.dumps(rows[0], ensure_ascii=False) + "\n\n", encoding="utf-8")
    data.import_file("swde", brought, tmp_path / "mirror")
    assert data.load("swde", tmp_path / "mirror").rows == rows
    with pytest.raises(ValueError, match=r"lacks the columns context, question.*expected text"):
        data.import_file("squad", brought, tmp_path / "mirror")
    assert not (tmp_path / "mirror" / "squad.jsonl").exists()


def test_import_reads_json_and_parquet(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = fixtures.documents("nq_512", 3, sentences=3)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "a.parquet"))
    for name in ("a.json", "a.parquet"):
        data.import_file("nq_512", tmp_path / name, tmp_path / name.replace(".", "-"))
        assert data.load("nq_512", tmp_path / name.replace(".", "-")).rows == rows
    with pytest.raises(ValueError, match=r"\.jsonl, \.json or \.parquet"):
        (tmp_path / "a.csv").touch()
        data.import_file("nq_512", tmp_path / "a.csv", tmp_path)


def test_fetch_keeps_what_is_there(mirror, offline):
    before = (mirror / "manifest.json").read_bytes()
    assert data.fetch(folder=mirror) == [mirror / f"{task}.jsonl" for task in PUBLISHED]
    assert (mirror / "manifest.json").read_bytes() == before


def test_a_missing_dataset_says_how_to_get_it(offline, tmp_path):
    with pytest.raises(data.MissingDataset, match=r"hazyresearch/based-squad.*jrt data fetch squad.*JRT_DATA"):
        data.load("squad")
    with pytest.raises(data.MissingDataset, match="JRT_PASSAGES"):
        data.load_passages("qa_squad")
    with pytest.raises(data.MissingDataset, match=r"squad\.jsonl is absent"):
        data.load_passages("qa_squad", tmp_path)
    with pytest.raises(ValueError, match="no mirror folder"):
        data.verify()


def test_what_fails_leaves_no_folder(offline, tmp_path):
    with pytest.raises(data.MissingDataset):
        data.fetch(["swde"], tmp_path / "mirror")
    with pytest.raises(ValueError, match="is not a file"):
        data.import_file("swde", tmp_path / "absent.jsonl", tmp_path / "mirror")
    assert not (tmp_path / "mirror").exists()


def test_the_environment_names_the_mirror(monkeypatch, mirror):
    monkeypatch.setenv(data.FOLDER_VARIABLE, str(mirror))
    assert len(data.load("triviaqa").rows) == 5


def test_damaged_lines_are_named(tmp_path):
    (tmp_path / "squad.jsonl").write_text('{"context": "c", "question": "q", "answers": ["a"]}\n{"context"\n')
    with pytest.raises(ValueError, match="line 2: not JSON"):
        data.load_passages("qa_squad", tmp_path)
    (tmp_path / "squad.jsonl").write_text('{"context": "c", "answers": ["a"]}\n')
    with pytest.raises(ValueError, match=r"line 1 .* lacks question"):
        data.load_passages("qa_squad", tmp_path)


@pytest.mark.parametrize("field", ["context", "question", "answers"])
def test_a_line_that_lacks_a_field_is_invalid_and_counted(field, tmp_path):
    whole = {"context": "the valve opens", "question": "what opens?", "answers": ["the valve"]}
    lines = [whole, {name: value for name, value in whole.items() if name != field}, whole]
    (tmp_path / "squad.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = items("qa_squad", "once", data=tmp_path)
    assert [item.id for item in found.items] == ["qa_squad/0", "qa_squad/2"] and found.documents == 3
    assert len(found.invalid) == 1 and f"line 2 lacks {field}" in found.invalid[0]


def test_a_compressed_file_is_called_so(tmp_path):
    (tmp_path / "squad.jsonl").write_bytes(gzip.compress(b'{"context": "c"}'))
    with pytest.raises(ValueError, match=r"squad.jsonl: the file is compressed"):
        data.load_passages("qa_squad", tmp_path)


def test_passages_take_the_published_shapes(shared):
    first = data.load_passages("qa_squad", shared / "qa").rows[0]
    asked = items("qa_squad", "once", data=shared / "qa").items[0]
    assert f"{first['context']}\nQuestion: {first['question']}\nAnswer:" in asked.prompt
    fda = data.load_passages("qa_fda", shared / "qa").rows
    lines = (shared / "qa" / "fda.jsonl").read_text(encoding="utf-8").strip().split("\n")
    assert len(fda) == sum(len(json.loads(line)["attributes"]) for line in lines)
    for task in PASSAGES:
        run = items(task, "twice", data=shared / "qa")
        assert run.protocol.name == "full" and run.lost == run.absent == 0
        assert all(item.position is not None for item in run.items)


@pytest.mark.parametrize(
    "entry", [[], {}, None, {"rows": 1, "columns": 3, "sha256": "x", "source": "t"}, {"sha256": 5}]
)
def test_a_damaged_entry_of_the_manifest_is_one_line(entry, tmp_path):
    (tmp_path / "squad.jsonl").write_text("{}\n")
    (tmp_path / "manifest.json").write_text(json.dumps({"squad": entry}))
    for read in (lambda: data.verify(["squad"], tmp_path), lambda: data.load("squad", tmp_path)):
        with pytest.raises(ValueError, match=r"manifest.json is damaged.*'squad'"):
            read()


def test_a_manifest_in_another_encoding_is_named(tmp_path):
    (tmp_path / "squad.jsonl").write_text("{}\n")
    (tmp_path / "manifest.json").write_bytes("{}".encode("utf-16"))
    with pytest.raises(ValueError, match=r"manifest.json.*UTF-16"):
        data.verify(["squad"], tmp_path)


def test_tasks_without_a_published_dataset_are_refused(mirror):
    for task in ("qa_squad", "reference_pages_512"):
        with pytest.raises(ValueError, match=rf"{task} has no published dataset: choose one of swde"):
            data.fetch([task], mirror)
