"""The scripts that have the names of the original repository's scripts, run as users type them."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from jrt_recall import fixtures
from random_mamba import save_random_mamba, save_random_mamba2
from random_models import save_random_model

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = [
    "prompt_scripts/run_jrt_prompt_hf.sh",
    "prompt_scripts/run_jrt_prompt_hazy.sh",
    "architecture_scripts/run_jrt_rnn.sh",
    "architecture_scripts/super_glue.sh",
    "prompt_scripts/few_shot.sh",
    "architecture_scripts/short_prompts.sh",
    "architecture_scripts/super_glue_tables.sh",
]


def typed(*words: str, limit: int = 300, **environment: str) -> subprocess.CompletedProcess:
    """Runs a command with this Python's programs first, `jrt` among them."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    search = os.pathsep.join([str(ROOT), str(ROOT / "lm-eval-harness")])
    env = {**os.environ, "PATH": path, "PYTHONPATH": search, "HF_HUB_OFFLINE": "1", **environment}
    return subprocess.run(words, capture_output=True, text=True, env=env, check=False, timeout=limit)


@pytest.fixture
def model(tmp_path) -> str:
    return save_random_model(tmp_path / "random-jrt", train_length=1024)


RELEASED = {
    "prompt_scripts/run_jrt_prompt_hazy.sh": "hazyresearch/ based-1b-50b mamba-1b-50b attn-1b-50bn",
    "architecture_scripts/run_jrt_rnn.sh": "hazyresearch/ based-1b-50b mamba-1b-50b attn-1b-50bn JRT-1B-50B "
    "based-360M-30B mamba-360M-30B attn-360M-30B JRT-360M-30B",
    "prompt_scripts/run_jrt_prompt_hf.sh": "state-spaces/ mamba-130m mamba-370m mamba-1.4b mamba-2.8b mamba2-130m "
    "mamba2-370m mamba2-1.3b mamba2-2.7b",
}
"""The models in the release's scripts of the same names (HazyResearch/prefix-linear-attention at 7490f22): owner, then
names. Two of fla-hub's are in the last script."""


