"""Tables, figures and web pages: the paper's values are shown only where they apply, and model output is escaped."""

import csv
import re
from html.parser import HTMLParser

import pytest
from jrt_recall import PROTOCOLS

from jrt.evaluate.perplexity import slices
from jrt.evaluate.report import plots
from jrt.evaluate.report.collected import FILES, collect, latex, together
from jrt.evaluate.report.html import marked, page, split_question
from jrt.evaluate.tables.layouts import layout_rows
from jrt.evaluate.tables.published import SUPER_GLUE_SIZES, published_row, published_tables
from jrt.evaluate.tables.results import aligned, size
from jrt.evaluate.tables.super_glue import super_glue_rows
from jrt.system.files import json_lines, write_json, write_text

TABLES = published_tables()
NASTY = "<script>alert('x')</script> & <b>"


def write_run(
    folder,
    models: dict[str, dict],
    source="hazyresearch/based-fda (validation)",
    tasks=("fda",),
    strategies=("once", "twice"),
):
    """A finished run's files with made-up predictions: every second answer is right."""
    records, predictions = [], []
    for model in models:
        for task in tasks:
            for strategy in strategies:
                cell = {"model": model, "task": task, "strategy": strategy, "protocol": "jrt-table1"}
                rows = [
                    {
                        **cell,
                        "id": f"{task}/{number}",
                        "prompt": f"{NASTY} the applicant was Acme.\nWho",
                        "answers": ["Acme"],
                        "prediction": "Acme" if number % 2 else NASTY,
                        "score": number % 2,
                        "position": number / 10,
                        "prompt_tokens": 10,
                    }
                    for number in range(10)
                ]
                predictions += rows
                counts = dict.fromkeys(("documents", "dropped", "invalid", "lost", "absent", "truncated", "nan"), 0)
                numbers = {
                    "score": 0.5,
                    "low": 0.2,
                    "high": 0.8,
                    "n": 10,
                    "prompt_tokens": 10.0,
                    "seconds": 1.0,
                    "state_bytes": 2048,
                }
                records.append({**cell, **numbers, **counts, "beyond_training": False, "source": source})
    folder.mkdir(parents=True)
    write_json(folder / "results.json", records)
    write_text(folder / "predictions.jsonl", json_lines(predictions))
    described = [
        {"name": name, "dtype": "float32", "compat": None, "short_prompt": None, **options}
        for name, options in models.items()
    ]
    write_json(
        folder / "manifest.json", {"identity": {"models": described, "protocols": [PROTOCOLS["jrt-table1"].as_dict()]}}
    )
    return folder


def rows_of(name: str) -> dict[str, tuple[float, ...]]:
    return {model: values for (model, _), values in TABLES[name].rows.items()}


def test_the_published_tables_are_whole():
    assert list(TABLES) == ["table1", "table2", "table3", "table4", "table13", "table14", "table8", "table9", "table10"]
    assert [len(table.rows) for table in TABLES.values()] == [16, 12, 8, 6, 3, 4, 12, 8, 1]
    for table in TABLES.values():
        assert all(len(row) == len(table.columns) for row in table.rows.values())
    gains = [sum(row[1::2]) / 6 - sum(row[::2]) / 6 for row in rows_of("table1").values()]
    assert sum(gains) / len(gains) == pytest.approx(11.04, abs=0.01)  # the paper's headline: 11.0
    assert sum(rows_of("table2")["jrt-360m-30b"]) / 9 == pytest.approx(42.9, abs=0.05)
    # Table 13's modes are all wrong answers, so each block of three and Table 1's accuracy make 100.
    for model, row in rows_of("table13").items():
        for place, column in enumerate((0, 1, 2, 3, 6, 7)):
            accuracy = rows_of("table1")[model][column]
            assert sum(row[3 * place : 3 * place + 3]) + accuracy == pytest.approx(100, abs=8)


