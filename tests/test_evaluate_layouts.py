"""Layouts of tables 5, 7, 10 and the mean gain; marks for cells with different settings; lists of missing runs."""

import json
from pathlib import Path

import pytest
from jrt_recall import PROTOCOLS, data, fixtures, protocol_named

from jrt.evaluate.report.collected import collect, paper_table, together
from jrt.evaluate.tables import layouts, mixtures
from jrt.evaluate.tables.published import SUPER_GLUE_SIZES, TITLES, published_tables
from jrt.evaluate.tables.results import aligned
from jrt.system.files import json_lines, write_json, write_text

ROOT = Path(__file__).resolve().parent.parent
TABLE1 = published_tables()["table1"]
VERSIONS = {"torch": "2.13.0", "code": "a" * 64}


def write_run(folder, model, cells, dtype="float32", short_prompt=None, versions=VERSIONS, source="hub"):
    """A finished run's folder: of four items a cell, as many right as its score says. cells: (task, strategy, protocol) -> score."""
    records, predictions = [], []
    counts = dict.fromkeys(("documents", "dropped", "invalid", "lost", "unreachable", "absent", "truncated", "nan"), 0)
    for (task, strategy, protocol), score in cells.items():
        cell = {"model": model, "task": task, "strategy": strategy, "protocol": protocol}
        numbers = {
            "score": score,
            "low": 0.0,
            "high": 1.0,
            "n": 4,
            "prompt_tokens": 1.0,
            "seconds": 1.0,
            "state_bytes": 1,
        }
        records.append({**cell, **numbers, **counts, "beyond_training": False, "source": source})
        for number in range(4):
            right = number < 4 * score
            item = {"id": str(number), "prompt": "p. q", "answers": ["a"], "prediction": "a" if right else "x"}
            predictions.append({**cell, **item, "score": int(right), "position": 0.5, "truncated": 0, "finite": True})
    folder.mkdir(parents=True)
    write_json(folder / "results.json", records)
    write_text(folder / "predictions.jsonl", json_lines(predictions))
    described = {"name": model, "dtype": dtype, "compat": None, "short_prompt": short_prompt}
    names = {protocol for _, _, protocol in cells}
    used = [(PROTOCOLS.get(name) or protocol_named(name, "fda")).as_dict() for name in names]
    write_json(folder / "manifest.json", {"identity": {"models": [described], "protocols": used}, "versions": versions})
    return folder


def table1_cells(once=0.25, twice=0.5):
    return {(c.task, c.strategy, c.protocol): once if c.strategy == "once" else twice for c in TABLE1.columns}


def text_of(folders, layout):
    """The table and what stands below it, without the page and its figures."""
    (header, rows), below = paper_table(layout, together(folders))
    return "\n".join([aligned(header, rows), *below])


def test_table_5_from_the_kernel_profile(tmp_path):
    text, files = collect([ROOT / "benchmarks" / "results"], tmp_path, "table5")
    row = next(line for line in text.splitlines() if line.startswith("JRT-RNN custom CUDA"))
    profile = json.loads((ROOT / "benchmarks" / "results" / "lin_attn_profile.json").read_text())
    shape = {"B": 16, "N": 32768}
    measured = next(
        r["ms"] for r in profile["rows"] if r["method"] == "JRT-RNN" and shape.items() <= r["shape"].items()
    )
    assert f"{measured:.2f} (5.6)" in row and profile["device"] in text
    assert "missing: fast-transformers: fast_transformers is not installed" in text
    assert [(tmp_path / name).is_file() for name in files] == [True, True]


MADE_OF = {
    "table1": "recall_fda once under jrt-table1, recall_fda twice",
    "mean-gain": "recall_fda once under jrt-table1, recall_fda twice",
    "table2": "recall_fda once under jrt-table2-512",
    "table3": "recall_fda once under jrt-table2-2048",
    "table4": "recall_fda once under jrt-table2-512",
    "table5": "is made of one lin_attn_profile.json",
    "table7": "is made of the datasets' mirror",
    **dict.fromkeys(("table8", "table9", "table10"), "no results of SuperGLUE; .*super_glue_tables.sh"),
    "table13": "recall_fda once under jrt-table1",
    "table14": "recall_fda 2shot under jrt-table1",
}


@pytest.mark.parametrize("layout", TITLES)
def test_a_layout_says_what_it_is_made_of(layout, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=MADE_OF[layout]):
        collect([tmp_path / "empty"], tmp_path / "out", layout)
    assert not (tmp_path / "out").exists()