@pytest.mark.parametrize("script", RELEASED)
def test_the_models_are_those_of_the_releases_script(script, tmp_path):
    owner, *names = RELEASED[script].split()
    wanted = {owner + name for name in names}
    if script.endswith("hf.sh"):
        wanted |= {"fla-hub/gla-1.3B-100B", "fla-hub/gla-2.7B-100B"}
    done = typed("bash", str(ROOT / script), str(tmp_path / "out"), "--dry-run")
    words = shlex.split(done.stdout.splitlines()[0])
    assert set(words[words.index("--model") + 1].split(",")) == wanted


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_dry_run_prints_commands_and_runs_none(script, tmp_path):
    done = typed("bash", str(ROOT / script), str(tmp_path / "out"), "--limit", "3", "--models", "a/b", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "jrt " in done.stdout and "--limit 3" in done.stdout and "a/b" in done.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_workers_are_passed_on(script, tmp_path):
    done = typed("bash", str(ROOT / script), str(tmp_path / "out"), "--models", "a/b", "--workers", "2", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "super_glue" in script or "--workers 2" in done.stdout


@pytest.mark.parametrize("script", [script for script in SCRIPTS if "super_glue" in script])
def test_a_models_folder_can_have_a_space(script, tmp_path):
    done = typed("bash", str(ROOT / script), str(tmp_path / "my runs"), "--models", "my models/a,,b/c", "--dry-run")
    lines = [shlex.split(line) for line in done.stdout.splitlines() if " lm-eval " in line]
    found = {words[words.index("--model_args") + 1] for words in lines}
    assert found == {"pretrained=my models/a", "pretrained=b/c"}


def test_an_extra_argument_without_a_value_is_one_line(tmp_path):
    script = str(ROOT / "architecture_scripts" / "super_glue.sh")
    done = typed("bash", script, str(tmp_path / "out"), "--dry-run", "--", "--model_args-extra")
    assert done.returncode == 2 and done.stderr == "super_glue.sh: --model_args-extra needs a value\n"


@pytest.mark.slow
def test_table_4_end_to_end(model, shared, tmp_path):
    mirror = fixtures.write(tmp_path / "mirror", count=1)
    shutil.copytree(shared / "gpt2", mirror / "gpt2")
    script = str(ROOT / "architecture_scripts" / "short_prompts.sh")
    options = ["--models", model, "--limit", "1", "--device", "cpu"]
    done = typed("bash", script, str(tmp_path / "runs"), *options, JRT_DATA=str(mirror))
    assert done.returncode == 0, done.stderr
    table = done.stdout[done.stdout.index("Table 4:") :].split("recall_")[0]
    assert [rule for rule in ("pad", "repeat", "iterate") if f"[{rule}]" in table] == ["pad", "repeat", "iterate"]
    assert "missing" not in table


@pytest.mark.parametrize("script", SCRIPTS)
def test_wrong_arguments_are_one_line(script, tmp_path):
    wrong = [["--nope"], ["--limit"], ["--models", "--dry-run"]]
    wrong += [[name, value] for name in ("--limit", "--workers") for value in ("0", "-1", "1.5", "x")]
    for words in ([], *([str(tmp_path / "out"), *words] for words in wrong)):
        done = typed("bash", str(ROOT / script), *words)
        assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done
    assert not (tmp_path / "out").exists()


def test_a_model_that_does_not_exist_leaves_the_others_their_table(shared, tmp_path):
    mirror = fixtures.write(tmp_path / "mirror", count=1)
    shutil.copytree(shared / "gpt2", mirror / "gpt2")
    script = str(ROOT / "prompt_scripts" / "run_jrt_prompt_hazy.sh")
    options = ["--models", f"mini-based,{tmp_path / 'none'}", "--limit", "1", "--device", "cpu"]
    done = typed("bash", script, str(tmp_path / "runs"), *options, JRT_DATA=str(mirror))
    assert done.returncode == 1, done.stderr
    table = done.stdout[done.stdout.index("Table 1:") :].split("recall_")[0]
    grid, _, told = table.partition("missing: ")
    assert "mini-based" in grid and "none" not in grid
    assert f"{tmp_path / 'none'}: could not be run: unknown model" in told


def test_table_2_end_to_end(model, shared, tmp_path):
    mirror = fixtures.write(tmp_path / "mirror", count=1)
    shutil.copytree(shared / "gpt2", mirror / "gpt2")
    script = str(ROOT / "architecture_scripts" / "run_jrt_rnn.sh")
    options = ["--models", model, "--limit", "1", "--device", "cpu"]
    done = typed("bash", script, str(tmp_path / "runs"), *options, JRT_DATA=str(mirror))
    assert done.returncode == 0, done.stderr
    header = done.stdout[done.stdout.index("Table 2:") :].splitlines()[3]
    assert header.split()[:3] == ["model", "FDA", "512"] and header.endswith("DROP full  average")


@pytest.mark.slow
def test_table_scripts_read_real_passages(model, shared, tmp_path):
    mirror = tmp_path / "mirror"
    shutil.copytree(shared / "gpt2", mirror / "gpt2")
    options = [
        "--models",
        model,
        "--limit",
        "2",
        "--device",
        "cpu",
        "--tasks",
        "qa_squad,qa_nq,qa_triviaqa,qa_drop,qa_fda",
    ]
    for script, protocol in (
        ("prompt_scripts/run_jrt_prompt_hf.sh", "table1"),
        ("architecture_scripts/run_jrt_rnn.sh", "table2-nq"),
    ):
        environment = {"JRT_PASSAGES": str(shared / "qa"), "JRT_DATA": str(mirror)}
        done = typed("bash", str(ROOT / script), str(tmp_path / protocol), *options, **environment)
        assert done.returncode == 0, done.stderr
        assert f"qa_nq | jrt-{protocol} v2" in done.stdout and "(published)" not in done.stdout


def test_super_glue_end_to_end(model, tmp_path):
    mirror = fixtures.write_super_glue(tmp_path / "mirror", count=3)
    script = str(ROOT / "architecture_scripts" / "super_glue.sh")
    options = ["--models", model, "--limit", "2", "--device", "cpu", "--", "--num_fewshot", "1"]
    done = typed("bash", script, str(tmp_path / "runs"), *options, JRT_DATA=str(mirror))
    assert done.returncode == 0, done.stderr
    table = done.stdout[done.stdout.index("Table 8") :].splitlines()
    assert table[3].split()[:2] == ["model", "shots"] and "random-jrt, first 2" in table[5]
    cells = table[5].split("first 2")[1].split()
    assert cells[0] == "1" and len(cells) == 11 and not set(cells) & {"-"}
    assert all(float(cell) in (0.0, 50.0, 100.0) for cell in cells[1:3])


@pytest.mark.slow
def test_stand_ins_of_mamba_and_mamba_2_go_through_the_scripts_of_architectures(shared, tmp_path):
    """Folders in the release's layout of Mamba and in the authors' of Mamba-2, random weights, no network. Tables 8 and 9 hold
    models of the release only, so Mamba-2 is refused there in one line."""
    mirror = fixtures.write_super_glue(fixtures.write(tmp_path / "mirror", count=1))
    shutil.copytree(shared / "gpt2", mirror / "gpt2")
    mamba = str(save_random_mamba(tmp_path / "mamba-random", shared / "gpt2"))
    mamba2 = str(save_random_mamba2(tmp_path / "mamba2-random", shared / "gpt2"))

    def ran(script: str, models: str, *more: str) -> subprocess.CompletedProcess:
        words = ["bash", str(ROOT / "architecture_scripts" / script), str(tmp_path / script), "--models", models]
        return typed(*words, "--limit", "1", "--device", "cpu", *more, JRT_DATA=str(mirror), limit=1200)

    done = ran("run_jrt_rnn.sh", f"{mamba},{mamba2}")
    assert done.returncode == 0, done.stderr[-2000:]
    _, _, first, second, after, *_ = done.stdout[done.stdout.index("Table 2:") :].splitlines()[3:]
    for line, model in ((first, mamba), (second, mamba2)):
        name, *cells = line.split()
        assert name == model and len(cells) == 10 and set(cells) <= {"0.0", "100.0"} | {cells[-1]}
    assert not after and "missing" not in done.stdout

    done = ran("super_glue_tables.sh", mamba)
    assert done.returncode == 0, done.stderr[-2000:]
    for title in ("Table 8", "Table 9"):
        table = done.stdout[done.stdout.index(title) :].splitlines()[5:8]
        assert [line.split("first 1")[1].split()[0] for line in table] == ["0", "1", "5"]
        assert all("mamba-random" in line and "-" not in line.split("first 1")[1].split() for line in table)

    done = ran("super_glue.sh", mamba2, "--tasks", "cb")
    assert done.returncode == 2 and "is no model of this project" in done.stderr.splitlines()[-1]


def test_table_1_end_to_end_and_the_notebook_of_its_runs(model, shared, tmp_path):
    import nbformat
    from nbclient import NotebookClient

    mirror = fixtures.write(tmp_path / "mirror", count=2)
    shutil.copytree(shared / "gpt2", mirror / "gpt2")
    runs = tmp_path / "runs"
    script = str(ROOT / "prompt_scripts" / "run_jrt_prompt_hazy.sh")
    done = typed(
        "bash",
        script,
        str(runs),
        "--models",
        model,
        "--limit",
        "2",
        "--batch-size",
        "2",
        "--device",
        "cpu",
        JRT_DATA=str(mirror),
    )
    assert done.returncode == 0, done.stderr
    assert "Table 1" in done.stdout and "TriviaQA twice" in done.stdout
    assert (runs / "report.html").is_file() and (runs / "table1" / "results.json").is_file()

    notebook = nbformat.read(ROOT / "architecture_scripts" / "collect_results.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # kept without results
    os.environ["JRT_RUNS"] = str(runs)
    try:
        NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    finally:
        del os.environ["JRT_RUNS"]
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "Table 1" in printed and "jrt-table1 v1" in printed


@pytest.mark.slow
def test_tables_13_and_14_end_to_end(shared, tmp_path):
    """Two examples before each question come from the other documents, so a mirror needs three of each task."""
    mirror = fixtures.write(tmp_path / "mirror", count=3)
    shutil.copytree(shared / "gpt2", mirror / "gpt2")
    mamba = str(save_random_mamba(tmp_path / "mamba-random", shared / "gpt2"))
    script = str(ROOT / "prompt_scripts" / "few_shot.sh")
    options = ["--models", mamba, "--limit", "3", "--device", "cpu"]
    done = typed("bash", script, str(tmp_path / "runs"), *options, JRT_DATA=str(mirror))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "mamba-random" in done.stdout[done.stdout.index("Table 14") :] and "missing" not in done.stdout
    done = typed("jrt", "report", str(tmp_path / "runs"), "--layout", "table13")
    assert done.returncode == 0 and "mamba-random" in done.stdout[done.stdout.index("Table 13") :], done.stderr
