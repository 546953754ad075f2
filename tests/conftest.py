"""Shared fixtures: the folders of the golden vectors (stored outputs of the released code) and of the real passages,
which are both optional, and a small training text."""

import os
from pathlib import Path

import pytest

# One thread a process, before torch is imported: tests run side by side, and a process with threads cannot be forked.
os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent


def pytest_configure() -> None:
    """Prepares Triton's interpreter, if this process is to run kernels in it."""
    import interpreter

    if interpreter.INTERPRETED:
        interpreter.quicken()


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with golden/, qa/ and gpt2/: not part of the project, so tests that need it skip where it is absent."""
    folder = Path(os.environ.get("JRT_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no golden vectors or passages at {folder} (set JRT_SHARED)")
    return folder


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory, shared) -> Path:
    """Folder of a random one-layer GPT-2 with the real vocabulary."""
    import torch
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=2048, initializer_range=0.5)
    GPT2LMHeadModel(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(shared / "gpt2").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """Folder of a small training text, as `data=library` makes it."""
    from train.data.library import make_library_text

    folder = tmp_path_factory.mktemp("text") / "library"
    make_library_text(folder)
    return folder


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Every test, its fixtures included, draws the same random numbers in every run."""
    import torch

    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """GPU tests skip by themselves where there is no GPU, with the reason."""
    import torch

    available = torch.cuda.is_available()
    hopper = available and torch.cuda.get_device_capability() >= (9, 0)
    for item in items:
        if item.get_closest_marker("hopper") and not hopper:
            item.add_marker(pytest.mark.skip(reason="needs a Hopper GPU (compute capability 9.0)"))
        elif item.get_closest_marker("gpu") and not available:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
