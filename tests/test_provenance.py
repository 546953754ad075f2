"""Provenance (versions, commit and device that are stored with a result), and files that are never half written."""

import importlib
import json
import subprocess
import types
from pathlib import Path

import pytest
import torch

from jrt.system.files import json_lines, write_bytes, write_json, write_text
from jrt.system.provenance import code_sha256, command, commit, device_name, versions


def test_versions_and_device_are_those_of_this_process():
    found = versions()
    assert found["torch"] == torch.__version__ and found["python"].count(".") == 2
    assert "absent" not in found.values() and device_name()


def test_a_benchmark_names_the_device_that_was_measured(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    record = importlib.import_module("record")
    on_gpu, on_cpu = (json.loads(record.write("x", [], tmp_path / on, on).read_text()) for on in ("cuda", "cpu"))
    assert on_gpu["device"] == "a GPU"
    assert on_cpu["device"].endswith("threads")


def test_a_command_names_no_folder_of_this_machine(tmp_path):
    assert (
        command("-m", "tool", "--out", str(tmp_path / "a b.json"), "part/x") == "python -m tool --out 'a b.json' part/x"
    )


def test_a_commit_is_told_read_or_unknown(tmp_path, monkeypatch):
    monkeypatch.delenv("JRT_COMMIT", raising=False)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    assert commit(tmp_path) == "unknown"
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    (tmp_path / "file").write_text("one")
    for words in (["init", "-q"], ["add", "file"], [*identity, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    clean = commit(tmp_path)
    assert len(clean) >= 7 and "+" not in clean
    (tmp_path / "file").write_text("two")
    assert commit(tmp_path) == f"{clean}+changes"
    monkeypatch.setenv("JRT_COMMIT", "abc1234")
    assert commit(tmp_path) == "abc1234"


def test_the_sources_have_a_hash_of_their_own(tmp_path):
    package = types.ModuleType("package")
    package.__file__ = str(tmp_path / "__init__.py")
    (tmp_path / "__init__.py").write_text("")
    (tmp_path / "notes.txt").write_text("not code")
    before = code_sha256(package)
    (tmp_path / "notes.txt").write_text("still not code")
    assert code_sha256(package) == before
    (tmp_path / "task.yaml").write_text("task: a")
    assert code_sha256(package) != before


def test_a_write_that_fails_leaves_the_former_file(tmp_path):
    file = tmp_path / "x.txt"
    write_text(file, "former\u2028\n")
    with pytest.raises(UnicodeEncodeError):
        write_text(file, "lone surrogate \ud800")
    assert file.read_text(encoding="utf-8") == "former\u2028\n"
    write_bytes(file, b"new")
    assert file.read_bytes() == b"new" and [entry.name for entry in tmp_path.iterdir()] == ["x.txt"]


def test_json_never_holds_nan(tmp_path):
    with pytest.raises(ValueError):
        write_json(tmp_path / "x.json", {"score": float("nan")})
    with pytest.raises(ValueError):
        json_lines([{"score": float("inf")}])
    assert not (tmp_path / "x.json").exists()
    write_json(tmp_path / "x.json", [1])
    assert json.loads((tmp_path / "x.json").read_text()) == [1]
