"""Model names: whether one means a shipped model, a folder or a hub id; and which kind of model a configuration is."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from random_models import save_random_model
from transformers import GPT2Config, LlamaConfig, Mamba2Config, MambaConfig, MptConfig

import jrt
from jrt.checkpoints import names
from jrt.checkpoints.convert import convert
from jrt.checkpoints.names import Kind, find, kind_of, kind_of_model, resolve
from jrt.cli import main
from jrt.config import releases

RELEASED_MAMBA = {"d_model": 2048, "n_embd": 1024, "n_head": 16, "n_layer": 46, "n_positions": 2048, "ssm_cfg": {}}


@pytest.mark.parametrize(
    ("raw", "kind"),
    [
        ({"model_type": "jrt", "d_model": 8, "n_layer": 2}, Kind.JRT),
        ({"model_type": "gpt2", "alt_mixer": {}, "n_embd": 8}, Kind.RELEASED_GPT),
        ({"rotary_emb_fraction": 0.5, "n_embd": 8, "d_model": 8, "n_layer": 2}, Kind.RELEASED_GPT),
        ({"model_type": None, "mixer": None}, Kind.RELEASED_GPT),
        (RELEASED_MAMBA, Kind.MAMBA_SSM),
        ({"d_model": 768, "n_layer": 24, "vocab_size": 50277}, Kind.MAMBA_SSM),
        ({"ssm_cfg": {"layer": "Mamba2"}, "d_model": 768, "n_layer": 24}, Kind.MAMBA2_SSM),
        (MambaConfig().to_dict(), Kind.MAMBA_TRANSFORMERS),
        (MambaConfig().to_dict() | {"d_model": 768, "ssm_cfg": {}}, Kind.MAMBA_TRANSFORMERS),
        (GPT2Config().to_dict(), Kind.OTHER),
        (GPT2Config().to_dict() | {"d_model": 768}, Kind.OTHER),
        (LlamaConfig().to_dict() | {"mixer": {}}, Kind.OTHER),
        (Mamba2Config().to_dict(), Kind.OTHER),
        (MptConfig().to_dict(), Kind.OTHER),
        ({"model_type": ["jrt"]}, Kind.OTHER),
        ({}, Kind.OTHER),
    ],
)
def test_kinds(raw, kind):
    assert kind_of(raw) is kind


def test_the_eight_releases_are_known_before_they_are_downloaded(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert len(releases()) == 8 and set(releases().values()) < set(jrt.presets())
    for hub_id, preset in releases().items():
        mamba = jrt.presets()[preset].has("M")
        assert kind_of_model(hub_id) is (Kind.MAMBA_SSM if mamba else Kind.RELEASED_GPT)
    assert kind_of_model("jrt-1.3b") is Kind.JRT and kind_of_model("debug") is Kind.JRT
    assert kind_of_model("meta-llama/Llama-3") is Kind.OTHER and kind_of_model("nothing") is Kind.OTHER


@pytest.fixture
def beside(tmp_path, monkeypatch) -> Path:
    """A working directory with a folder that has the name of a shipped model."""
    if not names.shipped():
        pytest.skip("this installation has no mini models")
    monkeypatch.chdir(tmp_path)
    save_random_model(tmp_path / "mini-based", pattern="CL")
    return tmp_path


def test_a_name_with_a_separator_is_the_folder(beside, monkeypatch):
    shipped = names.MINIS / "mini-based"
    monkeypatch.setenv("HOME", str(beside))
    for spelling in ("./mini-based", "mini-based/", str(beside / "mini-based"), "~/mini-based", Path("mini-based")):
        assert resolve(spelling).resolve() == beside / "mini-based"
        assert jrt.load(spelling).config.core.pattern == "CL"
        assert jrt.load_tokenizer(spelling).padding_side == "left"
    assert resolve(str(shipped)) == shipped
    for name in set(names.shipped()) - {"mini-based"}:
        assert resolve(name) == names.MINIS / name
        assert resolve(Path(name)) == names.MINIS / name  # no such folder
        with pytest.raises(ValueError, match="no model"):
            resolve(f"./{name}")


@pytest.mark.parametrize(
    "command",
    [
        ["info", "{}"],
        ["generate", "--model", "{}", "--prompt", "open("],
        ["eval", "--model", "{}", "--tasks", "reference_pages", "--limit", "1", "--output", "run"],
        ["convert", "{}", "out"],
    ],
    ids=lambda command: command[0],
)
def test_a_bare_name_that_is_both_is_refused_by_every_command(command, beside, capsys):
    assert main([part.format("mini-based") for part in command]) == 2
    line = capsys.readouterr().err.strip()
    assert "./mini-based" in line and str(names.MINIS / "mini-based") in line and "\n" not in line
    assert os.listdir(beside) == ["mini-based"]
    assert main([part.format("./mini-based") for part in command]) == 0
    if command[0] == "info":
        assert "CL (" in capsys.readouterr().out


def test_the_shipped_folder_itself_is_no_second_meaning(beside, monkeypatch):
    monkeypatch.chdir(names.MINIS)
    assert resolve("mini-based") == names.MINIS / "mini-based"


def test_home_is_expanded_by_every_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_random_model(tmp_path / "mine", pattern="CL")
    assert main(["info", "~/mine"]) == 0 and "CL (" in capsys.readouterr().out
    assert main(["generate", "--model", "~/mine", "--prompt", "open(", "--max-new-tokens", "2"]) == 0
    assert main(["convert", "~/mine", "~/out"]) == 0
    assert jrt.load("~/out").config.source == "mine"
    run = ["eval", "--model", "~/mine", "--tasks", "reference_pages", "--protocol", "pages-512", "--limit", "1"]
    assert main([*run, "--output", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    with pytest.raises(ValueError, match="no user"):
        convert("~/mine", "~nobody-of-this-name/out")
    with pytest.raises(SystemExit, match="2"):
        main(["convert", "~/mine", "~nobody-of-this-name/out"])
    assert "no user" in capsys.readouterr().err and sorted(os.listdir(tmp_path)) == ["mine", "out", "run"]


def test_home_is_expanded_where_no_shell_does_it(tmp_path, monkeypatch, capsys):
    """No shell expands `--output=~/run`, which would make a folder with the name `~`."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    save_random_model(tmp_path / "home" / "mine", pattern="CL")
    run = ["eval", "--model", "~/mine", "--limit", "1", "--output=~/run"]
    assert main([*run, "--tasks", "recall_reference_pages_512"]) == 0
    assert main(["report", "~/run", "--output=~/report"]) == 0
    assert (tmp_path / "home" / "report" / "report.html").is_file() and not os.listdir()
    capsys.readouterr()
    for option, task in (("--data", "swde"), ("--passages", "qa_squad"), ("--text", "recall_perplexity")):
        assert main([*run, "--tasks", task, f"{option}=~/none"]) == 2
        assert str(tmp_path / "home" / "none") in capsys.readouterr().err


