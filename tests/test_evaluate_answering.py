"""Answering in batches: common beginnings are read once, finished rows leave the batch, answers stay the same."""

import copy
import dataclasses
import json
import random
import unicodedata

import pytest
import torch
from jrt_recall import PROTOCOLS
from jrt_recall.tokenizers import reachable, shipped_tokenizer
from random_models import save_random_model
from tokenizers import Tokenizer
from tokenizers.models import Unigram, WordLevel
from tokenizers.normalizers import NFC, Replace, Sequence
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from jrt.evaluate import ModelSpec, answering, open_model
from jrt.evaluate import batches as batches_of
from jrt.evaluate.answering import answer, encode, left_padded
from jrt.evaluate.batches import Limits, batches

PAGES = PROTOCOLS["pages-512"]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    sizes = {"vocab_size": 4096, "eos_token_id": 0, "bos_token_id": 0}
    peers = {
        "gpt2": GPT2LMHeadModel(GPT2Config(n_positions=1024, n_embd=32, n_layer=2, n_head=2, **sizes)),
        "llama": LlamaForCausalLM(
            LlamaConfig(
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                initializer_range=0.5,
                **sizes,
            )
        ),
    }
    for name, model in peers.items():
        model.save_pretrained(root / name)
        shipped_tokenizer().save_pretrained(root / name)
    return {
        "prefix": save_random_model(root / "prefix", "CPSLAM"),
        "causal": save_random_model(root / "causal", "CLSMA"),
        **{name: str(root / name) for name in peers},
    }


def test_padding_and_truncation_equal_the_published_ones(shared):
    golden = json.loads((shared / "golden" / "tokenization.json").read_text(encoding="utf-8"))
    gpt2, pad = AutoTokenizer.from_pretrained(shared / "gpt2"), golden["tokenizer"]["pad_token_id"]
    for limit, ids_key, mask_key in ((None, "ids", "mask"), (50, "left_truncate_50", "mask_50")):
        prompts = encode(gpt2, golden["strings"], limit)
        ids, mask = left_padded([prompt.ids for prompt in prompts], pad, torch.device("cpu"))
        assert (ids.tolist(), mask.tolist()) == (golden[ids_key], golden[mask_key])
    assert sum(prompt.truncated > 0 for prompt in prompts) == sum(sum(row) > 50 for row in golden["mask"]) > 0


def test_a_prompt_that_cannot_be_asked_says_why_and_leaves_the_others_alone():
    tokenizer = shipped_tokenizer()
    plain, empty, cut_emoji = encode(tokenizer, ["a b", "", "a \ud83d"], None)
    assert not plain.problem and "no tokens" in empty.problem and "surrogate" in cut_emoji.problem
    highest = max(plain.ids)
    assert not encode(tokenizer, ["a b"], None, vocabulary=highest + 1)[0].problem
    assert f"token {highest}" in encode(tokenizer, ["a b"], None, vocabulary=highest)[0].problem


def test_begin_tokens_survive_truncation_and_end_tokens_end_no_prompt():
    tokenizer = copy.deepcopy(shipped_tokenizer())
    begin, end = tokenizer.convert_tokens_to_ids(["<|mask|>", "<|endoftext|>"])
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<|mask|> $A <|endoftext|>", special_tokens=[("<|mask|>", begin), ("<|endoftext|>", end)]
    )
    bare = shipped_tokenizer()("alpha beta gamma delta")["input_ids"]
    assert tokenizer("alpha beta gamma delta")["input_ids"] == [begin, *bare, end]
    (whole,), (cut,) = (encode(tokenizer, ["alpha beta gamma delta"], limit) for limit in (None, 4))
    assert whole.ids == [begin, *bare] and whole.truncated == 0
    assert cut.ids == [begin, *bare[-3:]] and cut.truncated == len(bare) - 3


def shipped_tokenizer_with_begin_token():
    """The shipped tokenizer with a begin token after its 4,096 others, as people add one and forget the embedding."""
    tokenizer = copy.deepcopy(shipped_tokenizer())
    tokenizer.add_special_tokens({"bos_token": "<new>"})
    front = [("<new>", tokenizer.convert_tokens_to_ids("<new>"))]
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<new> $A", special_tokens=front)
    return tokenizer


