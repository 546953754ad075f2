"""Records where a result comes from: versions of packages, commit, device, and a hash of the source code."""

import hashlib
import os
import platform
import shlex
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType

import torch

PACKAGES = (
    "jrt",
    "torch",
    "triton",
    "transformers",
    "tokenizers",
    "lm-eval",
    "datasets",
    "numpy",
    "flash-linear-attention",
    "flash-attn",
    "causal-conv1d",
    "mamba-ssm",
)


def versions() -> dict[str, str]:
    """Versions of Python, of the platform, and of those PACKAGES that are installed."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def command(*words: str) -> str:
    """A Python command as it was typed, without this machine's folders: of an absolute path the last part is kept."""
    return shlex.join(["python", *(Path(word).name if Path(word).is_absolute() else word for word in words)])


def device_name(kind: str = "cuda") -> str:
    """The name of the GPU if there is one, else of the processor with PyTorch's number of threads.

    kind: a device, such as "cuda:0"; "cpu" gives the processor's name beside a GPU too."""
    if torch.cuda.is_available() and kind != "cpu":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{model}, {torch.get_num_threads()} threads"


def commit(folder: Path) -> str:
    """The git commit of `folder`, followed by "+changes" if tracked files differ from it; "unknown" outside a checkout.

    If the environment variable JRT_COMMIT is set, its value is returned: it names the commit of a copy without git."""
    if told := os.environ.get("JRT_COMMIT"):
        return told
    head, changes = (
        _git(folder, *words) for words in (("rev-parse", "--short", "HEAD"), ("status", "--porcelain", "-uno"))
    )
    if head is None:
        return "unknown"
    return head + ("+changes" if changes else "")


def code_sha256(*packages: ModuleType) -> str:
    """sha256 over the paths and contents of all .py and .yaml files of the packages: it identifies the code that
    ran."""
    digest = hashlib.sha256()
    for package in packages:
        root = Path(str(package.__file__)).parent
        for file in sorted(file for kind in ("*.py", "*.yaml") for file in root.rglob(kind)):
            digest.update(f"{package.__name__}/{file.relative_to(root).as_posix()}\n".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _git(folder: Path, *words: str) -> str | None:
    """The output of a git command; None if it fails or git is not installed."""
    try:
        done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
