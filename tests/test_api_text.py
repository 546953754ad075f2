"""The renderer of API pages. Also: the tokens of a prompt are the first tokens of the text with its answer."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jrt_recall import api_text, reference_pages
from jrt_recall.tokenizers import shipped_tokenizer

SOURCE = '''
"""Read things.

Carefully."""
import os

def plain(a, b=1, *rest, key, other="x", **more) -> int:
    """Do it
    at once.

    Long story."""

def _private(a): ...

class Box(object):
    """A box."""

    def __init__(self, lid): ...

    def open(self, width: int = 3, /, *, slowly=False):
        pass

    @staticmethod
    def make(kind, size):
        """Make one."""

    @classmethod
    async def load(cls, path): ...

if os.name == "nt":
    def chmod(path, mode=0o777): ...
'''


def test_a_page_has_every_public_heading_with_the_first_paragraph():
    assert api_text.render(SOURCE).split("\n") == [
        "Read things.",
        "Carefully.",
        "plain(a, b=1, *rest, key, other='x', **more)",
        "Do it at once.",
        "class Box",
        "A box.",
        "open(width=3, /, *, slowly=False)",
        "make(kind, size)",
        "Make one.",
        "load(path)",
        "chmod(path, mode=511)",
    ]


def test_facts_are_the_headings_and_questions_their_beginnings():
    page = api_text.render(SOURCE)
    found = api_text.facts(page)
    assert [f.name for f in found] == ["plain", "open", "make", "load", "chmod"]
    for fact in found:
        line = page.split("\n")[fact.line]
        assert line == api_text.heading(fact.name, fact.arguments)
        assert line.startswith(api_text.question(fact.name))
    assert api_text.announcement("open") == "open ?"


@pytest.mark.parametrize("source", ["def f(:", "x = 1\x00"])
def test_what_is_not_python_is_a_value_error(source):
    with pytest.raises(ValueError, match="not a Python module"):
        api_text.render(source)


def test_a_module_without_public_text_gives_an_empty_page():
    assert api_text.render("import os\n_x = 1\n") == ""


names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,12}", fullmatch=True)
lines = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n\r"), max_size=40)


@settings(max_examples=200, deadline=None)
@given(window=st.lists(lines, max_size=5), name=names, arguments=lines)
def test_a_prompt_is_encoded_as_the_beginning_of_its_answered_text(window, name, arguments):
    """Whatever the window and the arguments are: the border after "(" is a border of tokens, and so is every line
    end."""
    tokenizer = shipped_tokenizer()
    text = "".join(line + "\n" for line in window)
    prompt = tokenizer.encode(text + api_text.question(name), add_special_tokens=False)
    whole = tokenizer.encode(text + api_text.heading(name, arguments) + "\n", add_special_tokens=False)
    assert whole[: len(prompt)] == prompt
    each = [tokenizer.encode(line + "\n", add_special_tokens=False) for line in window]
    assert whole[: sum(map(len, each))] == [token for ids in each for token in ids]


def test_the_vocabulary_is_small_lossless_and_has_its_special_ids_where_models_expect_them():
    tokenizer = shipped_tokenizer()
    assert len(tokenizer) == 4096
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.mask_token_id) == (0, 1, 4095)
    pages = random.Random(0).sample(reference_pages.library_pages(), 20)
    for page in pages:
        ids = tokenizer.encode(page.text, add_special_tokens=False)
        assert tokenizer.decode(ids) == page.text
        assert len(ids) < len(page.text) / 2