def test_a_hub_id_in_the_cache_is_found_and_its_configuration_read(tmp_path, monkeypatch):
    cache = tmp_path / "models--somebody--model"
    snapshot = cache / "snapshots" / ("0" * 40)
    save_random_model(snapshot, pattern="CL")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert find("somebody/model") == snapshot and kind_of_model("somebody/model") is Kind.JRT
    assert find("somebody/other") is None and find("somebody/mod el") is None
    shutil.copytree(snapshot, tmp_path / "somebody" / "model")
    assert find("somebody/model") == Path("somebody/model")  # a folder of that name goes first


@pytest.mark.parametrize("name", ["nothing", "x" * 300, "a\0b", "a/b/c", "~nobody/model", "", "somebody/mod el"])
def test_names_that_lead_nowhere_are_one_line(name):
    with pytest.raises(ValueError, match="no model") as caught:
        resolve(name)
    assert len(str(caught.value).splitlines()) == 1
    assert kind_of_model(name) is Kind.OTHER


def test_a_preset_says_that_it_has_no_weights():
    with pytest.raises(ValueError, match="an architecture without weights"):
        jrt.load("jrt-360m")


@pytest.mark.parametrize("text", ["[1]", "{", "null"])
def test_a_configuration_that_is_no_object_is_one_line(text, tmp_path, capsys):
    (tmp_path / "config.json").write_text(text)
    for command in (["info"], ["generate", "--prompt", "a", "--model"]):
        assert main([*command, str(tmp_path)]) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_records_tell_nothing_of_this_machine_s_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_random_model(tmp_path / "mine", pattern="CL")
    out = convert("~/mine", tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["source"] == "mine"
    assert str(tmp_path) not in (out / "README.md").read_text() and "~" not in (out / "README.md").read_text()
    with torch.no_grad():
        assert torch.equal(jrt.load(out)(torch.tensor([[1]])).logits, jrt.load("~/mine")(torch.tensor([[1]])).logits)
