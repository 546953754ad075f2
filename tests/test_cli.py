"""The command line: commands work, and a wrong command gives one line on stderr and exit status 2."""

import json
import shutil

import pytest
import torch
from jrt_recall import fixtures
from jrt_recall.tokenizers import shipped_tokenizer
from random_models import save_random_model
from transformers import GPT2Config, GPT2LMHeadModel, ReformerConfig

from jrt.cli import main


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_random_model(tmp_path_factory.mktemp("models") / "random-jrt", train_length=1024)


def refusal(capsys, arguments: list[str]) -> str:
    """The one line that a refused command leaves."""
    try:
        status = main(arguments)
    except SystemExit as error:  # argparse ends the process itself
        status = error.code
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line]
    assert status == 2 and captured.out == "" and len(lines) == 1, captured
    return lines[0]


def test_eval_writes_results_and_states_the_protocol(model, tmp_path, capsys):
    output = tmp_path / "run"
    command = [
        "eval",
        "--model",
        model,
        "--tasks",
        "reference_pages",
        "--strategy",
        "once,twice",
        "--protocol",
        "pages-512",
    ]
    command += ["--limit", "3", "--batch-size", "2", "--output", str(output)]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "pages-512 v1: window 512" in text and "at most 48 new tokens" in text and "twice - once" in text
    assert [record["strategy"] for record in json.loads((output / "results.json").read_text())] == ["once", "twice"]
    assert "--resume" in refusal(capsys, command)
    assert main([*command, "--resume"]) == 0
    assert main(["report", str(output), "--output", str(tmp_path / "report")]) == 0
    assert (tmp_path / "report" / "report.html").stat().st_size > 10_000
    capsys.readouterr()
    below_a_file = str(output / "results.json" / "report")
    assert "Not a directory" in refusal(capsys, ["report", str(output), "--output", below_a_file])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model", "mini-nothing", "--tasks", "squad"], "unknown model 'mini-nothing'"),
        (["--tasks", "nope"], "unknown task 'nope'"),
        (["--strategy", "backwards"], "unknown strategy 'backwards'"),
        (["--protocol", "jrt-table9"], "unknown protocol"),
        (["--protocol", "jrt-table1"], "not for reference_pages"),
        (["--tasks", "qa_nq"], "JRT_PASSAGES"),
        (["--tasks", "squad", "--protocol", "full", "--data", "/nowhere"], "jrt data fetch"),
        (["--limit", "0"], "at least 1"),
        (["--limit", "9" * 30], "expected a number below"),
        (["--limit", "many"], "expected a whole number, not 'many'"),
        (["--seed", "-1"], "expected a number of at least 0, not -1"),
        (["--model", "x" * 300], "unknown model"),
        (["--model", "~nobody-of-this-name/model"], "unknown model"),
        (["--output", "x" * 300], "File name too long"),
        (["--device", "abacus"], "device 'abacus'"),
        (["--dtype", "complex64"], "dtype"),
        (["--batch-size", "-3"], "at least 1"),
        (["--tasks", "recall_perplexity,squad"], "alone"),
        (["--tasks", "recall_perplexity", "--workers", "2"], "no --workers"),
        (["--text", "notes.txt"], "recall_perplexity"),
        (["--tasks", "qa_squad", "--passages", ".", "--cut-with", "shipped"], "leaves documents whole"),
        (["--unknown-option"], "unrecognized"),
    ],
)
def test_what_eval_cannot_do_is_one_line(model, tmp_path, capsys, monkeypatch, options, said):
    for name in ("JRT_DATA", "JRT_PASSAGES"):
        monkeypatch.delenv(name, raising=False)
    output = tmp_path / "run"
    usual = {"--model": model, "--tasks": "reference_pages", "--limit": "2", "--output": str(output)}
    given = [word for name, value in usual.items() if name not in options for word in (name, value)]
    assert said in refusal(capsys, ["eval", *given, *options])
    assert not output.exists()


def test_eval_reads_generated_documents_under_table_protocols(model, shared, tmp_path, capsys, monkeypatch):
    mirror = fixtures.write(tmp_path / "mirror", count=2)
    shutil.copytree(shared / "gpt2", mirror / "gpt2")
    monkeypatch.setenv("JRT_DATA", str(mirror))
    tasks = "swde,squad,nq_512"
    output = tmp_path / "run"
    command = [
        "eval",
        "--model",
        model,
        "--tasks",
        tasks,
        "--protocol",
        "jrt-table2",
        "--limit",
        "1",
        "--output",
        str(output),
    ]
    assert main(command) == 0
    records = json.loads((output / "results.json").read_text())
    assert len(records) == 2 * 3 + 1 and all(record["source"].startswith("generated") for record in records)
    assert main(["report", str(output), "--layout", "table2"]) == 0
    assert "(82.0)" not in capsys.readouterr().out