def test_table_7_counts_documents_and_tokens(shared, tmp_path):
    mirror = tmp_path / "mirror"
    (mirror).mkdir()
    (mirror / "gpt2").symlink_to(shared / "gpt2")
    rows = fixtures.documents("fda", count=3, sentences=4)
    data.store("fda", rows, "a copy of the hub's", mirror)
    data.store("drop", fixtures.documents("drop", count=2), fixtures.SOURCE, mirror)
    (_, lines), notes = layouts.datasets([mirror])
    found = {line[0]: line[1:] for line in lines}
    assert found["fda"][0] == "3 (1102)" and found["fda"][1].endswith("(1999.9)")
    assert found["drop"][0] == "2" and "(" not in found["drop"][1]  # generated documents
    assert "missing: swde.jsonl" in notes and len(notes) == 6


def super_glue(model, shots):
    names = {
        "boolq": "acc",
        "cb": "acc",
        "copa": "acc",
        "multirc": "acc",
        "sglue_rte": "acc",
        "wic": "acc",
        "wsc": "acc",
    }
    results = {task: {f"{metric},none": 0.5} for task, metric in names.items()}
    results["cb"]["f1,none"] = 0.5
    results["recall_record"] = {"f1,none": 0.5, "em,none": 0.5}
    return {
        "results": results,
        "n-shot": dict.fromkeys(SUPER_GLUE_SIZES, shots),
        "n-samples": {task: {"effective": size} for task, size in SUPER_GLUE_SIZES.items()},
        "model_name": model,
        "config": {"model_args": {}, "limit": None},
    }


def test_table_10_compares_with_no_printed_jrt_row(tmp_path):
    write_json(tmp_path / "results_a.json", super_glue("hazyresearch/JRT-360M-30B", 5))
    text, _ = collect([tmp_path], tmp_path / "out", "table10")
    measured = next(line for line in text.splitlines() if line.startswith("hazyresearch/JRT-360M-30B"))
    assert "(" not in measured and measured.split()[1:] == ["5", *["50.0"] * 10]
    assert "(55.4)" in text and "repeats Table 8's Based row" in text
    # The reason, in our own copy of the numbers: Table 8's Based row is what Table 10 prints for JRT-RNN.
    assert published_tables()["table8"].rows["based-360m-30b", "5"][:4] == (53.5, 53.6, 36.7, 76.0)


def test_the_mean_gain_is_the_papers_formula(tmp_path):
    every = [sum(row[1::2]) / 6 - sum(row[::2]) / 6 for row in TABLE1.rows.values()]
    assert len(every) == 16 and layouts.spread(every) == "11.0 +- 1.3"
    write_run(tmp_path / "a", "state-spaces/mamba-130m", table1_cells())
    write_run(tmp_path / "b", "other/model", table1_cells(twice=0.75))
    partial = dict(list(table1_cells().items())[:3])
    write_run(tmp_path / "c", "third/model", partial)
    text = text_of([tmp_path / name for name in "abc"], "mean-gain")
    lines = text.splitlines()
    own = TABLE1.rows["mamba-130m", ""]
    gain = sum(own[1::2]) / 6 - sum(own[::2]) / 6
    assert next(line for line in lines if line.startswith("state-spaces")).endswith(f"25.0 ({gain:.1f})")
    assert any(line.startswith("mean and standard deviation, models: 2") and "37.5 +- 17.7" in line for line in lines)
    (twice,) = [line for line in lines if line.startswith("missing: jrt eval --model third/model") and "twice" in line]
    assert "recall_drop," in twice and "--protocol jrt-table1" in twice
    assert not any("mamba-130m" in line for line in lines if line.startswith("missing"))
    assert "11.0 +- 1.3 over the 16 rows" in text


def test_cells_that_were_not_measured_alike_have_a_mark_and_a_reason(tmp_path):
    write_run(tmp_path / "a", "state-spaces/mamba-130m", table1_cells())
    other = {**VERSIONS, "torch": "2.11.0"}
    write_run(tmp_path / "b", "state-spaces/mamba-370m", table1_cells(), dtype="bfloat16", versions=other)
    elsewhere = {("recall_fda", "once", "w2000-a50"): 0.5, ("recall_fda", "twice", "jrt-table1"): 0.5}
    write_run(tmp_path / "c", "state-spaces/mamba-1.4b", elsewhere)
    text = text_of([tmp_path / name for name in "abc"], "table1")
    row = next(line for line in text.splitlines() if line.startswith("FDA once"))
    assert "25.0 (25.7)" in row and "25.0 a (41.9)" in row and row.rstrip().endswith("50.0 b")
    assert "a: dtype bfloat16, the others float32; torch 2.11.0, the others 2.13.0" in text
    assert "b: measured under w2000-a50, not jrt-table1: no published value beside it" in text
    found = together([tmp_path / name for name in "abc"])
    assert mixtures.unlike(found)[0].startswith(
        "not measured alike: state-spaces/mamba-370m [bfloat16]: dtype bfloat16"
    )


