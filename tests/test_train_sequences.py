"""Training sequences of the mini models: answers are in the context, and a batch depends on (seed, step) alone."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from jrt_recall import reference_pages
from jrt_recall.tokenizers import shipped_tokenizer

from jrt.training.objective import IGNORED, Objective
from train.data.pages import Alphabet, Pages
from train.data.sequences import Kind, Recipe, Sequences
from train.tokenizer import encode

RECIPE = Recipe(shapes=((384, 6, 0.5), (1024, 4, 0.5)))


@pytest.fixture(scope="module")
def tokenizer():
    return shipped_tokenizer()


@pytest.fixture(scope="module")
def pages(tokenizer) -> Pages:
    texts = [page.text for page in reference_pages.library_pages()[::4]]
    return Pages(encode(texts, tokenizer), Alphabet.of(tokenizer))


def test_facts_in_tokens_are_the_facts_in_text(pages, tokenizer):
    from jrt_recall import api_text

    text = tokenizer.decode(pages.tokens)
    expected = [fact for fact in api_text.facts(text.replace("<|endoftext|>", "")) if fact.arguments]
    found = [tokenizer.decode(pages.tokens[pages.starts[line] : pages.stops[line]]) for line in pages.fact_lines]
    assert found == [api_text.heading(f.name, f.arguments) + "\n" for f in expected]


def test_windows_are_whole_lines_of_one_page(pages):
    generator = np.random.default_rng(0)
    for size in (32, 256, 2048):
        for _ in range(50):
            first, last = pages.window(generator, size)
            text = pages.text(first, last)
            assert pages.alphabet.end not in text
            assert text[-1] == pages.alphabet.newline
            assert len(text) <= size or last == first + 1


def _spans(row):
    for number in range(1, row.answers.max() + 1):
        places = np.flatnonzero(row.answers == number)
        yield places[0], places[-1] + 1


@pytest.mark.parametrize("renames", [False, True])
def test_every_answer_stands_after_its_name_in_the_context_and_nowhere_else_so(pages, renames):
    sequences, generator = Sequences(pages, RECIPE, 0), np.random.default_rng(1)
    checked = 0
    for _ in range(40):
        row = sequences.row(generator, 1024, renames)
        line_starts = np.append(0, np.flatnonzero(row.ids == pages.alphabet.newline) + 1)
        context = [(a, b) for a, b in pairwise(line_starts) if row.kinds[a] < Kind.QUESTION]
        lines = {row.ids[a:b].tobytes() for a, b in context}
        for start, stop in _spans(row):
            begin = line_starts[line_starts < start][-1]
            if row.ids[stop - 1] == pages.alphabet.newline:  # else the end of the row cut it
                assert row.ids[begin:stop].tobytes() in lines
                checked += 1
    assert checked > 200


def test_renaming_makes_fresh_names(pages, tokenizer):
    recipe = Recipe(shapes=RECIPE.shapes, renamed_headings=0.5, renamed_text=0.5)
    sequences, generator = Sequences(pages, recipe, 0), np.random.default_rng(2)
    whole = pages.tokens.astype(np.int64).tobytes()
    fresh = total = 0
    for _ in range(30):
        row = sequences.row(generator, 384)
        for start, stop in _spans(row):
            total += 1
            fresh += row.ids[start - 3 : stop].tobytes() not in whole
    assert fresh > 0.5 * total


def test_a_prefix_is_the_context_or_a_prompt_that_ends_in_a_question(pages, tokenizer):
    sequences, generator = Sequences(pages, RECIPE, 0), np.random.default_rng(3)
    kinds = []
    for _ in range(60):
        row = sequences.row(generator, 384)
        if row.prefix < 384:
            kinds.append(Kind(row.kinds[row.prefix]))
            assert row.ids[row.prefix - 1] in (pages.alphabet.newline, pages.alphabet.opening)
    assert {Kind.QUESTION, Kind.ANSWER} <= set(kinds)
    shortest = min(sequences.row(generator, 384).prefix for _ in range(60))
    assert shortest < 250


def test_batches_depend_on_seed_and_step_alone(pages):
    one, other = Sequences(pages, RECIPE, 7), Sequences(pages, RECIPE, 7)
    other.batch(3)  # what was read before leaves no trace
    for name, tensor in one.batch(5).items():
        assert torch.equal(tensor, other.batch(5)[name])
    assert one.shape(5) == (one.batch(5)["ids"].shape[1] - 1, one.batch(5)["ids"].shape[0])
    assert not torch.equal(one.batch(5)["ids"], Sequences(pages, RECIPE, 8).batch(5)["ids"])


def test_with_a_prefix_the_same_rows_are_read_and_nothing_leaks(pages):
    objective = Objective("jrt", pages.alphabet.mask, masked_rows=0.5, predicts_first=True)
    for step in range(4):
        batch = Sequences(pages, RECIPE, 7).batch(step)
        targets = objective(batch["ids"], batch["prefix_length"], torch.Generator(), weights=batch["weights"])
        hidden = targets.input_ids == pages.alphabet.mask
        assert hidden.any() and torch.equal(targets.input_ids[~hidden], batch["ids"][:, :-1][~hidden])
        inside = torch.arange(hidden.shape[1]) < batch["prefix_length"][:, None] - 1
        assert not hidden[~inside].any()
        assert (targets.labels[inside & ~hidden] == IGNORED).all()
        assert torch.equal(targets.labels[~inside], batch["ids"][:, 1:][~inside])
        torch.testing.assert_close(targets.totals()[0], batch["weights"][~inside].sum())
        assert (targets.labels[hidden] != pages.alphabet.mask).all()


def test_validation_asks_answers_after_the_prefix_only(pages):
    batch = Sequences(pages, RECIPE, 7).questions(0)
    assert ((batch["weights"] > 0) == (batch["answers"] > 0)).all() and batch["answers"].any()
    inside = torch.arange(batch["answers"].shape[1]) < batch["prefix_length"][:, None] - 1
    assert not batch["answers"][inside].any()
    assert (batch["ids"] != pages.alphabet.mask).all()


def test_an_answer_that_the_row_s_end_cuts_off_is_not_asked(pages):
    sequences, cut = Sequences(pages, RECIPE, 0), 0
    for seed in range(200):
        row = sequences.row(np.random.default_rng(seed), 384, renames=False)
        cut += row.kinds[-1] == Kind.ANSWER and row.ids[-1] != pages.alphabet.newline
        for _, end in _spans(row):
            assert row.ids[end - 1] == pages.alphabet.newline
    assert cut  # there are such rows


def test_a_corpus_without_facts_is_refused(tokenizer):
    with pytest.raises(ValueError, match="no line"):
        Pages(encode(["nothing to ask here"], tokenizer), Alphabet.of(tokenizer))


@pytest.mark.parametrize(
    ("field", "values", "told"),
    [
        (
            "shapes",
            ([], "abc", [[128, 4]], [[128, 0, 1.0]], [[0, 4, 1.0]], [[128, 4, 0.0]], [[128, 4, -1.0]]),
            "shapes",
        ),
        ("readings", ([], [0, 0, 0], [1, 1], [0.5, -0.5, 1], "x"), "readings"),
        ("announced", (2, -1, "x", float("nan"), True), "announced"),
        ("asked_in_prefix", (1.5,), "asked_in_prefix"),
        ("renamed_text", (-1, 0.9), "renamed_text"),
        ("shortest_window", (0, -5, "x", 3000), "_window"),
        ("longest_window", (0, 10), "_window"),
        ("longest_answer", (0, -1), "longest_answer"),
        ("common_words", (-1, "x"), "common_words"),
        ("weight_question", (-1, float("inf"), "x"), "weight_question"),
    ],
)
def test_a_recipe_that_cannot_be_followed_is_refused(field, values, told):
    for value in values:
        with pytest.raises(ValueError, match=rf"recipe\.\w*{told}"):
            Recipe(**{field: value})


def test_a_corpus_that_is_cut_or_foreign_is_told(tmp_path, tokenizer):
    for name, content, told in (
        ("empty", b"", "has 0 bytes"),
        ("cut", bytes(401), "has 401 bytes: expected ids of two bytes each"),
        ("foreign", np.array([5, 51_037], np.uint16).tobytes(), "has id 51037, outside the vocabulary of 4096"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=told):
            Pages.load(tmp_path / name, tokenizer)