def test_published_rows_are_found_by_id_and_rule():
    table1, table4 = TABLES["table1"], TABLES["table4"]
    assert published_row(table1, "hazyresearch/based-1b-50b") == rows_of("table1")["based-1b-50b"]
    assert published_row(table1, "state-spaces/mamba-1.4b-hf") == rows_of("table1")["mamba-1.4b"]
    assert published_row(table4, "hazyresearch/JRT-360M-30B [repeat, released]") == (82.0, 43.3, 32.9)
    assert published_row(table1, "mini-based") is None


def rows_from(folder, name: str):
    return layout_rows(TABLES[name], together([folder]))[0]


def test_published_values_stand_beside_measured_ones_of_the_same_model(tmp_path):
    write_run(tmp_path / "a", {"hazyresearch/based-1b-50b": {}, "mini-based": {}})
    header, rows = rows_from(tmp_path / "a", "table1")
    assert header == ("", "hazyresearch/based-1b-50b", "mini-based")
    cells = {row[0]: row[1:] for row in rows}
    assert cells["FDA once"] == ["50.0 (60.2)", "50.0"]
    assert cells["FDA twice"] == ["50.0 (68.3)", "50.0"]
    assert cells["SWDE once"] == ["- (37.1)", "-"]
    assert cells["average"][1] == "-"


def test_published_values_never_stand_beside_generated_documents(tmp_path):
    write_run(tmp_path / "a", {"hazyresearch/based-1b-50b": {}}, source="generated fixtures (seed 0)")
    assert "(" not in str(rows_from(tmp_path / "a", "table1")[1])


def test_super_glue_has_published_values_beside_whole_splits_alone():
    for name, row in (("table8", ("mamba-360m-30b", "5")), ("table8", ("jrt-360m-30b", "1"))):
        mean = sum(TABLES[name].rows[row]) / len(TABLES[name].columns)
        assert mean == pytest.approx({"5": 45.5, "1": 41.3}[row[1]], abs=0.05)  # the printed averages
    results = {task: {"acc,none": 0.5, "f1,none": 0.25, "em,none": 0.125} for task in SUPER_GLUE_SIZES}
    found = {
        "model_name": "hazyresearch/JRT-360M-30B",
        "config": {"model_args": {"compat": "released"}, "limit": None},
        "n-shot": dict.fromkeys(SUPER_GLUE_SIZES, 5) | {"recall_super_glue": 0},
        "n-samples": {task: {"effective": size} for task, size in SUPER_GLUE_SIZES.items()} | {"wic": {"effective": 6}},
        "results": results,
    }
    (header, rows), _ = super_glue_rows(TABLES["table8"], [found])
    assert rows[0][:4] == ["hazyresearch/JRT-360M-30B [released]", "5", "50.0 (49.1)", "50.0 (44.6)"]
    assert dict(zip(header, rows[0], strict=True))["WiC"] == "50.0"


def test_error_modes_come_from_predictions(tmp_path):
    write_run(tmp_path / "a", {"state-spaces/mamba-1.4b": {}})
    rows = dict(rows_from(tmp_path / "a", "table13")[1])
    assert rows["FDA once irrelevant"] == "50.0 (23.0)" and rows["FDA once no answer"] == "0.0 (0.1)"


def test_runs_of_one_model_with_different_rules_are_kept_apart(tmp_path):
    write_run(tmp_path / "a", {"hazyresearch/JRT-360M-30B": {"short_prompt": "pad"}})
    write_run(tmp_path / "b", {"hazyresearch/JRT-360M-30B": {"short_prompt": "repeat", "dtype": "bfloat16"}})
    names = {record["model"] for record in together([tmp_path / "a", tmp_path / "b"]).records}
    assert names == {"hazyresearch/JRT-360M-30B [pad]", "hazyresearch/JRT-360M-30B [repeat, bfloat16]"}
    write_run(tmp_path / "c", {"hazyresearch/JRT-360M-30B": {"short_prompt": "pad"}})
    with pytest.raises(ValueError, match="two runs hold"):
        together([tmp_path / "a", tmp_path / "c"])


