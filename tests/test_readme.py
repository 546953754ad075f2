"""The README is right: its commands and its Python code run, and its tables agree with the stored results."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
SECTION = README.split("## Commands by task")[1].split("\n## ")[0]
COMMANDS = [
    command
    for row in re.findall(r"^\| [^|]+ \| (`.+) \|$", SECTION, re.MULTILINE)
    for command in re.findall(r"`([^`]+)`", row)
]
BIN = Path(sys.executable).parent


def run(command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    """One command of the README as a user would type it, with this environment's programs first on the path."""
    import os

    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(["bash", "-c", command], cwd=cwd, env=env, capture_output=True, text=True, check=False)


def listed(start: str) -> str:
    """The README's command that starts so; a command that is gone fails here."""
    found = [command for command in COMMANDS if command.startswith(start)]
    assert found, f"README.md lists no command that starts with {start!r}"
    return found[0]


def test_every_listed_command_is_run_by_a_test():
    tested = {
        "jrt eval --model mini-based": "test_evaluation_and_report",
        "jrt report": "test_evaluation_and_report",
        "jrt generate": "test_quick_commands",
        "jrt info": "test_quick_commands",
        "jrt doctor": "test_quick_commands",
        "jrt data fetch": "test_what_needs_the_hub_says_so",
        "jrt convert": "test_what_needs_the_hub_says_so",
        "jrt eval --model FOLDER_OR_HUB_ID": "test_any_hugging_face_model",
        "jrt-recall": "test_any_hugging_face_model",
        "prompt_scripts/": "tests/test_scripts.py",
        "python prompt_scripts/": "tests/test_scripts.py",
        "architecture_scripts/": "tests/test_scripts.py",
        "python architecture_scripts/": "tests/test_scripts.py",
        "python train/": "tests/test_train_run.py",
        "python -m synthetics": "tests/test_synthetics.py",
        "python benchmarks/lin_attn_profile.py": "tests/test_cuda_kernels.py",
        "JRT_BUILD_KERNELS=1": "tests/test_cuda_kernels.py",
        "pip install gguf": "the slow suite",
    }
    for command in COMMANDS:
        assert any(command.startswith(start) for start in tested), f"no test runs {command!r}"


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith(("jrt generate", "jrt info", "jrt doctor"))])
def test_quick_commands(command, tmp_path):
    done = run(command, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_evaluation_and_report(tmp_path):
    command = listed("jrt eval --model mini-based").replace("--limit 32", "--limit 2")
    done = run(command, tmp_path)
    assert done.returncode == 0, done.stderr
    records = json.loads((tmp_path / "runs/pages/results.json").read_text())
    assert {(record["model"], record["strategy"]) for record in records} == {
        (model, strategy) for model in ("mini-based", "mini-jrt") for strategy in ("once", "twice")
    }
    done = run(listed("jrt report"), tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/pages/report.html").is_file()


def test_any_hugging_face_model(tmp_path, shared):
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=1)).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(shared / "gpt2").save_pretrained(tmp_path / "model")
    from jrt_recall import fixtures

    fixtures.write(tmp_path / "mirror")
    gpt2 = tmp_path / "mirror" / "gpt2"
    if not gpt2.exists():
        AutoTokenizer.from_pretrained(shared / "gpt2").save_pretrained(gpt2)
    environment = {"JRT_DATA": str(tmp_path / "mirror")}
    evaluations = [command for command in COMMANDS if command.startswith("jrt eval --model FOLDER_OR_HUB_ID")]
    assert evaluations
    for command in evaluations:
        done = run(command.replace("FOLDER_OR_HUB_ID", "model") + " --limit 2", tmp_path, **environment)
        assert done.returncode == 0, done.stderr
    done = run(listed("jrt-recall").replace("FOLDER", "model") + " --limit 2", tmp_path, **environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "recall_squad_twice" in done.stdout


@pytest.mark.parametrize("start", ["jrt convert", "jrt data fetch"])
def test_what_needs_the_hub_says_so(start, tmp_path):
    done = run(listed(start), tmp_path, HF_HOME=str(tmp_path / "cache"))
    assert done.returncode == 2
    assert done.stderr.startswith("jrt: ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "OUT").exists()


def test_the_first_python_example_runs(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    done = run(f"{shlex.quote(sys.executable)} -c {shlex.quote(blocks[0])}", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "split(" in done.stdout


FAMILIES = {"JRT": "jrt_main", "based": "based_fla", "mamba": "mamba", "attn": "attn"}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_snippet_of_each_family_loads_a_checkpoint_in_the_released_format(family, shared):
    """The hub is out of reach in tests, so a tiny checkpoint in the same format stands in for the released one."""
    pattern = rf"```python\n([^`]*hazyresearch/{family}-360M-30B.*?)```"
    (block,) = re.findall(pattern, README, re.DOTALL)
    names: dict[str, object] = {}
    exec(re.sub(r"hazyresearch/[\w-]+30B", str(shared / "golden" / FAMILIES[family]), block), names)
    assert names["model"].get_input_embeddings().weight.isfinite().all()


def test_all_eight_released_checkpoints_are_named():
    from jrt.config import releases

    assert all(README.count(f'"{name}"') >= 1 for name in releases())


def test_the_example_of_the_op_runs():
    import torch

    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {name: torch.randn(1, 5, 2, 16) for name in ("k_enc", "v_enc", "q", "k", "v")}
    exec(blocks[-1], names)
    assert names["o"].shape == (1, 5, 2, 16)


def test_tables_are_those_of_the_result_files():
    done = run("python benchmarks/readme_tables.py --check", ROOT)
    assert done.returncode == 0, "run python benchmarks/readme_tables.py"


@pytest.mark.parametrize(
    "document", ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
)
def test_links_lead_somewhere(document):
    path = ROOT / document
    for target in re.findall(r"\]\((?!http)([^)#]+)", path.read_text()):
        assert (path.parent / target).exists(), target


DOCUMENTS = sorted(
    file
    for part in (".", "docs", "lm-eval-harness", "synthetics", "train", "kernels")
    for file in (ROOT / part).glob("*.md")
)


def commands_in(document: Path, start: str) -> list[str]:
    """The commands of a document, in backticks or in blocks, that begin with a pattern; without those cut by `...`."""
    text = document.read_text()
    blocks = "".join(re.findall(r"^```[a-z]*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)).replace("\\\n", " ")
    found = [*re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)), *blocks.splitlines()]
    return [command for command in found if re.match(start, command) and not command.endswith("...")]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_the_documents_commands_have_their_options(document):
    """Files exist and have each option that is written; Hydra's and pytest's own options are theirs."""
    for command in commands_in(document, r"(python|bash) (?!-m pytest)[\w/.]+\.(py|sh)\b"):
        words = shlex.split(command, comments=True)
        places = [folder / words[1] for folder in (ROOT, document.parent)]
        assert any(place.is_file() for place in places), command
        program = next(place for place in places if place.is_file())
        if program.name != "run.py":
            options = [word.split("=")[0] for word in words[2:] if word.startswith("--")]
            assert all(option in program.read_text() or option == "--layout" for option in options), command


@pytest.mark.parametrize("name", ["tables.md", "protocols.md", "doctor.md"])
def test_the_jrt_commands_of_a_guide_parse(name, capsys):
    from jrt.cli import _parser

    for command in commands_in(ROOT / "docs" / name, r"jrt [a-z]+ \S"):
        try:
            _parser().parse_args(shlex.split(command, comments=True)[1:])
        except SystemExit:
            pytest.fail(f"{command}: {capsys.readouterr().err}")
