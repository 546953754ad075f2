"""`jrt eval` of models that compute something wrong, such as padding.

Each is run in the way that is right for it, the results say so, and the answers equal those of one prompt at a time."""

import json
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers
from conftest import ROOT
from jrt_recall import PROTOCOLS
from jrt_recall.tokenizers import shipped_tokenizer
from random_models import save_random_model
from safetensors.torch import load_file, save_file

from jrt.cli import main
from jrt.evaluate import ModelSpec, open_model
from jrt.evaluate.answering import encode
from jrt.evaluate.folder import Cell, Results, former_manifest, read_run
from jrt.evaluate.harness import _check_model
from jrt.evaluate.models import OpenModel, position_bound
from jrt.evaluate.perplexity import sequences
from jrt.evaluate.report.html import page
from jrt.probe import RunMode

sys.path.insert(0, str(ROOT / "benchmarks"))
import tiny_models

WORDS = [
    "the",
    "valve",
    "opens",
    "slowly",
    "when",
    "pressure",
    "in",
    "the",
    "outer",
    "chamber",
    "rises",
    "above",
    "one",
    "bar",
    "and",
    "closes",
    "again",
    "at",
    "night",
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A function from a kind of tiny model to its folder, with the shipped tokenizer and its vocabulary."""
    root = tmp_path_factory.mktemp("models")

    def folder(kind: str, name: str = "", **files: dict) -> str:
        path = root / (name or kind)
        if not path.exists():
            torch.manual_seed(0)
            config = tiny_models.configuration(kind)
            config.vocab_size = 4096
            model = transformers.AutoModelForCausalLM.from_config(config)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.ndim >= 2:
                        parameter.normal_(std=0.4)
            model.save_pretrained(path)
            shipped_tokenizer().save_pretrained(path)
            for file, fields in files.items():
                (path / f"{file}.json").write_text(json.dumps(json.loads((path / f"{file}.json").read_text()) | fields))
        return str(path)

    return folder


@pytest.fixture(scope="module")
def folder_of_passages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("passages")
    texts = [" ".join(WORDS[(3 * i + j * (i + 1)) % len(WORDS)] for j in range(4 + 11 * i)) for i in range(4)]
    rows = [
        {"context": text, "question": f"what does {WORDS[i]} do?", "answers": ["zz"]} for i, text in enumerate(texts)
    ]
    # Two of these three prompts have the same number of tokens.
    rows += [{"context": texts[3], "question": f"why {word}?", "answers": ["zz"]} for word in WORDS[:3]]
    (folder / "squad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def answered(model, passages, output, *more, expected=0):
    given = [
        "eval",
        "--model",
        model,
        "--tasks",
        "qa_squad",
        "--passages",
        str(passages),
        "--output",
        str(output),
        *more,
    ]
    assert main(given) == expected
    lines = (output / "predictions.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], json.loads((output / "manifest.json").read_text())


def alone(folder, prompts):
    """Greedy answers of transformers itself, one prompt at a time."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = shipped_tokenizer()
    found = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        new = model.generate(ids, max_new_tokens=48, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        found.append(tokenizer.decode(new, skip_special_tokens=True).split("\n")[0])
    return found


@pytest.mark.parametrize(
    ("kind", "shares", "said"),
    [("rwkv", False, "one prompt at a time"), ("mamba2", True, ""), ("bamba", True, ""), ("llama", True, "")],
)
def test_answers_are_those_of_one_prompt_at_a_time(kind, shares, said, saved, folder_of_passages, tmp_path, capsys):
    rows, manifest = answered(saved(kind), folder_of_passages, tmp_path / "run")
    assert [row["prediction"] for row in rows] == alone(saved(kind), [row["prompt"] for row in rows])
    info = manifest["models"][saved(kind)]
    assert info["mode"]["sharing"] is shares and info["probe"]["passes"] <= 20
    assert (said in " ".join(info["notes"])) and (not said) == (info["notes"] == [])
    printed = capsys.readouterr().out
    assert said in printed
    assert main(["report", str(tmp_path / "run")]) == 0
    assert said in (tmp_path / "run" / "report.html").read_text()


def test_saved_settings_are_set_aside_and_named(saved, folder_of_passages, tmp_path, capsys):
    plain, _ = answered(saved("llama"), folder_of_passages, tmp_path / "plain")
    fields = {
        "repetition_penalty": 1.3,
        "num_return_sequences": 2,
        "suppress_tokens": [5],
        "cache_implementation": "no such",
    }
    other = saved("llama", "settings", generation_config=fields, config={"use_cache": False})
    rows, manifest = answered(other, folder_of_passages, tmp_path / "other")
    assert [row["prediction"] for row in rows] == [row["prediction"] for row in plain]
    assert set(manifest["models"][other]["set_aside"]) >= set(fields)
    assert "repetition_penalty=1.3" in capsys.readouterr().out


def test_no_batch_holds_rows_on_both_sides_of_a_switch_of_positions(saved, folder_of_passages, tmp_path, capsys):
    # The passages' prompts have 15 to 80 tokens: a few exceed the switch, and more do with their answers.
    rope = {
        "rope_type": "longrope",
        "original_max_position_embeddings": 100,
        "short_factor": [1.0] * 8,
        "long_factor": [8.0] * 8,
        "factor": 4.0,
        "rope_theta": 10000.0,
    }
    folder = saved("llama", "longrope", config={"rope_parameters": rope, "max_position_embeddings": 400})
    rows, manifest = answered(folder, folder_of_passages, tmp_path / "run")
    lengths = [row["prompt_tokens"] for row in rows]
    assert min(lengths) + 48 < 100 < max(lengths) + 48
    assert [row["prediction"] for row in rows] == alone(folder, [row["prompt"] for row in rows])
    (model,) = manifest["models"].values()
    assert model["batch_length"] == 100 and any("beyond 100 tokens" in note for note in model["notes"])


@pytest.mark.parametrize("content", ["[]", "{", '"text"'])
def test_a_broken_generation_config_is_one_line(content, saved, folder_of_passages, tmp_path, capsys):
    folder = saved("llama", f"broken{len(content)}{content[0]}")
    (tmp_path / folder / "generation_config.json").write_text(content)
    given = ["eval", "--model", folder, "--tasks", "qa_squad", "--passages", str(folder_of_passages)]
    assert main([*given, "--output", str(tmp_path / "run")]) == 2
    assert "generation_config.json" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_one_model_that_cannot_be_opened_is_a_row_and_not_the_end(folder_of_passages, tmp_path, capsys):
    good, bad = save_random_model(tmp_path / "good", "CL"), tmp_path / "bad"
    bad.mkdir()
    (bad / "config.json").write_text("[]")
    rows, manifest = answered(f"{bad},{good}", folder_of_passages, tmp_path / "run", expected=1)
    assert len(rows) == 7 and {row["model"] for row in rows} == {good}
    printed = capsys.readouterr().out
    assert "not run" in printed and "expected a JSON object" in printed
    assert manifest["complete"] is False and manifest["failed"][0]["model"] == str(bad)
    assert main(["report", str(tmp_path / "run")]) == 0
    page = (tmp_path / "run" / "report.html").read_text()
    row = page[page.index(f"<td class=name>{bad}") :].split("<tr>")[0]
    assert "not run: " in row and "expected a JSON object" in row
    given = ["eval", "--model", str(bad), "--tasks", "qa_squad", "--passages", str(folder_of_passages)]
    assert main([*given, "--output", str(tmp_path / "none")]) == 2 and not (tmp_path / "none").exists()


@pytest.mark.parametrize("task", ["qa_squad", "recall_perplexity"])
def test_if_no_model_opens_each_reason_is_told(task, folder_of_passages, tmp_path, capsys):
    models = [tmp_path / "none", tmp_path / "list"]
    for folder, content in zip(models, ("{", "[]"), strict=True):
        folder.mkdir()
        (folder / "config.json").write_text(content)
    (tmp_path / "text.txt").write_text("a")
    more = ["--passages", str(folder_of_passages)] if task == "qa_squad" else ["--text", str(tmp_path / "text.txt")]
    given = ["eval", "--model", ",".join(map(str, models)), "--tasks", task, "--output", str(tmp_path / "run"), *more]
    assert main(given) == 2
    told = capsys.readouterr().err
    assert all(str(folder) in told for folder in models) and told.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_perplexity_of_the_other_models_is_measured_where_one_cannot_be_opened(tmp_path, capsys):
    good, bad = save_random_model(tmp_path / "good", "CL"), tmp_path / "bad"
    bad.mkdir()
    (bad / "config.json").write_text("[]")
    (tmp_path / "text.txt").write_text("the little harbour opened before winter " * 700)
    given = ["eval", "--tasks", "recall_perplexity", "--text", str(tmp_path / "text.txt"), "--limit", "1"]
    assert main([*given, "--model", f"{bad},{good}", "--output", str(tmp_path / "run")]) == 1
    printed = capsys.readouterr().out
    assert f"{bad}: not run: " in printed and "expected a JSON object" in printed
    assert printed.splitlines()[1].split() == ["slice", good, str(bad)]
    records = json.loads((tmp_path / "run" / "perplexity.json").read_text())
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert {record["model"] for record in records} == {good} and list(manifest["failed"]) == [str(bad)]
    assert manifest["complete"] is False
    assert manifest["identity"]["models"][1] == {"name": good, "dtype": "float32", "compat": None, "short_prompt": None}
    assert main([*given, "--model", str(bad), "--output", str(tmp_path / "none")]) == 2
    assert not (tmp_path / "none").exists()

    (bad / "config.json").unlink()
    shutil.copytree(good, bad, dirs_exist_ok=True)
    resumed = [*given, "--model", f"{bad},{good}", "--output", str(tmp_path / "run"), "--resume"]
    assert main(resumed) == 0
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["complete"] is True and not manifest["failed"]
    capsys.readouterr()
    (tmp_path / "run" / "perplexity.json").write_text('[{"slice": "all"}]')
    assert main(resumed) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "perplexity.json" in told and "model absent" in told


def test_perplexity_leaves_out_and_counts_sequences_beyond_the_models_rows(saved, tmp_path, capsys):
    common, rare = "the valve opens slowly " * 1500, "a night in the outer chamber of pressure " * 900
    ids = [shipped_tokenizer()(text, add_special_tokens=False)["input_ids"] for text in (common, rare)]
    rows = max(ids[0]) + 1
    assert max(ids[1]) >= rows
    folder = Path(saved("mamba2", "few_rows"))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(rows)
    model.save_pretrained(folder)
    given = ["eval", "--tasks", "recall_perplexity", "--model", f"{folder},{saved('mamba2')}", "--text"]
    (tmp_path / "text.txt").write_text(common + rare)
    assert main([*given, str(tmp_path / "text.txt"), "--output", str(tmp_path / "run")]) == 0
    found = json.loads((tmp_path / "run" / "perplexity.json").read_text())
    invalid, tokens = Counter(), Counter()
    for record in found:
        invalid[record["model"]] = record["invalid"]
        tokens[record["model"]] += record["tokens"] * (record["by"] == "all")
    few, all_rows = str(folder), saved("mamba2")
    assert invalid[few] > 0 == invalid[all_rows] and tokens[few] + 1024 * invalid[few] == tokens[all_rows]
    assert f"{few}: {invalid[few]} sequences left out" in capsys.readouterr().out
    (tmp_path / "text.txt").write_text(rare)
    assert main([*given, str(tmp_path / "text.txt"), "--output", str(tmp_path / "none")]) == 1
    assert (
        f"{few}: not run: each sequence of the text has a token beyond the model's {rows} rows"
        in capsys.readouterr().out
    )


def test_perplexity_states_how_a_model_is_wrong(saved, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(OpenModel, "mode", RunMode(causal=False))
    (tmp_path / "text.txt").write_text("the valve opens slowly " * 1500)
    given = ["eval", "--tasks", "recall_perplexity", "--model", saved("mamba2"), "--limit", "1", "--text"]
    assert main([*given, str(tmp_path / "text.txt"), "--output", str(tmp_path / "run")]) == 0
    assert "not a causal language model" in capsys.readouterr().out
    assert "not a causal" in json.loads((tmp_path / "run" / "perplexity.json").read_text())[0]["notes"][0]


@pytest.mark.parametrize(("content", "said"), [("é" * 9, "line 1: not UTF-8"), ("ok", "UTF-16")])
def test_a_text_in_another_encoding_is_named(content, said, saved, tmp_path, capsys):
    (tmp_path / "text.txt").write_bytes(content.encode("latin-1" if content != "ok" else "utf-16"))
    given = ["eval", "--tasks", "recall_perplexity", "--model", saved("mamba2"), "--text", str(tmp_path / "text.txt")]
    assert main([*given, "--output", str(tmp_path / "run")]) == 2
    told = capsys.readouterr().err
    assert "text.txt" in told and said in told and told.count("\n") == 1


def test_the_text_of_a_special_token_is_text_for_perplexity():
    tokenizer = shipped_tokenizer()
    (row,) = sequences(tokenizer, ["before <|endoftext|> after"], 11)
    assert tokenizer.eos_token_id not in row


def test_a_cell_that_no_model_answered_is_in_the_page():
    cell = Cell("a/b", "qa_squad", "once", "full")
    failed = [{**cell._asdict(), "reason": "<no\nmodel>"}]
    manifest = {"identity": {"protocols": [PROTOCOLS["full"].as_dict()]}, "failed": failed}
    text = page("t", Results([], [], manifest), [])
    assert "documents whole" in text and "not run: &lt;no model&gt;" in text


def test_ids_beyond_the_models_rows_make_one_item_invalid(saved, folder_of_passages, tmp_path, capsys):
    folder = saved("llama", "extended")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["night"])
    tokenizer.save_pretrained(folder)
    rows, _ = answered(folder, folder_of_passages, tmp_path / "run")
    (record,) = json.loads((tmp_path / "run" / "results.json").read_text())
    assert 0 < len(rows) == record["n"] < 7 and record["invalid"] == 7 - len(rows)
    assert "beyond the model's 4096 rows" in capsys.readouterr().out
    answered(folder, folder_of_passages, tmp_path / "run", "--resume")


def test_limits_are_read_whatever_their_name():
    config = transformers.MptConfig(vocab_size=64, d_model=16, n_heads=2, n_layers=1, max_seq_len=64)
    assert position_bound(transformers.AutoModelForCausalLM.from_config(config)) == 64
    assert position_bound(tiny_models.tiny_model("gpt2")) == 128
    assert position_bound(tiny_models.tiny_model("mamba")) is None
    sizes = {"d_model": 16, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 16}
    whisper = transformers.WhisperConfig(vocab_size=64, max_target_positions=70, pad_token_id=0, **sizes)
    assert position_bound(transformers.AutoModelForCausalLM.from_config(whisper)) == 70


class FailsOnLongPrompts(transformers.LlamaForCausalLM):
    """As a model whose table of positions is shorter than its configuration says."""

    def forward(self, input_ids=None, **given):
        if input_ids.shape[1] > 100:
            raise IndexError("index 100 is out of bounds")
        return super().forward(input_ids=input_ids, **given)


def test_a_model_that_fails_on_long_prompts_is_a_value_error():
    model = FailsOnLongPrompts(tiny_models.configuration("llama")).eval()
    opened = OpenModel(ModelSpec("a/b"), model, shipped_tokenizer())
    assert opened.state_bytes(100) > 0
    with pytest.raises(ValueError, match="a/b cannot be run on 200 tokens: index 100"):
        opened.state_bytes(200)


@pytest.mark.parametrize("layers", [1, 2, 9])
def test_the_state_of_all_layers_is_counted(layers):
    attention = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    scan = transformers.MambaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=layers, state_size=16, conv_kernel=4
    )
    for config, floats in ((attention, 2 * 2 * 8 * 30), (scan, 64 * (4 + 16))):
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        assert OpenModel(ModelSpec("a/b"), model, shipped_tokenizer()).state_bytes(30) == layers * floats * 4


def test_code_of_a_checkpoint_is_not_run_and_that_is_said(saved, capsys):
    code = {"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}}
    folder = saved("llama", "own", config=code)
    Path(folder, "own.py").write_text("raise SystemExit('the code was run')\n")
    capsys.readouterr()
    for command in (["doctor", folder], ["generate", "--model", folder, "--prompt", "x"]):
        assert main(command) == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1 and "code of a checkpoint is never run" in told


def test_models_of_this_project_are_not_probed(tmp_path):
    info = open_model(ModelSpec(save_random_model(tmp_path, "CP"))).info()
    assert info["probe"] is None and RunMode(**info["mode"]) == RunMode(sharing=False) and info["notes"] == []


def test_prompts_of_one_token_are_not_asked_of_a_model_that_reads_them_on_top_of_others(saved):
    opened = open_model(ModelSpec(saved("recurrent_gemma")))
    info = opened.info()
    assert not info["mode"]["one_token"] and any("one token" in note for note in info["notes"])
    (token,) = shipped_tokenizer()("a")["input_ids"]
    one, two = encode(opened.tokenizer, ["a", "a b c"], None, info["vocabulary"], shortest=2)
    assert one.ids == [token] and "one token" in one.problem and not two.problem
    assert open_model(ModelSpec(saved("llama"))).mode.one_token


def test_limits_in_quotes_are_numbers(saved):
    folder = saved("llama", "quoted", config={"max_seq_len": "96", "n_positions": 100.0})
    assert open_model(ModelSpec(folder)).max_length == 96


def test_an_end_token_that_is_no_id_is_stated(saved):
    folder = saved("llama", "end", generation_config={"eos_token_id": "2"})
    assert open_model(ModelSpec(folder)).set_aside == {"eos_token_id": "2"}


@pytest.mark.parametrize("settings", [{"model_max_length": []}, {"pad_token": 3}, {"padding_side": "top"}])
def test_a_tokenizer_that_cannot_be_used_is_one_line(settings, saved):
    name = f"tokenizer_{next(iter(settings))}"
    with pytest.raises(ValueError, match=r"tokenizer|unknown model"):
        open_model(ModelSpec(saved("llama", name, tokenizer_config=settings)))


def with_weights(folder, change):
    """The folder's file of weights, changed."""
    file = Path(folder) / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})
    return folder


DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("lacking", lambda weights: weights.pop(DOWN)),
        ("other_shape", lambda weights: weights.update({DOWN: weights[DOWN][:3].clone()})),
    ],
)
def test_a_model_with_weights_missing_is_not_run_on_random_ones(name, change, saved):
    folder = with_weights(saved("llama", name), change)
    with pytest.raises(ValueError, match=f"cannot be loaded.*{DOWN}"):
        open_model(ModelSpec(folder))


def test_weights_that_a_model_does_not_use_are_stated(saved):
    folder = saved("llama", "shallow", config={"num_hidden_layers": 1})
    (note,) = open_model(ModelSpec(folder)).notes()
    assert "9 weights of the file are not used" in note and "model.layers.1." in note


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "[1"),
        ("config.json", '{"model_type": "llama", "attention_bias": null}'),
        ("config.json", '{"model_type": "llama", "num_attention_heads": 0}'),
        ("model.safetensors", "no weights"),
    ],
)
@pytest.mark.parametrize("kind", ["llama", "ours"])
def test_broken_files_of_a_model_are_one_line(file, content, kind, saved, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(save_random_model(tmp_path / "ours", "CL") if kind == "ours" else saved("llama"), folder)
    (folder / file).write_text(content)
    capsys.readouterr()  # saving shows a progress bar
    for command in (["doctor", str(folder)], ["generate", "--model", str(folder), "--prompt", "a"]):
        assert main(command) == 2
        assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("option", ["batch_size=3", "device=cpu", "max_batch_size=2"])
def test_what_lm_eval_has_an_option_for_is_no_argument_of_the_model(option, capsys):
    given = ["--model", "jrt", "--model_args", f"pretrained=mini-jrt,{option}", "--tasks", "recall_fda"]
    assert main(["lm-eval", *given]) == 2
    assert f"give --{option.split('=')[0]}" in capsys.readouterr().err


def test_a_length_in_quotes_is_a_number(tmp_path):
    from jrt.evaluate.harness import JRTHarness

    assert JRTHarness(save_random_model(tmp_path, "CL"), max_length="90").max_length == 90


def test_a_device_without_numbers_is_one_line(tmp_path, folder_of_passages, capsys):
    given = ["eval", "--model", save_random_model(tmp_path, "CL"), "--tasks", "qa_squad", "--device", "meta"]
    assert main([*given, "--passages", str(folder_of_passages), "--output", str(tmp_path / "run")]) == 2
    assert "device 'meta' cannot be used" in capsys.readouterr().err


def damaged(text: str, change) -> str:
    rows = json.loads(text)
    change(rows[0] if isinstance(rows, list) else rows)
    return json.dumps(rows)


def test_damaged_files_of_a_run_are_one_line(folder_of_passages, tmp_path, capsys):
    model, folder = save_random_model(tmp_path / "model", "CL"), tmp_path / "run"
    given = ["eval", "--model", model, "--tasks", "qa_squad", "--passages", str(folder_of_passages), "--limit", "1"]
    given += ["--output", str(folder)]
    assert main(given) == 0
    kept = {name: (folder / name).read_text() for name in ("results.json", "manifest.json", "predictions.jsonl")}
    identity = json.loads(kept["manifest.json"])["identity"]
    assert read_run(folder) and former_manifest(folder, identity, resume=True)
    wrong = [(name, text) for name in kept for text in ("[1]", "5", "null", '{"a": 1}', '"x"', "[{}]", "\0\n\0")]
    fields = {
        "results.json": [{"score": None}, {"task": None}, {"version": "2"}, {"notes": None}, {"protocol": "w9-a1"}],
        "manifest.json": [{"identity": None}, {"models": None}, {"versions": None}, {"failed": None}, {"failed": [1]}],
        "predictions.jsonl": [{"task": None}, {"answers": None}, {"prediction": None}, {"prompt_tokens": None}],
    }
    wrong += [
        (name, damaged(kept[name], lambda rows, one=one: rows.update(one))) for name in fields for one in fields[name]
    ]
    for name, text in wrong:
        (folder / name).write_text(text + "\n")
        with pytest.raises(ValueError, match=f"{name}|of the results"):
            read_run(folder)
        (folder / name).write_text(kept[name])
    (folder / "manifest.json").write_text("[1]")
    for command in (["report", str(folder)], [*given, "--resume"]):
        assert main(command) == 2
        assert "manifest.json is damaged" in capsys.readouterr().err


def test_a_folder_under_two_spellings_is_one_model(folder_of_passages, tmp_path, capsys):
    model = save_random_model(tmp_path / "model", "CL")
    given = ["eval", "--tasks", "qa_squad", "--passages", str(folder_of_passages), "--output", str(tmp_path / "run")]
    assert main([*given, "--model", f"{model},{model}/"]) == 2
    assert "the same model is named twice" in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", [5, True, ["a"], "", None])
def test_a_model_of_lm_eval_is_named_by_a_string(name):
    with pytest.raises(ValueError, match="pretrained=NAME"):
        _check_model({"model": "jrt", "model_args": {"pretrained": name}})
