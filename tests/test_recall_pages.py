"""The task reference_pages of jrt_recall: windows, the facts that can be asked, and the selection."""

import platform

import pytest
from jrt_recall import api_text, contains, items, prompt
from jrt_recall.reference_pages import Page, Window, askable, library_pages, select, windows
from jrt_recall.tokenizers import shipped_tokenizer

PAGE = Page(
    "made.up",
    """Tools for boats.
open_boat(name, sails=3)
Opens a boat.
close(fd)
move(distance)
Moves by distance.
steer(angle, Force=1)
turn(x, y, z=None)
turn(first, second)
paint_colour(colour)
load(a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p, q, r, s, t, u, v)
sink()
See STEER(ANGLE, FORCE=1).
anchor(depth=10)""",
)


def window(page: Page) -> Window:
    return Window(page.module, 0, page.text, 100)


def test_only_facts_with_one_clear_answer_are_asked():
    kept, left_out = askable(window(PAGE))
    assert [fact.name for fact in kept] == ["open_boat", "anchor"]
    # close: 2 characters, sink: none, load: 64; move, steer: elsewhere; paint_colour: in the question; turn: twice
    assert left_out == {"length": 3, "name headed twice": 2, "answer elsewhere": 3}


def test_windows_end_at_line_borders_and_keep_to_the_size():
    tokenizer = shipped_tokenizer()
    lines = [f"call_{number}(first={number}, second={number * 7})" for number in range(300)]
    lines[100] = "a very long line " * 300
    page = Page("long", "\n".join(lines))
    cut = windows(page, 256, tokenizer)
    assert len(cut) > 5
    for piece in cut:
        text = piece.text.split("\n")
        assert text == lines[piece.first_line : piece.first_line + len(text)]
        assert piece.tokens == len(tokenizer(piece.text + "\n", add_special_tokens=False)["input_ids"])
        assert 0.75 * 256 <= piece.tokens <= 256
    covered = [line for piece in cut for line in piece.text.split("\n")]
    assert len(covered) == len(set(covered)) and lines[100] not in covered


@pytest.mark.parametrize("size", [512, 1024, 2048])
def test_the_library_gives_enough_items_and_every_item_keeps_the_rules(size):
    tokenizer = shipped_tokenizer()
    chosen = select(size, tokenizer)
    assert len(chosen.documents) >= 300
    assert len({doc["id"] for doc in chosen.documents}) == len(chosen.documents)
    for doc in chosen.documents:
        text, name, arguments = doc["window"], doc["name"], doc["arguments"]
        assert doc["tokens"] <= size and 4 <= len(arguments) <= 60
        assert text.lower().count(arguments.lower()) == 1
        assert text.split("\n").count(f"{name}({arguments})") == 1
        assert not contains(api_text.question(name), [arguments])
        assert not contains(prompt("reference_pages", doc, "question_first").replace(text, ""), [arguments])


def test_windows_lie_in_the_pages_they_name():
    pages = {page.module: page.text.split("\n") for page in library_pages()}
    assert {"json.decoder", "argparse", "os"} <= set(pages)
    assert not any("test" in module.split(".") or "site-packages" in module for module in pages)
    for doc in select(512, shipped_tokenizer(), 50).documents:
        assert pages[doc["module"]][doc["line"]] == f"{doc['name']}({doc['arguments']})"


def test_selection_is_deterministic_nested_and_seeded():
    tokenizer = shipped_tokenizer()
    whole = select(512, tokenizer, 60).documents
    assert select(512, tokenizer, 60).documents == whole
    assert select(512, tokenizer, 20).documents == whole[:20]
    assert select(512, tokenizer, 60, seed=1).documents != whole
    assert len({(doc["module"], doc["window"]) for doc in whole}) == 60, "one item a window before a second from any"


def test_every_model_reads_the_same_items_in_all_strategies():
    runs = {name: items("reference_pages", name, "pages-512", limit=12) for name in ("once", "twice", "3x", "1x")}
    once = runs["once"]
    assert once.seed == 0 and once.python == platform.python_version()
    assert once.documents - once.dropped > 512 and once.lost == 0
    for name, run in runs.items():
        assert [item.id for item in run.items] == [item.id for item in once.items]
        assert run.sha256 == once.sha256
        for item in run.items:
            readings = {"once": 1, "twice": 2, "3x": 3, "1x": 1}[name]
            question, text = item.doc["name"] + "(", item.doc["window"]
            announced = "" if name == "once" else f"{item.doc['name']} ?\n"
            assert item.prompt == announced + f"{text}\n" * readings + question
            assert item.answers == (item.doc["arguments"] + ")",)
            assert contains(item.doc["arguments"] + ")\nmore", item.answers)
            assert not contains(item.doc["arguments"] + ", more)", item.answers)


def test_prompts_end_on_a_token_border():
    tokenizer = shipped_tokenizer()
    for item in items("reference_pages", "once", "pages-512", limit=40).items:
        asked = tokenizer(item.prompt, add_special_tokens=False)["input_ids"]
        told = tokenizer(f"{item.prompt}{item.answers[0]}\n", add_special_tokens=False)["input_ids"]
        assert told[: len(asked)] == asked