def word_tokenizer(unknown: str) -> PreTrainedTokenizerFast:
    """Knows three words in small letters; puts <s> in front of a text and </s> behind it."""
    words = {word: index for index, word in enumerate(("<s>", "</s>", "<unk>", "x", "valve", "opens"))}
    tokenizer = Tokenizer(WordLevel(words, unk_token=unknown))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token=unknown)


def test_a_begin_token_beyond_the_models_rows_is_named():
    (found,) = encode(word_tokenizer("<unk>"), ["valve opens"], None, vocabulary=6)
    assert not found.problem
    tokenizer = shipped_tokenizer_with_begin_token()
    (found,) = encode(tokenizer, ["valve opens"], None, vocabulary=4096)
    assert found.problem == "token 4096 of it is beyond the model's 4096 rows"


@pytest.mark.parametrize("unknown", ["<unk>", "<s>", "</s>"])
def test_a_begin_token_is_kept_whatever_the_unknown_token_is(unknown):
    assert encode(word_tokenizer(unknown), ["valve opens"], None)[0].ids == [0, 4, 5]


def test_an_answer_in_large_letters_is_reached_by_a_vocabulary_of_small_ones():
    tokenizer = word_tokenizer("<unk>")
    assert reachable(tokenizer, ["Valve OPENS"], ()) and not reachable(tokenizer, ["Valve shuts"], ())


def test_the_text_of_a_special_token_in_a_document_is_text():
    tokenizer = shipped_tokenizer()
    (found,) = encode(tokenizer, ["before <|endoftext|> after"], None)
    assert tokenizer.eos_token_id not in found.ids and tokenizer.decode(found.ids) == "before <|endoftext|> after"


def test_answers_that_no_generation_can_hold_are_unreachable():
    tokenizer = copy.deepcopy(shipped_tokenizer())
    decomposed = unicodedata.normalize("NFD", "café")
    assert reachable(tokenizer, [decomposed], ("\n",)) and reachable(tokenizer, [" café "], ("\n",))
    assert not reachable(tokenizer, ["two\nlines", "\ud83d"], ("\n",))
    assert reachable(tokenizer, ["two\nlines", "one"], ("\n",))
    tokenizer._tokenizer.normalizer = NFC()
    assert not reachable(tokenizer, [decomposed], ("\n",)) and reachable(tokenizer, ["café"], ("\n",))


def questions_on_two_pages() -> list[list[int]]:
    """Two long pages with questions of different lengths, and one page with a single question."""
    draw = random.Random(0)

    def tokens(count: int) -> list[int]:
        return [draw.randrange(10, 4000) for _ in range(count)]

    first, second = tokens(90), tokens(70)
    asked = [first + tokens(n) for n in (3, 5, 9, 1)] + [second + tokens(n) for n in (4, 2)]
    return [*asked, tokens(80)]


@pytest.mark.parametrize("name", ["causal", "gpt2", "llama"])
def test_answers_are_those_of_each_prompt_alone(models, name, monkeypatch):
    opened = open_model(ModelSpec(models[name]))
    rows = questions_on_two_pages()
    alone = [answer(opened, [row], PAGES)[0] for row in rows]
    shared = []
    monkeypatch.setattr(
        answering,
        "read_beginnings",
        lambda *args, original=answering.read_beginnings: shared.append(original(*args)) or shared[-1],
    )
    together = answer(opened, rows, PAGES)
    assert shared[0] is not None and shared[0].ids.shape[1] < max(map(len, rows))
    assert [g.text for g in together] == [g.text for g in alone]
    assert [g.new_tokens for g in together] == [g.new_tokens for g in alone]
    assert len({g.text for g in alone}) > 1


def test_a_prefix_encoder_reads_its_prompts_whole(models):
    opened = open_model(ModelSpec(models["prefix"]))
    rows = questions_on_two_pages()
    assert answering.read_beginnings(opened, rows, set()) is None
    assert [g.text for g in answer(opened, rows, PAGES)] == [answer(opened, [row], PAGES)[0].text for row in rows]


def test_an_end_token_in_a_question_is_never_forced(models):
    opened = open_model(ModelSpec(models["causal"]))
    page = questions_on_two_pages()[0][:60]
    rows = [[*page, 5], [*page, 7, 5], [*page, 5, 9, 5]]
    assert answering.read_beginnings(opened, rows, {9}) is None
    assert answering.read_beginnings(opened, rows, {10}).forced == [[], [5], [9, 5]]


