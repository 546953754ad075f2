"""Makes the training text of the mini models from installed packages: ``python train/corpus.py --help``.

    uv pip install --no-deps --target packages/NAME NAME     # once for every package that corpus_manifest.json lists
    python train/corpus.py packages --output data/api-text

The models must not train on the text that evaluates them. That text is the standard library of every Python in
``--held-out``. Four things are removed from the training text: documents that share much with the evaluation text
(copies, backports); every line of 30 or more characters that is also in the evaluation text; repeated documents and
near-copies among the packages; and documents without a function that has arguments, because training windows are drawn
around such functions.

Three files are written. ``train.bin`` and ``validation.bin`` hold uint16 tokens; each document ends with id 0, and the
validation text is from packages that are not in the training text. ``manifest.json`` has the packages, their versions
and licences, counts and hashes."""

import argparse
import hashlib
import json
import logging
import multiprocessing
import platform
import random
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

# The package is found wherever this file is started from.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from jrt_recall import api_text  # noqa: E402
from tqdm import tqdm  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

from train import package_text  # noqa: E402
from train.tokenizer import encode, train_tokenizer  # noqa: E402

log = logging.getLogger(__name__)

LONG_LINE = 30  # characters; a line this long or longer is dropped if the evaluation text has it too
REPORTED_LINE = 50  # characters; shared lines this long or longer are counted separately in the manifest
COPY_SHARE = 0.2  # a document with this share of its long lines in the evaluation text is a copy of it
NEAR_COPY_SHARE = 0.6  # a document with more than this share of its long lines in earlier documents is a near-copy
CHARACTERS_PER_PACKAGE = {"api": 6_000_000, "service": 8_000_000, "prose": 600_000}  # at most, by kind of text
VALIDATION_ONE_IN = 40  # one package in so many is validation text
COPIES_OF_THE_STANDARD_LIBRARY = frozenset(
    (
        "typing-extensions",
        "importlib-metadata",
        "importlib-resources",
        "six",
        "future",
        "zipp",
        "brython",
        "transcrypt",
        "pypy",
        "jython",
        "argparse",
        "enum34",
        "futures",
        "pathlib2",
        "configparser",
        "dataclasses",
        "contextlib2",
        "asyncio-backport",
        "stdlib-list",
        "typeshed",
        "mypy",
        "jedi",
        "pytype",
        "pyright",
        "basedpyright",
        "parso",
    )
)


@dataclass
class Document:
    package: str
    kind: str
    text: str


@dataclass
class Filter:
    """Removes evaluation text and repetitions from documents. ``counts`` has how much was removed, by reason."""

    held_out: set[str]
    seen: set[int] = field(default_factory=set)
    counts: Counter = field(default_factory=Counter)

    def __call__(self, document: Document) -> Document | None:
        if not any(fact.arguments for fact in api_text.facts(document.text)):
            return self._drop("documents without a function's arguments")
        lines = document.text.split("\n")
        long = [line for line in lines if len(line) >= LONG_LINE]
        shared = sum(line in self.held_out for line in long)
        if shared >= 3 and shared >= COPY_SHARE * len(long):
            return self._drop("documents like the evaluation text")
        hashes = [hash(line) for line in long]
        if sum(h in self.seen for h in hashes) > NEAR_COPY_SHARE * len(long):
            return self._drop("documents like earlier ones")
        self.seen.update(hashes)
        self.counts[f"lines of {REPORTED_LINE}+ characters shared with the evaluation text"] += sum(
            len(line) >= REPORTED_LINE and line in self.held_out for line in long
        )
        self.counts[f"lines of {LONG_LINE}+ characters shared with the evaluation text"] += shared
        kept = [line for line in lines if len(line) < LONG_LINE or line not in self.held_out]
        return Document(document.package, document.kind, "\n".join(kept))

    def _drop(self, reason: str) -> None:
        self.counts[reason] += 1


def held_out_lines(folders: Iterable[Path]) -> set[str]:
    """Returns every line of the API pages of these standard libraries, without their tests and installed packages."""
    lines: set[str] = set()
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            if {"site-packages", "dist-packages", "test", "tests", "idle_test"} & set(path.relative_to(folder).parts):
                continue
            try:
                lines.update(api_text.render(path.read_text(encoding="utf-8", errors="replace")).split("\n"))
            except ValueError:
                continue
    return lines