def test_eval_reads_real_passages(model, shared, tmp_path, capsys):
    command = [
        "eval",
        "--model",
        model,
        "--tasks",
        "qa_squad,qa_nq,qa_triviaqa,qa_drop,qa_fda",
        "--strategy",
        "once,twice",
    ]
    command += ["--passages", str(shared / "qa"), "--limit", "2", "--output", str(tmp_path / "run")]
    assert main(command) == 0
    records = json.loads((tmp_path / "run" / "results.json").read_text())
    assert {record["protocol"] for record in records} == {"full"} and len(records) == 10


def test_recall_perplexity(model, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"open(file, mode={number % 7})" for number in range(1200)))
    command = ["eval", "--model", model, "--tasks", "recall_perplexity", "--text", str(text), "--limit", "2"]
    assert main([*command, "--output", str(tmp_path / "run")]) == 0
    assert "hit all" in capsys.readouterr().out
    found = json.loads((tmp_path / "run" / "perplexity.json").read_text())
    counted = sum(record["tokens"] for record in found if record["by"] == "all")
    assert counted == 2 * 1024
    assert "already holds" in refusal(capsys, [*command, "--output", str(tmp_path / "run")])
    before = (tmp_path / "run" / "perplexity.json").read_bytes()
    assert main([*command, "--output", str(tmp_path / "run"), "--resume"]) == 0
    assert (tmp_path / "run" / "perplexity.json").read_bytes() == before
    capsys.readouterr()
    other = [*command[:-1], "1", "--output", str(tmp_path / "run"), "--resume"]
    assert "another run" in refusal(capsys, other)


def test_demo_writes_table_figures_and_page(model, tmp_path, capsys):
    command = ["demo", "--models", model, "--limit", "4", "--output", str(tmp_path / "demo")]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "accuracy" in text and "95% interval" in text and "prompt tokens" in text and "state" in text
    names = {file.name for file in (tmp_path / "demo").iterdir()}
    assert {"accuracy.png", "accuracy.svg", "state.png", "report.html", "results.json", "predictions.jsonl"} <= names
    html = (tmp_path / "demo" / "report.html").read_text()
    assert "Items to read" in html and "<mark>" in html
    assert main(command) == 0  # a second look at the same demo
    capsys.readouterr()
    assert "another run" in refusal(capsys, [*command[:-1], command[-1], "--limit", "5"])
    assert "--passages" in refusal(capsys, ["demo", "--passages", str(tmp_path)])
    assert "--models" in refusal(capsys, ["demo", "--real", "--models", model])
    assert "at least one model" in refusal(capsys, ["demo", "--models", "", "--output", str(tmp_path / "none")])


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["eval", "--tasks", "reference_pages", "--output", "run"], "with --resume goes on"),
        (["demo", "--output", "run"], "the same command goes on"),
        (["generate", "--prompt", "open("], "jrt: stopped\n"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_an_interrupted_command_says_how_to_go_on(monkeypatch, capsys, command, said):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("jrt.evaluate.plan", interrupted)
    monkeypatch.setattr("jrt.evaluate.demo.mini_plan", interrupted)
    monkeypatch.setattr("jrt.evaluate.models.open_model", interrupted)
    model = [] if command[0] == "demo" else ["--model", "mini-jrt"]
    assert main([*command, *model]) == 130
    assert said in capsys.readouterr().err


def test_generate_beyond_the_places_of_a_model_is_one_line(capsys, tmp_path):
    sizes = dict(vocab_size=4096, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(tmp_path)
    shipped_tokenizer().save_pretrained(tmp_path)
    given = ["generate", "--model", str(tmp_path), "--prompt", "open(file, mode) " * 20, "--max-new-tokens", "4"]
    assert main(given) == 2 and "(it reads at most 16)" in capsys.readouterr().err.splitlines()[-1]


def test_generate_goes_on_from_a_prompt(model, capsys):
    assert main(["generate", "--model", model, "--prompt", "open(", "--max-new-tokens", "5"]) == 0
    assert capsys.readouterr().out
    assert "empty" in refusal(capsys, ["generate", "--model", model, "--prompt", "  "])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("jrt-1.3b", ["1,375,143,168", "CPSCC", "21,221,312 bytes (fp32) at any length", "compat='released'"]),
        ("mamba-360m", ["M Mamba x 46"]),
        ("hazyresearch/attn-1b-50bn", ["weights are not here", "A full attention x 36"]),
    ],
)
def test_info_on_presets(capsys, monkeypatch, tmp_path, name, said):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert main(["info", name]) == 0
    text = capsys.readouterr().out
    for words in said:
        assert words in text


def information(capsys, *arguments: str) -> dict[str, str]:
    assert main(["info", *arguments]) == 0
    return dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())