def test_a_prompt_of_one_token_has_no_beginning_to_share(models):
    opened = open_model(ModelSpec(models["causal"]))
    rows = [*questions_on_two_pages(), [17]]
    assert answering.read_beginnings(opened, rows, set()) is None
    assert [g.text for g in answer(opened, rows, PAGES)] == [answer(opened, [row], PAGES)[0].text for row in rows]


def test_groups_have_each_row_once_and_a_token_of_its_own():
    rows = questions_on_two_pages()
    found = batches_of.groups(rows)
    assert sorted(index for group in found for index in group.rows) == list(range(len(rows)))
    assert [sorted(group.rows) for group in found] == [[0, 1, 2, 3], [6], [4, 5]]
    for group in found:
        for index in group.rows:
            assert len(rows[index]) > group.common
            assert rows[index][: group.common] == rows[group.rows[0]][: group.common]
    same = [[1, 2, 3, 4]] * 3
    assert batches_of.groups(same) == [batches_of.Group([0, 1, 2], 3)]
    longer = [[1, 2, 3, 4], [1, 2, 3, 4, 5, 6]]
    assert batches_of.groups(longer)[0].common == 3


def test_what_sharing_is_worth():
    assert answering.outweighs(saved=50, steps=30, parameters=10**6, device="cpu")
    assert not answering.outweighs(saved=10_000, steps=4, parameters=10**6, device="cuda")
    assert answering.outweighs(saved=10_000, steps=4, parameters=10**9, device="cuda")
    assert answering.outweighs(saved=10_000, steps=0, parameters=10**6, device="cuda")


def test_batches_keep_questions_on_one_page_together():
    rows = questions_on_two_pages()
    assert [set(batch) for batch in batches(rows, Limits(4))] == [{0, 1, 2, 3}, {6, 4, 5}]


def stops_in(texts: list[str], tokenizer) -> tuple[str, ...]:
    """Tokens out of each text, later ones in later texts."""
    tokens = [tokenizer(text)["input_ids"] for text in texts]
    return tuple(
        {tokenizer.decode(row[3 + 4 * number]) for number, row in enumerate(tokens) if len(row) > 3 + 4 * number}
    )


@pytest.mark.parametrize(
    ("name", "short_prompt"),
    [("mini-jrt", "none"), ("mini-jrt", "pad"), ("mini-jrt", "iterate"), ("mini-based", None), ("llama", None)],
)
def test_rows_that_have_ended_leave_the_batch(models, name, short_prompt, monkeypatch):
    opened = open_model(ModelSpec(models.get(name, name), short_prompt=short_prompt))
    asked = ["open(file, mode)\nclose(fd)\nopen(", "split(sep)\n", "class Reader", "x = [", "import os\n\n\n", "def f("]
    rows = opened.tokenizer(asked)["input_ids"]
    endless = dataclasses.replace(PAGES, stop=("no such text",), max_new_tokens=32)
    protocol = dataclasses.replace(
        endless, stop=stops_in([found.text for found in answer(opened, rows, endless)], opened.tokenizer)
    )
    alone = [answer(opened, [row], protocol)[0] for row in rows]
    calls, generate = [], opened.model.generate
    monkeypatch.setattr(opened.model, "generate", lambda **given: calls.append(given) or generate(**given))
    together = answer(opened, rows, protocol)
    assert [(g.text, g.new_tokens, g.finite) for g in together] == [(g.text, g.new_tokens, g.finite) for g in alone]
    assert len({g.new_tokens for g in alone}) > 1
    assert (len(calls) > 1) == (short_prompt != "iterate")


def unigram(*normalised):
    """A tokenizer whose vocabulary holds its special tokens as ordinary pieces, as those of XGLM and T5 do."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((letter, -2.0) for letter in "abcdefghij <>/s")]
    made = Tokenizer(Unigram(pieces, unk_id=0))
    made.normalizer = Sequence([Replace(one, "") for one in normalised])
    made.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def test_text_that_cannot_be_kept_from_becoming_a_special_token_makes_its_prompt_invalid():
    spelled, plain = encode(unigram(), ["ab </s> cd", "ab < /s> cd"], None)
    assert "'</s>'" in spelled.problem and not plain.problem and 2 not in plain.ids


def test_a_begin_token_survives_a_normaliser_that_drops_letters():
    for dropped in ("a", "a0"):
        (found,) = encode(unigram(*dropped), ["abc abc"], 4)
        assert found.ids[0] == 1 and len(found.ids) == 4