def test_versions_of_one_protocol_are_told_apart(tmp_path):
    names = ("130m", "370m", "1.4b")
    runs = [write_run(tmp_path / name, f"state-spaces/mamba-{name}", table1_cells()) for name in names]
    newer = json.loads((runs[0] / "results.json").read_text())
    write_json(runs[0] / "results.json", [{**record, "version": 2} for record in newer])
    manifest = json.loads((runs[0] / "manifest.json").read_text())
    manifest["identity"]["protocols"] = [{**one, "version": 2} for one in manifest["identity"]["protocols"]]
    write_json(runs[0] / "manifest.json", manifest)
    text = text_of(runs, "table1")
    assert "25.0 a (25.7)" in text and "a: jrt-table1 v2, the others v1" in text
    line = "not measured alike: state-spaces/mamba-130m: jrt-table1 v2, the others v1"
    assert line in text_of(runs, "mean-gain")
    plain, _ = collect(runs, tmp_path / "out")
    assert line in plain and "recall_fda | jrt-table1 v1:" in plain and "recall_fda | jrt-table1 v2:" in plain
    web = (tmp_path / "out" / "report.html").read_text()
    older = web.split("jrt-table1 v1:")[1].split("jrt-table1 v2:")[0]
    assert "mamba-370m" in older and "mamba-130m" not in older


def changed_manifest(folder, **changes):
    """Adds fields to a run's manifest; `limit` to its identity."""
    manifest = json.loads((folder / "manifest.json").read_text())
    if "limit" in changes:
        manifest["identity"]["limit"] = changes.pop("limit")
    write_json(folder / "manifest.json", {**manifest, **changes})
    return folder


@pytest.mark.parametrize("layout", ["table1", "mean-gain"])
def test_cells_of_the_first_items_only_are_told(layout, tmp_path):
    """A score of a run with --limit does not stand silently beside scores of whole datasets."""
    short = changed_manifest(write_run(tmp_path / "a", "state-spaces/mamba-130m", table1_cells()), limit=5)
    text = text_of([short], layout)
    assert "measured on the first 5 items of each task" in text and "the others" not in text
    whole = [write_run(tmp_path / name, f"state-spaces/mamba-{name}", table1_cells()) for name in ("370m", "1.4b")]
    text = text_of([short, *whole], layout)
    assert "items the first 5, the others all" in text and "measured on the first" not in text


@pytest.mark.parametrize("layout", ["table1", "mean-gain"])
def test_a_layout_names_models_that_could_not_be_run(layout, tmp_path):
    failed = [
        {
            "model": name,
            "task": task,
            "strategy": "once",
            "protocol": "jrt-table1",
            "reason": "needs a package:\nget it",
        }
        for name, task in (("a/b", "recall_fda"), ("a/b", "recall_swde"), ("c/d", "recall_fda"))
    ]
    run = changed_manifest(write_run(tmp_path / "a", "state-spaces/mamba-130m", table1_cells()), failed=failed)
    manifest = json.loads((run / "manifest.json").read_text())
    (known,) = manifest["identity"]["models"]
    manifest["identity"]["models"] = [known, *({**known, "name": name} for name in ("a/b", "c/d"))]
    write_json(run / "manifest.json", manifest)
    later = write_run(tmp_path / "b", "c/d", table1_cells())
    lines = text_of([run, later], layout).splitlines()
    assert lines.count("missing: a/b: could not be run: needs a package: get it") == 1
    assert not any("c/d" in line for line in lines if line.startswith("missing"))


