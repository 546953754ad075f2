"""Where a number comes from: versions, commit, device, and the sources that ran."""

import hashlib
import os
import platform
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
)


def versions() -> dict[str, str]:
    """Python, the platform, and those of PACKAGES that are installed."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def device_name() -> str:
    """The GPU, or the processor and how many threads PyTorch uses of it."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{model}, {torch.get_num_threads()} threads"


def commit(folder: Path) -> str:
    """The commit of the checkout that holds `folder`, "+changes" where files differ from it; "unknown" outside a checkout.

    The environment variable JRT_COMMIT comes first: it names the commit of a copy on another machine."""
    if told := os.environ.get("JRT_COMMIT"):
        return told
    head, changes = (
        _git(folder, *words) for words in (("rev-parse", "--short", "HEAD"), ("status", "--porcelain", "-uno"))
    )
    if head is None:
        return "unknown"
    return head + ("+changes" if changes else "")


def code_sha256(*packages: ModuleType) -> str:
    """sha256 over the Python and task files of packages, by their paths within them: it names the very sources that ran."""
    digest = hashlib.sha256()
    for package in packages:
        root = Path(str(package.__file__)).parent
        for file in sorted(file for kind in ("*.py", "*.yaml") for file in root.rglob(kind)):
            digest.update(f"{package.__name__}/{file.relative_to(root).as_posix()}\n".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _git(folder: Path, *words: str) -> str | None:
    """What a git command prints; None where it fails or git is not installed."""
    try:
        done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