def test_runs_in_folders_of_one_name_keep_their_manifests(tmp_path):
    runs = [write_run(tmp_path / model / "run", {model: {}}) for model in ("mini-based", "mini-jrt")]
    kept = together(runs).manifest["runs"]
    assert [run["identity"]["models"][0]["name"] for run in kept.values()] == ["mini-based", "mini-jrt"]


def test_collect_writes_every_file(tmp_path):
    import pandas

    write_run(tmp_path / "runs" / "a", {"mini-based": {}, "mini-jrt": {}})
    text, files = collect([tmp_path / "runs"], tmp_path / "out", "table1")
    assert files == FILES
    assert "Table 1" in text and "jrt-table1 v1" in text
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == sorted(FILES)
    with (tmp_path / "out" / "results.csv").open() as stream:
        assert [row["model"] for row in csv.DictReader(stream)] == ["mini-based"] * 2 + ["mini-jrt"] * 2
    assert len(pandas.read_parquet(tmp_path / "out" / "predictions.parquet")) == 40
    assert (tmp_path / "out" / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no finished run"):
        collect([tmp_path / "out"], tmp_path / "out")
    text, _ = collect([tmp_path / "runs"], tmp_path / "out", "table2")
    assert "a: measured under jrt-table1, not jrt-table2-512: no published value beside it" in text
    with pytest.raises(ValueError, match="unknown layout"):
        collect([tmp_path / "runs"], tmp_path / "out", "table99")


def test_a_page_is_self_contained_and_escapes_what_models_wrote(tmp_path):
    write_run(tmp_path / "a", {NASTY: {}})
    found = together([tmp_path / "a"])
    found.records[0] |= {"truncated": 3, "nan": 2}
    text = page("A title & more", found, plots.draw(found).values())
    scripts = []

    class Tags(HTMLParser):
        def handle_starttag(self, tag, attributes):
            assert not any(
                name in ("src", "href") and value and not value.startswith("#") for name, value in attributes
            )
            if tag == "script":
                scripts.append(tag)

    Tags().feed(text)
    assert len(scripts) == 1  # the page's own
    assert "<script>alert" not in text and "<mark>Acme</mark>" in text and "width:50.0%" in text
    assert "<th>truncated" in text and "<td>3<td>" in text and "once: 2" in text
    assert "http" not in re.sub(
        r'xmlns[^"]*"[^"]*"|"http://www.w3.org[^"]*"|https?://(purl|creativecommons|matplotlib)[^"< ]*', "", text
    )


def test_answers_are_marked_where_they_stand():
    assert marked("a <b> Acme, ACME", ["acme"]) == "a &lt;b&gt; <mark>Acme</mark>, <mark>ACME</mark>"
    assert marked("nothing", ["acme"]) == "nothing"


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("page\nline\nopen(", ("page\nline", "open(")),
        ("A text. Another. Key:", ("A text. Another. ", "Key:")),
        ("A text.\nQuestion: Who?\nAnswer:", ("A text.", "Question: Who? Answer:")),
        ("x" * 400, ("", "x" * 400)),
    ],
)
def test_a_prompt_ends_with_its_question(prompt, expected):
    assert split_question(prompt) == expected


def test_text_tables_and_sizes():
    assert aligned(("a", "bb"), [["x", "1"]]).splitlines() == ["a  bb", "-  --", "x   1"]
    assert [size(n) for n in (10, 2048, 3 * 2**20)] == ["10 B", "2.0 KiB", "3.0 MiB"]
    assert r"50\% \& more" in latex(("a", "b"), [["50% & more", "1"]])


def test_recall_hits_are_pairs_seen_before():
    from collections import Counter
    from itertools import pairwise

    row = [1, 2, 3, 4, 1, 2, 9, 4]
    found = slices(row, Counter(pairwise(row)))
    assert found[0] == [("other", "all", "")]  # (4, 1) is new
    kinds = {key[:2] for key in found[1]}  # (1, 2) came four places before
    assert kinds == {("hit", "all"), ("hit", "distance"), ("hit", "frequency")}
    assert [keys[0][0] for keys in found] == ["other", "hit", "other", "other"]
