"""The training text of the mini models: what is kept out of it, and that its files agree with their manifest."""

import json
from pathlib import Path

import numpy as np
import pytest
from jrt_recall.api_text import render
from jrt_recall.tokenizers import shipped_tokenizer

from train.corpus import Document, Filter, build, held_out_lines, is_validation
from train.tokenizer import encode

MODULE = '''"""{topic}: a module of things."""

def {name}_first(alpha_{name}, beta=None):
    """Opens the {topic} at the place that alpha names, and says so."""

def {name}_second(gamma_{name}, *, delta):
    """Closes the {topic} again, if it was open at all before this."""
'''
EVALUATED = '''"""Evaluation text of a standard library that nobody may learn."""

def secret_function(one_argument, another_argument, keyword=None):
    """Does what only the evaluation text says that it does."""

def second_secret(first_argument, last_argument):
    """Does what the evaluation text says of it, and nothing that another text says."""
'''


def package(root: Path, name: str, **modules: str) -> Path:
    folder = root / name
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nLicense: MIT\n")
    for module, text in modules.items():
        (folder / f"{module}.py").write_text(text)
    return folder


@pytest.fixture
def library(tmp_path) -> Path:
    folder = tmp_path / "library"
    folder.mkdir()
    (folder / "secret.py").write_text(EVALUATED)
    return folder


def test_copies_of_the_evaluation_text_stay_out(library):
    keep = Filter(held_out_lines([library]))
    assert keep(Document("backport", "api", render(EVALUATED))) is None
    shared = "Does what only the evaluation text says that it does."
    own = "\n".join(
        f"function_{i}(argument_{i}, other_{i})\nThis is sentence number {i}, of enough length." for i in range(9)
    )
    kept = keep(Document("other", "api", f"{own}\n{shared}"))
    assert shared not in kept.text and "function_8(argument_8, other_8)" in kept.text
    assert keep.counts["documents like the evaluation text"] == 1
    assert keep.counts["lines of 50+ characters shared with the evaluation text"] == 1


def test_near_copies_and_documents_without_arguments_stay_out():
    keep = Filter(set())
    text = render(MODULE.format(topic="door", name="door"))
    assert keep(Document("first", "api", text)) is not None
    assert keep(Document("second", "api", text + "\nfurther(text)")) is None
    assert keep(Document("third", "prose", "A page about doors.\nopen()\nNothing is asked here.")) is None
    assert keep.counts == {
        "documents like earlier ones": 1,
        "documents without a function's arguments": 1,
    } | {name: 0 for name in keep.counts if name.startswith("lines")}


def test_the_end_of_a_document_cannot_stand_in_its_text():
    tokenizer = shipped_tokenizer()
    tokens = encode([f"before{tokenizer.eos_token}after(x, y)"], tokenizer)
    assert (tokens == tokenizer.eos_token_id).nonzero()[0].tolist() == [len(tokens) - 1]


def test_a_corpus_is_what_its_manifest_says(tmp_path, library):
    names = [f"package{i}" for i in range(60)]
    folders = [package(tmp_path, name, things=MODULE.format(topic=name, name=name), copied=EVALUATED) for name in names]
    output = tmp_path / "corpus"
    assets = Path(render.__code__.co_filename).parent / "assets"
    manifest = build(folders, [library], output, assets, budget=10_000, processes=1)
    assert manifest == json.loads((output / "manifest.json").read_text())
    assert manifest["dropped"]["documents like the evaluation text"] == len(names)
    split = {name: "validation" if is_validation(name) else "train" for name in names}
    assert {row["name"]: row["split"] for row in manifest["packages"]} == split
    assert set(split.values()) == {"train", "validation"}
    tokenizer = shipped_tokenizer()
    for part, facts in manifest["splits"].items():
        tokens = np.fromfile(output / f"{part}.bin", np.uint16)
        text = tokenizer.decode(tokens.tolist(), skip_special_tokens=False)
        assert len(tokens) == facts["tokens"] and "secret_function" not in text
        mine = {name for name in names if split[name] == part}
        assert facts["documents"] == len(mine) == text.count(tokenizer.eos_token)
        assert all(f"{name}_first(alpha_{name}, beta=None)" in text for name in mine)