def test_a_layout_lists_the_runs_it_lacks(tmp_path):
    write_run(tmp_path / "a", "state-spaces/mamba-130m", {("recall_fda", "once", "jrt-table1"): 0.5})
    text = text_of([tmp_path / "a"], "table14")
    model = "missing: jrt eval --model state-spaces/mamba-130m --tasks"
    assert f"{model} recall_fda,recall_squad,recall_swde --strategy 2shot --protocol jrt-table1" in text
    cells = {(c.task, c.strategy, c.protocol): 0.5 for c in published_tables()["table4"].columns}
    write_run(tmp_path / "b", "hazyresearch/JRT-360M-30B", cells, short_prompt="repeat")
    text = text_of([tmp_path / "b"], "table4")
    assert "50.0 (82.0)" in text and "--short-prompt iterate" in text and "--short-prompt repeat" not in text


def test_a_layout_lists_the_runs_of_models_that_were_run_under_other_protocols(tmp_path):
    run = write_run(
        tmp_path / "a", "hazyresearch/JRT-360M-30B", table1_cells(), dtype="bfloat16", short_prompt="repeat"
    )
    text = text_of([run], "table2")
    assert "under jrt-table1, not jrt-table2-512" in text
    command = "missing: jrt eval --model hazyresearch/JRT-360M-30B --short-prompt repeat --dtype bfloat16 --tasks"
    lines = [line for line in text.splitlines() if line.startswith(command)]
    assert {line.partition("--protocol ")[2].split()[0] for line in lines} == {
        "jrt-table2-512",
        "jrt-table2-1024",
        "jrt-table2-2048",
        "jrt-table2-nq",
    }
    assert all("--strategy once" in line for line in lines)


def test_super_glue_marks_settings_and_lists_missing_runs(tmp_path):
    usual = {"transformers_version": "5.17.0", "versions": dict.fromkeys(SUPER_GLUE_SIZES, 1.0)}
    for number, (model, shots) in enumerate([("a/a", 0), ("a/a", 1), ("a/a", 5), ("b/b", 5)]):
        found = super_glue(model, shots) | usual
        found["config"]["model_dtype"] = "torch.float32"
        if model == "b/b":
            found |= {"transformers_version": "5.24.0", "versions": usual["versions"] | {"wic": 2.0}}
            del found["results"]["copa"]
        write_json(tmp_path / f"results_{number}.json", found)
    text, _ = collect([tmp_path], tmp_path / "out", "table8")
    lines = text.splitlines()
    row = next(line for line in lines if line.startswith("b/b"))
    assert row.split()[1:] == [
        "5",
        "50.0",
        "a",
        "50.0",
        "a",
        "50.0",
        "a",
        "-",
        *["50.0", "a"] * 4,
        "50.0",
        "b",
        "50.0",
        "a",
    ]
    assert not any(mark in next(line for line in lines if line.startswith("a/a")).split() for mark in "ab")
    assert "a: transformers 5.24.0, the others 5.17.0" in lines
    assert "b: transformers 5.24.0, the others 5.17.0; version of wic 2.0, the others 1.0" in lines
    missing = [line for line in lines if line.startswith("missing: ")]
    start = "missing: jrt lm-eval --model jrt --model_args pretrained=b/b --tasks"
    assert [line.removeprefix(start).split(" --output")[0] for line in missing] == [
        " recall_super_glue --num_fewshot 0",
        " recall_super_glue --num_fewshot 1",
        " copa --num_fewshot 5",
    ]


def test_figure_3_has_a_line_for_each_model(tmp_path):
    from jrt.evaluate.report import plots

    bins = {"distance": ("   0 to   63", "  64 to  255"), "frequency": ("   0 to    0", "   1 to    9")}
    records = [
        {"model": model, "slice": "hit", "by": by, "bin": name, "perplexity": 2.0 + place, "tokens": 10}
        for model in ("mini-jrt", "mini-based")
        for by, names in bins.items()
        for place, name in enumerate(names)
    ]
    drawn = plots.by_recall(records)
    plots.save(drawn, tmp_path)
    svg = (tmp_path / "figure3.svg").read_text()
    assert (tmp_path / "figure3.png").stat().st_size > 1000
    assert svg.count("<!-- mini-") == 2 and "64 to 255" in svg


@pytest.mark.parametrize("content", ["{", "[]", '{"benchmark": "lin_attn_profile"}'])
def test_a_profile_that_was_damaged_is_named(content, tmp_path):
    (tmp_path / "lin_attn_profile.json").write_text(content)
    with pytest.raises(ValueError, match=r"lin_attn_profile\.json"):
        collect([tmp_path], tmp_path / "out", "table5")
    (tmp_path / "results_1.json").write_text(content)
    with pytest.raises(ValueError, match=r"results_1\.json|no results of SuperGLUE"):
        collect([tmp_path], tmp_path / "out", "table8")
