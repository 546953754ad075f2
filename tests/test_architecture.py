"""Rules of the code's structure: which part may import which, what `import jrt` loads, what no file may contain."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Each may import those before it.
ORDER = (
    "system",
    "config",
    "released.quirks",
    "ops",
    "mixers",
    "cache",
    "recurrent_cache",
    "model",
    "training",
    "short_prompts",
    "inputs",
    "packed_rows",
    "decoding",
    "configuration_jrt",
    "modeling_jrt",
    "foreign",
    "probe",
    "released",
    "checkpoints",
    "info",
    "doctor",
    "evaluate",
    "cli",
)
PROJECTS = ("train", "synthetics", "benchmarks", "kernels")
SLOW_TO_IMPORT = (
    "hydra",
    "lm_eval",
    "wandb",
    "triton",
    "fla",
    "ray",
    "pandas",
    "matplotlib",
    "datasets",
)


def imports_of(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def place_of(name: str) -> int | None:
    """The place in ORDER of a dotted name under `jrt`, or of the package that holds it."""
    parts = name.split(".")
    known = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((ORDER.index(part) for part in known if part in ORDER), None)


def part_of(file: Path) -> str:
    return file.relative_to(ROOT / "jrt").parts[0].removesuffix(".py")


def test_imports_inside_the_package_point_one_way():
    wrong = []
    for file in (ROOT / "jrt").rglob("*.py"):
        if part_of(file) in ("__init__", "__main__"):
            continue
        part = ".".join(file.relative_to(ROOT / "jrt").with_suffix("").parts)
        place = place_of(part)
        if file.name == "__init__.py" and place is None:
            continue
        assert place is not None, f"jrt/{part} has no place in the order of imports"
        for name in imports_of(file):
            if name.startswith("jrt."):
                target = place_of(name.removeprefix("jrt."))
                if target is not None and target > place:
                    wrong.append(f"{file.relative_to(ROOT)} imports {name}")
    assert not wrong


def test_the_guide_shows_the_parts_in_the_order_of_imports():
    guide = (ROOT / "docs" / "architecture.md").read_text().split("## The house")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in guide.splitlines() if line.startswith("| `")]
    shown = [name for row in rows for name in re.findall(r"`([\w/]+?)(?:/|\.py)`", row)]
    assert [name.replace("/", ".") for name in shown] == list(ORDER)


def test_rooms_can_be_surveyed():
    """At most twelve modules a package, at most 400 lines a module; ops has a module a kernel."""
    packages = [ROOT / "jrt", *(ROOT / "jrt").rglob("*/"), ROOT / "lm-eval-harness" / "jrt_recall"]
    for package in packages:
        if package.is_relative_to(ROOT / "jrt" / "ops"):
            continue
        modules = [file for file in package.glob("*.py") if not file.name.startswith("__")]
        assert len(modules) <= 12, f"{package.relative_to(ROOT)} has {len(modules)} modules"
        for file in modules:
            assert len(file.read_text().splitlines()) <= 400, file.relative_to(ROOT)


def test_only_evaluation_and_the_command_line_know_the_plugin():
    users = {
        part_of(file)
        for file in (ROOT / "jrt").rglob("*.py")
        if any(n.split(".")[0] == "jrt_recall" for n in imports_of(file))
    }
    assert users <= {"evaluate", "cli"}
    for file in (ROOT / "lm-eval-harness").rglob("*.py"):
        assert not any(name.split(".")[0] == "jrt" for name in imports_of(file)), file


def test_projects_around_the_package_do_not_import_each_other():
    for project in PROJECTS:
        for file in (ROOT / project).rglob("*.py"):
            others = {name.split(".")[0] for name in imports_of(file)} & set(PROJECTS) - {project}
            assert not others, f"{file.relative_to(ROOT)} imports {others}"
    for file in (ROOT / "kernels").rglob("*.py"):
        assert not any(name.split(".")[0] == "jrt" for name in imports_of(file)), file


def test_import_jrt_is_light():
    script = f"import jrt, sys; print([m for m in {(*SLOW_TO_IMPORT, 'torch._dynamo', 'jrt.modeling_jrt')} if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert loaded.strip() == "[]"


def test_a_configuration_brings_the_model_class_with_it(tmp_path):
    import jrt

    jrt.JRTForCausalLM(jrt.JRTConfig()).save_pretrained(tmp_path)
    load = f"AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})"
    script = f"import jrt; from transformers import AutoModelForCausalLM; print(type({load}).__name__)"
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "JRTForCausalLM"


def python_files() -> list[Path]:
    tracked = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in tracked.split()]


def test_no_blind_except_no_print_in_the_package_no_breakpoint():
    wrong = []
    for file in python_files():
        for node in ast.walk(ast.parse(file.read_text())):
            place = f"{file.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.ExceptHandler):
                name = getattr(node.type, "id", None)
                goes_on = not (isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None)
                if goes_on and (node.type is None or name in ("Exception", "BaseException")):
                    wrong.append(f"{place} catches everything")
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                in_package = file.is_relative_to(ROOT / "jrt") and part_of(file) != "cli"
                if node.func.id == "breakpoint" or (node.func.id == "print" and in_package):
                    wrong.append(f"{place} calls {node.func.id}")
    assert not wrong


def test_no_keyword_bags_in_ops_and_mixers():
    for folder in ("ops", "mixers"):
        for file in (ROOT / "jrt" / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.FunctionDef):
                    assert node.args.kwarg is None, f"{file.name}: {node.name} takes **{node.args.kwarg.arg}"


@pytest.mark.parametrize("pattern", [r"(?<![\w.])/(home|root|scratch|work)/\w", r"/tmp/bash_jobs"])
def test_no_machine_path_stands_in_the_tree(pattern):
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    text = [
        ROOT / name
        for name in listed
        if Path(name).suffix in (".py", ".md", ".json", ".toml", ".yaml", ".sh", ".cu", ".cuh", ".cpp")
    ]
    wrong = [
        file.name for file in text if file != Path(__file__) and re.search(pattern, file.read_text(errors="replace"))
    ]
    assert not wrong


def test_no_folder_stands_at_the_top_level_by_mistake():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    folders = {name.partition("/")[0] for name in listed.stdout.splitlines() if "/" in name}
    readme = (ROOT / "README.md").read_text()
    told = set(re.findall(r"`([\w.-]+)/`", readme.partition("## Layout")[2].partition("## Figures")[0]))
    assert folders - {".ci", "docs", "tests"} == told
