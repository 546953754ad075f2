"""The evaluation from prompts to results: rows are independent, runs resume, results state how they were measured."""

import dataclasses
import itertools
import json
import random
from pathlib import Path

import pytest
import torch
from jrt_recall import PROTOCOLS, contains, fixtures
from jrt_recall.tokenizers import shipped_tokenizer
from random_models import save_random_model
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM

from jrt.evaluate import LocalPool, ModelSpec, Request, open_model, plan, read_run, run
from jrt.evaluate.answering import answer, encode, prompt_limit
from jrt.evaluate.batches import Limits, batches
from jrt.evaluate.tables.side_by_side import comparisons

PAGES = PROTOCOLS["pages-512"]
RECORD = [
    "model",
    "task",
    "strategy",
    "protocol",
    "score",
    "low",
    "high",
    "n",
    "dropped",
    "lost",
    "truncated",
    "prompt_tokens",
    "seconds",
    "state_bytes",
]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    """Folders of random models: JRT with every mixer, one that is causal, and two of transformers."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(
        GPT2Config(vocab_size=4096, n_positions=1024, n_embd=32, n_layer=2, n_head=2, eos_token_id=0)
    )
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    neox = GPTNeoXForCausalLM(
        GPTNeoXConfig(vocab_size=4096, max_position_embeddings=1024, eos_token_id=0, initializer_range=0.3, **sizes)
    )
    for name, model in (("gpt2", gpt2), ("neox", neox)):
        model.save_pretrained(root / name)
        shipped_tokenizer().save_pretrained(root / name)
    ours = {"jrt": save_random_model(root / "jrt", "CPSLAM"), "causal": save_random_model(root / "causal", "CLSM")}
    return {**ours, "gpt2": str(root / "gpt2"), "neox": str(root / "neox")}


@pytest.fixture(scope="module")
def pages(models):
    """The same six questions for the causal model, once and twice."""
    return plan(Request((ModelSpec(models["causal"]),), ("reference_pages",), ("once", "twice"), "pages-512", limit=6))


def without_seconds(rows: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


@pytest.mark.parametrize("name", ["jrt", "causal", "gpt2", "neox"])
def test_answers_do_not_depend_on_the_batch(models, pages, name):
    """Batches of 1, 8 and 32 in fp32."""
    opened = open_model(ModelSpec(models[name]))
    prompts = [item.prompt for item in pages.items(pages.cells()[0]).items] + ["open(", "a b c"]
    pieces = [found.ids for found in encode(opened.tokenizer, prompts, 900)]
    rows = [ids[:length] for ids in pieces for length in (900, 260, 90, 31)]
    found = {size: [None] * len(rows) for size in (1, 8, 32)}
    for size, answers in found.items():
        for batch in batches(rows, Limits(size)):
            answered = answer(opened, [rows[index] for index in batch], dataclasses.replace(PAGES, max_new_tokens=16))
            for index, generation in zip(batch, answered, strict=True):
                answers[index] = (generation.text, generation.new_tokens, generation.finite)
    assert found[8] == found[1] and found[32] == found[1]
    assert len(set(found[1])) > 8


def test_an_early_end_gives_the_text_of_a_full_generation(models):
    opened = open_model(ModelSpec(models["causal"]))
    row = opened.tokenizer("read(self")["input_ids"]
    full = opened.model.generate(torch.tensor([row]), max_new_tokens=48, do_sample=False, eos_token_id=None)[
        0, len(row) :
    ]
    stop = opened.tokenizer.decode(full[10:11])
    found = answer(opened, [row], dataclasses.replace(PAGES, stop=(stop,)))[0]
    assert found.text == opened.tokenizer.decode(full).split(stop)[0]
    assert found.new_tokens <= 11


def test_a_nan_is_reported_and_not_scored(models):
    opened = open_model(ModelSpec(models["causal"]))
    torch.nn.init.constant_(opened.model.model.norm.weight, float("nan"))
    found = answer(opened, [[5, 6, 7]], PAGES)[0]
    assert not found.finite and found.text == ""


def test_a_tokenizer_without_pad_and_end_token_works(models):
    opened = open_model(ModelSpec(models["causal"]))
    rows = [[5, 6, 7], [9, 10, 11, 12, 13]]
    expected = [g.text for g in answer(opened, rows, PAGES)]
    opened.tokenizer.pad_token = None
    opened.tokenizer.eos_token = None
    assert [g.text for g in answer(opened, rows, PAGES)] == expected


def test_prompts_are_cut_on_the_left():
    tokenizer = shipped_tokenizer()
    whole = tokenizer("alpha beta gamma delta")["input_ids"]
    (found,) = encode(tokenizer, ["alpha beta gamma delta"], 3)
    assert found.ids == whole[-3:] and found.truncated == len(whole) - 3
    assert "no tokens" in encode(tokenizer, [""], None)[0].problem
    assert prompt_limit(PROTOCOLS["jrt-table1"], 1024) == 1024 - 48
    assert prompt_limit(PAGES, None) is None
    with pytest.raises(ValueError, match="no prompt fits"):
        prompt_limit(PAGES, 48)


def test_batches_hold_each_index_once_and_start_with_the_longest():
    rows = [[number] * length for number, length in enumerate([3, 9, 1, 7, 5])]
    assert batches(rows, Limits(8)) == [[1, 3, 4, 0, 2]]
    assert batches(rows, Limits(2)) == [[1, 3], [4, 0], [2]]
    assert batches(rows, Limits(8, tokens=14)) == [[1], [3, 4], [0, 2]]
    assert batches(rows, Limits(8, tokens=6)) == [[1], [3], [4], [0, 2]]
    assert batches(rows, Limits(8, alone=6)) == [[1], [3], [4, 0, 2]]
    assert batches(rows, Limits(8, padding=6)) == [[1, 3, 4], [0, 2]]
    alike = [[7, 7, 7, 7, 7, 1], [7, 7, 7, 7, 7, 2], [8] * 6]
    assert batches(alike, Limits(8, alone=5)) == [[0, 1], [2]]
    assert batches(alike, Limits(8, tokens=8)) == [[0, 1], [2]]
    assert batches([*alike, [9]], Limits(8, padding=4)) == [[0, 1, 2], [3]]
    assert batches(alike, Limits(8, tokens=8, shares=False)) == [[0], [1], [2]]
    assert batches([], Limits(8)) == []


@pytest.mark.parametrize(
    "limits", [Limits(4), Limits(3, 40), Limits(5, alone=7), Limits(4, 30, alone=12), Limits(6, padding=9)], ids=str
)
def test_batches_keep_to_the_limits_and_are_full(limits):
    """A batch ends only where the next row would go over a limit."""
    draw = random.Random(0)
    for _ in range(30):
        rows = [[number] * draw.randint(1, 15) for number in range(8)]

        def within(batch: list[int], rows=rows) -> bool:
            longest = max(len(rows[index]) for index in batch)
            too_many = limits.tokens is not None and longest * len(batch) > limits.tokens
            padding = longest * len(batch) - sum(len(rows[index]) for index in batch)
            too_many |= limits.padding is not None and padding > limits.padding
            too_long = limits.alone is not None and longest > limits.alone
            return len(batch) == 1 or not (len(batch) > limits.size or too_many or too_long)

        found = batches(rows, limits)
        order = [index for batch in found for index in batch]
        assert sorted(order) == list(range(len(rows)))
        assert [len(rows[index]) for index in order] == sorted(map(len, rows), reverse=True)
        assert all(map(within, found))
        assert not any(within([*batch, after[0]]) for batch, after in itertools.pairwise(found))


def test_a_run_leaves_the_promised_files(models, pages, tmp_path):
    outcome = run(pages, LocalPool(), tmp_path / "run", batch_size=4)
    records = json.loads((tmp_path / "run" / "results.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    assert records == outcome.records and rows == outcome.predictions
    assert len(records) == 2 and len(rows) == 12
    for record in records:
        assert not set(RECORD) - set(record)
        own = [row for row in rows if row["strategy"] == record["strategy"]]
        hits = [contains(row["prediction"], row["answers"]) for row in own]
        assert record["score"] == sum(hits) / len(hits) and record["n"] == len(hits) == 6
        assert record["low"] <= record["score"] <= record["high"]
        assert record["beyond_training"]  # 512 tokens; the debug size is trained on 128
    assert [row["id"] for row in rows[:6]] == [row["id"] for row in rows[6:]]
    manifest = read_run(tmp_path / "run").manifest
    assert manifest["complete"] and manifest["identity"]["cells"][0]["sha256"]
    assert len(manifest["models"][models["causal"]]["sha256"]) == 64


def test_an_interrupted_run_goes_on_from_what_is_on_disk(models, pages, tmp_path):
    whole = run(pages, LocalPool(), tmp_path / "whole", batch_size=4)

    class Stopping(LocalPool):
        asked = 0

        def answer(self, job):
            if Stopping.asked == 2:
                raise KeyboardInterrupt
            Stopping.asked += 1
            return super().answer(job)

    folder = tmp_path / "part"
    with pytest.raises(KeyboardInterrupt):
        run(pages, Stopping(), folder, batch_size=4)
    kept = (folder / "predictions.jsonl").read_text()
    assert kept.count("\n") == 6 and not (folder / "results.json").exists()
    (folder / "predictions.jsonl").write_text(kept[:-40])  # as a crash within a write leaves it
    with pytest.raises(ValueError, match="--resume"):
        run(pages, LocalPool(), folder, batch_size=4)
    resumed = run(pages, LocalPool(), folder, batch_size=3, resume=True)
    assert without_seconds(resumed.predictions) == without_seconds(whole.predictions)
    assert without_seconds(resumed.records) == without_seconds(whole.records)
    assert resumed.comparisons == whole.comparisons


def test_a_folder_of_version_0_1_is_read_and_gone_on_with(pages, tmp_path):
    """It named the task reference_pages; the window stood in the protocol alone."""
    folder = tmp_path / "run"
    now = run(pages, LocalPool(), folder, batch_size=4)
    assert {record["task"] for record in now.records} == {"recall_reference_pages_512"}
    for name in ("results.json", "predictions.jsonl", "comparisons.json", "manifest.json"):
        text = (folder / name).read_text()
        (folder / name).write_text(text.replace('"recall_reference_pages_512"', '"reference_pages"'))
    assert (read_run(folder).records, read_run(folder).predictions) == (now.records, now.predictions)

    class Idle(LocalPool):
        def answer(self, job):
            raise AssertionError("everything was answered")

    resumed = run(pages, Idle(), folder, resume=True)
    assert resumed.predictions == now.predictions and read_run(folder).records == now.records


def test_a_folder_belongs_to_one_run(models, pages, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        run(pages, LocalPool(), tmp_path / "notes")
    assert [file.name for file in (tmp_path / "notes").iterdir()] == ["todo.txt"]
    short = plan(dataclasses.replace(pages.request, limit=2, strategies=("once",)))
    run(short, LocalPool(), tmp_path / "run")
    with pytest.raises(ValueError, match="another run"):
        run(pages, LocalPool(), tmp_path / "run", resume=True)
    other = save_random_model(tmp_path / "other", "CLSM", seed=1)
    renamed = plan(dataclasses.replace(short.request, models=(ModelSpec(other),)))
    run(renamed, LocalPool(), tmp_path / "weights")
    save_random_model(tmp_path / "other", "CLSM", seed=2)
    with pytest.raises(ValueError, match="other weights"):
        run(renamed, LocalPool(), tmp_path / "weights", resume=True)


def test_damaged_folders_are_named(models, pages, tmp_path):
    folder = tmp_path / "run"
    run(pages, LocalPool(), folder)
    manifest = read_run(folder).manifest
    assert len(manifest["versions"]["code"]) == 64 and manifest["device"] and manifest["commit"]
    whole = (folder / "predictions.jsonl").read_text()
    (folder / "predictions.jsonl").write_text("".join(whole.splitlines(keepends=True)[:7]))
    with pytest.raises(ValueError, match=r"rests on 6 answers.*holds 1"):
        read_run(folder)
    (folder / "predictions.jsonl").write_text(whole)
    (folder / "results.json").write_text("[")
    with pytest.raises(ValueError, match=r"results\.json is damaged"):
        read_run(folder)
    (tmp_path / "file").touch()
    for path, said in ((tmp_path / "file", "is a file"), (tmp_path / "file" / "below", "cannot be made")):
        with pytest.raises(ValueError, match=said):
            run(pages, LocalPool(), path)


def test_two_runs_into_one_folder_at_once_are_refused(pages, tmp_path):
    refused = []

    class Meddling(LocalPool):
        def answer(self, job):
            if not refused:
                with pytest.raises(ValueError, match="another process") as error:
                    run(pages, LocalPool(), tmp_path / "run", resume=True)
                refused.append(error)
            return super().answer(job)

    run(pages, Meddling(), tmp_path / "run")
    assert refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": (ModelSpec("mini-nothing"),)}, "unknown model"),
        ({"models": ()}, "at least one model"),
        ({"tasks": ("squat",)}, "unknown task 'squat'"),
        ({"strategies": ("thrice",)}, "unknown strategy"),
        ({"strategies": ("once", "once")}, "named twice"),
        ({"protocol": ()}, "name at least one protocol"),
        ({"strategies": ("0-shot",)}, "1 to 16 examples"),
        ({"passages": Path("/nowhere")}, "no task reads it"),
        ({"data": Path("/nowhere")}, "no task reads it"),
        ({"data": Path("/nowhere"), "tasks": ("squad",), "protocol": "jrt-table1"}, "mirror, /nowhere, is not there"),
        ({"passages": Path("/nowhere"), "tasks": ("qa_nq",), "protocol": None}, "passages, /nowhere, is not there"),
        ({"cut_with": "shipped", "tasks": ("qa_squad",), "protocol": "full"}, "leaves documents whole"),
        ({"protocol": "w1-a1"}, "unknown protocol"),
        ({"protocol": "jrt-table1"}, "is not for reference_pages"),
        ({"tasks": ("recall_squad", "squad")}, "the same task is named twice"),
        ({"limit": 0}, "limit"),
        ({"tasks": ("qa_squad",), "protocol": None}, "JRT_PASSAGES"),
    ],
)
def test_requests_that_make_no_sense_are_refused(pages, change, message, monkeypatch):
    monkeypatch.delenv("JRT_PASSAGES", raising=False)
    with pytest.raises(ValueError, match=message):
        plan(dataclasses.replace(pages.request, **change))


def test_models_and_devices_that_cannot_be_had_are_refused(models, tmp_path):
    with pytest.raises(ValueError, match="device"):
        open_model(ModelSpec(models["causal"], device="cuda:63"))
    with pytest.raises(ValueError, match="dtype"):
        open_model(ModelSpec(models["causal"], dtype="int8"))
    with pytest.raises(ValueError, match="compat"):
        open_model(ModelSpec(models["gpt2"], compat="released"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no model"):
        open_model(ModelSpec(str(tmp_path / "empty")))


def test_prompts_that_a_limit_cut_are_counted(tmp_path, models):
    mirror = fixtures.write(tmp_path / "mirror", count=3, sentences=60)
    request = Request((ModelSpec(models["gpt2"]),), ("squad",), ("twice",), "full", limit=2, data=mirror)
    (record,) = run(plan(request), LocalPool(), tmp_path / "run").records
    assert record["truncated"] == 2 and record["prompt_tokens"] == 1024 - 48
    layers, width, floats = 2, 32, 4
    assert record["state_bytes"] == 2 * layers * width * floats * (1024 - 48)


def test_comparisons_pair_the_same_items():
    cells = {("a", "once"): [0, 1, 0], ("a", "twice"): [1, 1, 0], ("b", "once"): [1, 1, 1]}
    rows = [
        {"model": m, "task": "t", "strategy": s, "protocol": "p", "id": str(number), "score": score}
        for (m, s), scores in cells.items()
        for number, score in enumerate(scores)
    ]
    found = comparisons(rows)
    assert [(c["between"], round(c["difference"], 3), c["n"]) for c in found] == [
        ("strategy", 0.333, 3),
        ("model", 0.667, 3),
    ]
