"""Takes the text out of an installed package, for the training corpus of the mini models.

There are three kinds of text. "api": a page for each module (see `jrt_recall.api_text`). "service": pages made from
botocore's descriptions of web services. "prose": docstrings and documents. A package is a folder made by ``pip install
--target FOLDER --no-deps NAME``; nothing in it is imported. Copies and near-copies are not removed here but in
``corpus.py``."""

import ast
import email
import gzip
import html
import json
import re
from collections.abc import Iterator
from pathlib import Path

from jrt_recall import api_text

SKIPPED_FOLDERS = frozenset(
    (
        "test",
        "tests",
        "testing",
        "test_data",
        "_test",
        "idle_test",
        "fixtures",
        "conftest",
        "benchmarks",
        "bench",
        "examples",
        "_vendor",
        "vendor",
        "vendored",
        "vendored_packages",
        "_vendored",
        "third_party",
        "externals",
        "_externals",
        "extern",
        "_extern",
        "packages",
        "site-packages",
        "node_modules",
        "backports",
        "compat",
        "_compat",
        "migrations",
        "locale",
        "locales",
    )
)
LONGEST_SOURCE = 400_000  # bytes; larger modules are mostly tables of data
LONGEST_TEXT = 60_000  # characters of one document
SHORTEST_TEXT = 200  # characters; shorter documents are left out
PROSE_SHARE = 4  # the full docstrings of about one in four modules are kept as prose
DOCUMENT_SUFFIXES = {".rst", ".md"}


def texts(package: Path) -> Iterator[tuple[str, str]]:
    """Yields (kind, text) for all documents of a package folder, in a fixed order. Unreadable files are left out."""
    for path in sorted(package.rglob("*")):
        parts = path.relative_to(package).parts
        if SKIPPED_FOLDERS & set(parts[:-1]) or path.name.startswith(("test_", "conftest")):
            continue
        if path.suffix == ".py" and path.stat().st_size < LONGEST_SOURCE:
            yield from _module_texts(path, keep_prose=sum(path.name.encode()) % PROSE_SHARE == 0)
        elif path.name == "service-2.json.gz":
            yield from _service_texts(path)
        elif path.name == "METADATA" or (path.suffix in DOCUMENT_SUFFIXES and "dist-info" not in str(parts)):
            yield from _document_texts(path)


def metadata(package: Path) -> dict[str, str]:
    """Returns name, version and licence of the package in a folder. Raises ValueError if the folder holds none."""
    files = sorted(package.glob("*.dist-info/METADATA"))
    if not files:
        raise ValueError(f"{package} has no *.dist-info/METADATA: expected a folder made by `pip install --target`")
    fields = email.message_from_string(files[0].read_text(encoding="utf-8", errors="replace"))
    classifiers = [c.split(" :: ")[-1] for c in fields.get_all("Classifier", []) if c.startswith("License ::")]
    licence = (
        fields.get("License-Expression") or "; ".join(classifiers) or fields.get("License", "").split("\n")[0][:60]
    )
    return {"name": str(fields["Name"]), "version": str(fields["Version"]), "license": str(licence)}


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _bounded(kind: str, text: str) -> Iterator[tuple[str, str]]:
    if len(text) >= SHORTEST_TEXT:
        yield kind, text[:LONGEST_TEXT].rsplit("\n", 1)[0] if len(text) > LONGEST_TEXT else text


def _module_texts(path: Path, keep_prose: bool) -> Iterator[tuple[str, str]]:
    source = _read(path)
    if '"""' not in source and "'''" not in source and source.count("def ") < 4:
        return
    try:
        page = api_text.render(source)
    except ValueError:
        return
    if len(api_text.facts(page)) >= 2:
        yield from _bounded("api", page)
    if keep_prose:
        yield from _bounded("prose", _long_docstrings(source))


def _long_docstrings(source: str) -> str:
    """All docstrings of a module without their first paragraphs, which the API page already shows."""
    definitions = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = (ast.get_docstring(node) for node in ast.walk(ast.parse(source)) if isinstance(node, definitions))
    rest = (re.split(r"\n\s*\n", text, maxsplit=1)[1:] for text in docstrings if text)
    return "\n".join(clean_lines("\n".join(part for parts in rest for part in parts)))


def clean_lines(text: str) -> list[str]:
    """The lines of a text with runs of spaces collapsed, without empty lines and lines of signs only."""
    lines = (" ".join(line.split()) for line in text.split("\n"))
    return [line for line in lines if line and not re.fullmatch(r"[\W_]+", line)]


def _document_texts(path: Path) -> Iterator[tuple[str, str]]:
    text = _read(path)
    if path.name == "METADATA":
        text = text.partition("\n\n")[2]
    yield from _bounded("prose", "\n".join(clean_lines(text)))


def _service_texts(path: Path) -> Iterator[tuple[str, str]]:
    """Pages of one service description of botocore: operations first, then structures.

    Of several versions of a description only the newest gives pages."""
    versions = sorted(p.parent.name for p in path.parent.parent.glob("*/service-2.json.gz"))
    if path.parent.name != versions[-1]:
        return
    service = json.loads(gzip.decompress(path.read_bytes()))
    shapes = service["shapes"]
    head = [service["metadata"]["serviceFullName"], *clean_lines(_plain(service.get("documentation", "")))]
    operations = service["operations"].items()
    lines = [
        line
        for name, operation in operations
        for line in _entry(_snake(name), shapes.get(operation.get("input", {}).get("shape"), {}), operation)
    ]
    structures = [
        line
        for name, shape in shapes.items()
        if shape["type"] == "structure" and shape.get("members") and shape.get("documentation")
        for line in _entry(name, shape, shape)
    ]
    for number, body in enumerate(_pieces(lines) + _pieces(structures)):
        yield from _bounded("service", "\n".join((head if number == 0 else head[:1]) + body))


def _entry(name: str, shape: dict, described: dict) -> list[str]:
    required = set(shape.get("required", []))
    members = sorted(shape.get("members", {}), key=lambda member: member not in required)
    arguments = ", ".join(_snake(m) if m in required else f"{_snake(m)}=None" for m in members[:8])
    first = " ".join(_plain(described.get("documentation", "")).split("\n", 1)[0].split())
    return [api_text.heading(name, arguments), *([first[:400]] if first else [])]


def _pieces(lines: list[str], size: int = 300) -> list[list[str]]:
    return [lines[start : start + size] for start in range(0, len(lines), size)]


def _plain(markup: str) -> str:
    """Turns HTML into text. The end of a paragraph or list item ends a line."""
    broken = re.sub(r"</p>|</li>|<br */?>", "\n", markup)
    return html.unescape(re.sub(r"<[^>]+>", "", broken)).strip()


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower().replace("-", "_")