def test_info_says_how_released_models_were_measured_and_only_those(capsys, shared, tmp_path):
    measured = "released checkpoint, as measured"
    line = information(capsys, "jrt-360m")[measured]
    assert "short_prompt='pad'" in line and "leak_continuation" in line and "double_add" not in line
    line = information(capsys, "hazyresearch/based-1b-50b")[measured]
    assert "short_prompt" not in line and "double_add" in line and "leak_continuation" not in line
    assert "double_add" in information(capsys, str(shared / "golden" / "based_fla"))[measured]
    assert measured not in information(capsys, "mini-jrt") and measured not in information(capsys, "debug")
    assert main(["convert", "mini-based", str(tmp_path / "mine")]) == 0
    shutil.copytree(shared / "golden" / "based_fla", tmp_path / "based-1b-50b")
    assert main(["convert", str(tmp_path / "based-1b-50b"), str(tmp_path / "converted")]) == 0
    capsys.readouterr()
    assert measured not in information(capsys, str(tmp_path / "mine"))
    assert "double_add" in information(capsys, str(tmp_path / "converted"))[measured]


def test_info_on_a_model_that_its_own_code_cannot_build_is_one_line(capsys, tmp_path):
    ReformerConfig(is_decoder=False).save_pretrained(tmp_path)
    assert main(["info", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "no causal language model" in said and "is_decoder" in said


def test_info_counts_one_more_token(capsys, tmp_path):
    """A generated token goes through no prefix encoder, so that JRT-RNN costs what Based costs."""
    jrt, based = (information(capsys, name) for name in ("jrt-1.3b", "based-1.3b"))
    assert jrt["FLOPs a token"] == based["FLOPs a token"] and "at any length" in jrt["FLOPs a token"]
    attention = information(capsys, "attention-360m", "--length", "3000")
    assert f"{24 * 2 * 1024 * 4 * 3000:,} at 3,000 tokens" in attention["state a sequence"]
    sizes = dict(n_embd=32, n_layer=3, n_head=4, vocab_size=100, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(tmp_path)
    other = information(capsys, str(tmp_path), "--length", "100")
    assert other["layers"].strip() == "3" and other["tokenizer"].strip() == "not in the folder"
    assert f"{3 * 2 * 32 * 4 * 100:,} at 100 tokens" in other["keys and values"]
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"num_key_value_heads": "4"}))
    assert information(capsys, str(tmp_path), "--length", "100") == other
    millions = (2 * (3 * 12 * 32**2 + 100 * 32) + 3 * 4 * 32 * 101) / 1e6
    assert f"{millions:,.1f} M at 100" in other["FLOPs a token"]


def test_info_on_models(model, capsys):
    assert main(["info", model]) == 0
    text = capsys.readouterr().out
    assert "CPSLAM" in text and "short prompts" in text
    assert "no model 'nothing'" in refusal(capsys, ["info", "nothing"])


def test_doctor_says_what_is_there_and_what_is_not(capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert torch.__version__.split("+")[0] in text and "linear_attention: chunked" in text and "mini models" in text


def test_data_imports_and_verifies(tmp_path, capsys):
    from jrt_recall.data import canonical_lines

    source = tmp_path / "mine.jsonl"
    source.write_text(canonical_lines(fixtures.documents("fda", 3)))
    mirror = tmp_path / "mirror"
    assert main(["data", "import", "fda", str(source), "--folder", str(mirror)]) == 0
    assert main(["data", "verify", "fda", "--folder", str(mirror)]) == 0
    assert "ok     fda: 3 documents" in capsys.readouterr().out
    with (mirror / "fda.jsonl").open("a") as stream:
        stream.write("{}\n")
    assert main(["data", "verify", "fda", "--folder", str(mirror)]) == 1
    capsys.readouterr()
    assert "is not a file" in refusal(
        capsys, ["data", "import", "fda", str(tmp_path / "no.jsonl"), "--folder", str(mirror)]
    )


def test_convert_refuses_what_is_no_checkpoint(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    refusal(capsys, ["convert", str(tmp_path / "empty"), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_convert_into_a_folder_that_cannot_be_made_is_one_line(model, tmp_path, capsys):
    file = tmp_path / "file"
    file.touch()
    assert "cannot be made" in refusal(capsys, ["convert", model, str(file / "out")])
    assert file.read_text() == ""


def test_a_command_is_needed(capsys):
    assert "COMMAND" in refusal(capsys, [])


def test_names_of_a_repeated_option_are_added(tmp_path, capsys):
    models = ["--model", f"{tmp_path}/a", "--model", f"{tmp_path}/b"]
    assert main(["eval", *models, "--tasks", "reference_pages", "--output", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert f"{tmp_path}/a" in told and f"{tmp_path}/b" in told