def package_documents(folder: Path) -> list[Document]:
    """Returns documents of a package, drawn at random, at most CHARACTERS_PER_PACKAGE characters of each kind."""
    by_kind: dict[str, list[str]] = {}
    for kind, text in package_text.texts(folder):
        by_kind.setdefault(kind, []).append(text)
    chosen = []
    for kind, found in by_kind.items():
        random.Random(folder.name).shuffle(found)
        room = CHARACTERS_PER_PACKAGE[kind]
        for text in found:
            room -= len(text)
            if room >= 0:
                chosen.append(Document(folder.name, kind, text))
    return chosen


def read_packages(folders: list[Path], processes: int) -> Iterator[Document]:
    with multiprocessing.Pool(processes) as pool:
        found = pool.imap(package_documents, folders)
        for documents in tqdm(found, total=len(folders), desc="packages", unit="package"):
            yield from documents


def is_validation(package: str) -> bool:
    return int(hashlib.sha256(package.encode()).hexdigest(), 16) % VALIDATION_ONE_IN == 0


def build(
    folders: list[Path], held_out: list[Path], output: Path, tokenizer_folder: Path, budget: int, processes: int
) -> dict:
    """Writes the corpus and returns its manifest.

    Args:
        folders: package folders.
        held_out: standard libraries whose text is kept out.
        output: where the corpus is written.
        tokenizer_folder: the tokenizer. If the folder has none, one is trained on the documents and saved there.
        budget: most training tokens.
        processes: that read the packages.
    """
    keep = Filter(held_out_lines(held_out))
    documents = [kept for document in read_packages(folders, processes) if (kept := keep(document))]
    random.Random(1).shuffle(documents)
    if not (tokenizer_folder / "tokenizer.json").is_file():
        sample = (document.text for document in documents[: len(documents) // 3] if not is_validation(document.package))
        train_tokenizer(sample).save_pretrained(tokenizer_folder)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    splits = {
        "train": encode([d.text for d in documents if not is_validation(d.package)], tokenizer, budget),
        "validation": encode([d.text for d in documents if is_validation(d.package)], tokenizer, budget // 20),
    }
    output.mkdir(parents=True, exist_ok=True)
    for name, tokens in splits.items():
        tokens.tofile(output / f"{name}.bin")
    manifest = {
        "command": " ".join(["python", "train/corpus.py", *(Path(a).name if "/" in a else a for a in sys.argv[1:])]),
        "python": platform.python_version(),
        "evaluation text": [folder.name for folder in held_out],
        "tokenizer sha256": _sha256((tokenizer_folder / "tokenizer.json").read_bytes()),
        "splits": {
            name: {
                "tokens": len(tokens),
                "documents": int((tokens == tokenizer.eos_token_id).sum()),
                "sha256": _sha256(tokens.tobytes()),
            }
            for name, tokens in splits.items()
        },
        "documents by kind": dict(sorted(Counter(d.kind for d in documents).items())),
        "characters by kind": dict(sorted(_total(documents, "kind").items())),
        "dropped": dict(sorted(keep.counts.items())),
        "packages": _package_rows(folders, documents),
    }
    (output / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _total(documents: list[Document], attribute: str) -> Counter:
    total: Counter = Counter()
    for document in documents:
        total[getattr(document, attribute)] += len(document.text)
    return total


def _package_rows(folders: list[Path], documents: list[Document]) -> list[dict]:
    characters = _total(documents, "package")
    return [
        {
            **package_text.metadata(folder),
            "characters": characters[folder.name],
            "split": "validation" if is_validation(folder.name) else "train",
        }
        for folder in folders
    ]


def _package_folders(root: Path) -> list[Path]:
    folders = [
        f for f in sorted(root.iterdir()) if f.name not in COPIES_OF_THE_STANDARD_LIBRARY and any(f.glob("*.dist-info"))
    ]
    if not folders:
        raise ValueError(
            f"{root} holds no package folders: make them with `uv pip install --no-deps --target {root}/NAME NAME`"
        )
    return folders


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path, help="folder with one folder per installed package")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, help="vocabulary folder (default: the one that jrt_recall ships)")
    parser.add_argument(
        "--held-out", type=Path, nargs="*", default=[Path(sysconfig.get_path("stdlib"))], help="standard libraries"
    )
    parser.add_argument("--tokens", type=int, default=60_000_000, help="at most this many training tokens")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    tokenizer_folder = options.tokenizer or Path(api_text.__file__).parent / "assets"
    try:
        folders = _package_folders(options.packages)
        manifest = build(folders, options.held_out, options.output, tokenizer_folder, options.tokens, options.processes)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    log.info(json.dumps({key: value for key, value in manifest.items() if key != "packages"}, indent=1))


if __name__ == "__main__":
    main()
