"""The model: sizes, the two guarantees (padding never counts, decoding equals the full forward), `generate`."""

import dataclasses

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig

from jrt import Config, JRTConfig, JRTForCausalLM, presets
from jrt.config import LETTERS
from jrt.model import LanguageModel

PUBLISHED_PARAMETERS = {  # paper, Tables 15 to 18; docs/released.md
    "jrt-360m": 356_578_304,
    "jrt-1.3b": 1_375_143_168,
    "based-360m": 362_702_848,
    "based-1.3b": 1_349_453_056,
    "attention-360m": 359_810_048,
    "attention-1.3b": 1_327_080_720,
    "mamba-360m": 358_190_080,
    "mamba-1.3b": 1_319_311_360,
}
FAMILIES = ("mini-attention", "mini-mamba", "mini-based", "mini-jrt", "debug", "decaying")
LENGTH = 40


def family(name: str) -> Config:
    """A preset with few rows; windows and encoders shorter than the texts, so that both have an end to get wrong."""
    if name == "decaying":
        config = dataclasses.replace(presets()["mini-based"], decay_const=-3, decay_projection=True)
    else:
        config = presets()[name]
    encoder = 16 if config.has("P") else 0
    return dataclasses.replace(config, vocab_rows=97, window=8, enc_length=encoder)


def build(name: str) -> JRTForCausalLM:
    torch.manual_seed(0)
    model = JRTForCausalLM(JRTConfig(architecture=family(name).to_dict())).eval().double()
    for parameter in model.parameters():  # initial weights are so small that a wrong term would not show
        if parameter.ndim > 1:
            parameter.data *= 4
    return model


def texts(rows: int = 3, length: int = LENGTH, seed: int = 0) -> Tensor:
    return torch.randint(0, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


def left_padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows of different lengths as one batch; pads are tokens that would matter if they were read."""
    width = max(len(row) for row in rows)
    ids = torch.randint(0, 97, (len(rows), width), generator=torch.Generator().manual_seed(9))
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, width - len(row) :] = row
        mask[index, width - len(row) :] = 1
    return ids, mask


@pytest.mark.parametrize("name", PUBLISHED_PARAMETERS)
def test_published_sizes(name):
    with torch.device("meta"):
        model = LanguageModel(presets()[name])
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED_PARAMETERS[name]


@pytest.mark.parametrize("name", [name for name in presets() if name.startswith("mini-")])
def test_minis_have_about_four_million_parameters(name):
    with torch.device("meta"):
        model = LanguageModel(presets()[name])
    assert 3.9e6 < sum(parameter.numel() for parameter in model.parameters()) < 4.4e6


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_row_depends_neither_on_padding_nor_on_its_neighbours(name):
    model = build(name)
    rows = [text[: LENGTH - cut] for text, cut in zip(texts(), (0, 3, 31), strict=True)]
    ids, mask = left_padded(rows)
    batched = model(ids, attention_mask=mask).logits
    for row, logits in zip(rows, batched, strict=True):
        torch.testing.assert_close(logits[-len(row) :], model(row[None]).logits[0])


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("cut", [1, 17, 39])
@torch.no_grad()
def test_prefill_and_decoding_equal_the_full_forward(name, cut):
    model = build(name)
    rows = [text[: LENGTH - short] for text, short in zip(texts(), (0, 2, 5), strict=True)]
    ids, mask = left_padded(rows)
    first = max(cut, 6)  # each row needs a token of its own in the first call
    prefix = mask[:, :first].sum(1).clamp(max=16)
    whole = model(ids, attention_mask=mask, prefix_length=prefix).logits
    out = model(ids[:, :first], attention_mask=mask[:, :first], use_cache=True)
    pieces, cache = [out.logits], out.past_key_values
    for column in range(first, LENGTH):
        out = model(
            ids[:, column : column + 1], attention_mask=mask[:, : column + 1], past_key_values=cache, use_cache=True
        )
        pieces.append(out.logits)
    real = mask.bool()
    torch.testing.assert_close(torch.cat(pieces, dim=1)[real], whole[real])
    assert cache.get_seq_length() == LENGTH


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_going_on_with_several_tokens_equals_the_full_forward(name):
    model, ids = build(name), texts()
    prefix = torch.full((3,), 10)
    whole = model(ids, prefix_length=prefix).logits
    out = model(ids[:, :10], prefix_length=prefix, use_cache=True)
    rest = model(ids[:, 10:], past_key_values=out.past_key_values, use_cache=True).logits
    torch.testing.assert_close(rest, whole[:, 10:])


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    "how", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 7}], ids=["greedy", "beams", "sampled"]
)
def test_generate_with_the_cache_equals_without(name, how):
    model, prompt = build(name), texts(2, 20)
    results = []
    for use_cache in (True, False):
        torch.manual_seed(1)
        arguments = {"do_sample": False, **how}
        results.append(model.generate(prompt, max_new_tokens=6, use_cache=use_cache, **arguments))
    assert torch.equal(*results)
    assert torch.equal(results[0][:, :20], prompt)


@pytest.mark.parametrize("name", FAMILIES)
def test_generate_gives_the_same_in_a_padded_batch(name):
    model = build(name)
    rows = [texts()[0], texts()[1][:25], texts()[2][:7]]
    ids, mask = left_padded(rows)
    batch = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    for row, sequence in zip(rows, batch, strict=True):
        alone = model.generate(row[None], max_new_tokens=6, do_sample=False)
        assert torch.equal(alone[0, -6:], sequence[-6:])


def test_generate_goes_on_from_a_returned_cache():
    model, prompt = build("mini-jrt"), texts(2, 20)
    out = model.generate(prompt, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, use_cache=True)
    longer = model.generate(prompt, max_new_tokens=8, do_sample=False)
    cache = out.past_key_values
    rest = model.generate(out.sequences, past_key_values=cache, max_new_tokens=4, do_sample=False)
    assert torch.equal(rest[:, -4:], longer[:, -4:])


@pytest.mark.parametrize("name", ["mini-jrt", "mini-attention"])
@pytest.mark.parametrize(
    ("columns", "changes", "said"),
    [
        (20, {}, "input_ids has 20 columns, and past_key_values has read 20"),
        (7, {}, "input_ids has 7 columns"),
        (24, {"use_cache": False}, "cannot go on from past_key_values"),
    ],
)
def test_generate_reads_nothing_twice(name, columns, changes, said):
    """transformers reads the whole text again if nothing is left of it, and at each step without a cache."""
    model, text = build(name), texts(2, 24)
    cache = model(text[:, :20], use_cache=True).past_key_values
    with pytest.raises(ValueError, match=said):
        model.generate(text[:, :columns], past_key_values=cache, max_new_tokens=4, **changes)
    settings = GenerationConfig(use_cache=False, max_new_tokens=4, do_sample=False)
    found = model.generate(text, past_key_values=cache, generation_config=settings)
    expected = model.generate(text, max_new_tokens=4, do_sample=False)
    assert torch.equal(found, expected)


def test_a_text_that_goes_on_cannot_be_filled_up_again():
    model, text = build("mini-jrt"), texts(2, 24)
    cache = model(text[:, :20], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="'iterate', reads the whole text"):
        model.generate(text, past_key_values=cache, short_prompt="iterate", max_new_tokens=4)


@pytest.mark.parametrize("name", ["mini-jrt", "mini-based"])
def test_a_text_that_goes_on_has_its_prefix_already(name):
    model, text = build(name), texts(2, 24)
    cache = model(text[:, :20], use_cache=True).past_key_values
    given = {"past_key_values": cache, "max_new_tokens": 4, "do_sample": False}
    with pytest.raises(ValueError, match=r"has read the text from its beginning.*leave it out"):
        model.generate(text, prefix_length=torch.tensor([5, 20]), **given)
    if name == "mini-jrt":
        for rule in ("repeat", "pad"):
            with pytest.raises(ValueError, match=f"short_prompt='{rule}' fills a prompt up"):
                model.generate(text, short_prompt=rule, **given)
    found = model.generate(text, short_prompt="none", **given)
    whole = model.generate(text, prefix_length=torch.tensor([16, 16]), max_new_tokens=4, do_sample=False)
    assert torch.equal(found, whole)


def test_the_cache_goes_by_its_old_and_its_new_name():
    """transformers 5.24 renamed past_key_values to cache; its own `generate` then passed a name that was ignored."""
    model, ids = build("mini-jrt"), texts(2, 12)
    first = [model(ids[:, :8], use_cache=True).past_key_values for _ in range(2)]
    old = model(ids[:, 8:], past_key_values=first[0]).logits
    assert torch.equal(old, model(ids[:, 8:], cache=first[1]).logits)
    with pytest.raises(ValueError, match="two names of one argument"):
        model(ids[:, 8:], past_key_values=first[0], cache=first[0])


def test_generate_streams_and_stops_at_a_string(shared):
    from transformers import AutoTokenizer, TextStreamer

    tokenizer = AutoTokenizer.from_pretrained(shared / "gpt2")
    torch.manual_seed(0)
    config = dataclasses.replace(presets()["debug"], vocab_rows=50264)
    model = JRTForCausalLM(JRTConfig(architecture=config.to_dict(), vocab_tokens=50257)).eval()
    prompt = tokenizer("a b c d", return_tensors="pt").input_ids
    free = model.generate(prompt, max_new_tokens=12, do_sample=False)
    third = tokenizer.decode(free[0, prompt.shape[1] + 2])
    stopped = model.generate(
        prompt,
        max_new_tokens=12,
        do_sample=False,
        stop_strings=[third],
        tokenizer=tokenizer,
        streamer=TextStreamer(tokenizer, skip_prompt=True),
    )
    assert prompt.shape[1] < stopped.shape[1] <= prompt.shape[1] + 3


@pytest.mark.parametrize("name", FAMILIES)
def test_a_saved_folder_loads_through_transformers(name, tmp_path):
    from transformers import AutoModelForCausalLM

    model = build(name).float()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is JRTForCausalLM
    assert again.model.head.weight is again.model.embedding.weight
    torch.testing.assert_close(again(texts()).logits, model(texts()).logits, rtol=0, atol=0)


def test_prefix_length_decides_what_the_encoder_reads():
    model, ids = build("mini-jrt"), texts()
    changed = ids.clone()
    changed[:, 12] = (changed[:, 12] + 1) % 97
    with torch.no_grad():
        inside = [model(x, prefix_length=torch.full((3,), 13)).logits[:, :12] for x in (ids, changed)]
        outside = [model(x, prefix_length=torch.full((3,), 12)).logits[:, :12] for x in (ids, changed)]
    assert not torch.allclose(*inside)  # an encoded token is seen by the tokens before it
    torch.testing.assert_close(*outside)  # others are not


def test_labels_inside_the_prefix_do_not_count():
    model, ids = build("mini-jrt"), texts()
    prefix = torch.full((3,), 10)
    loss = model(ids, labels=ids, prefix_length=prefix).loss
    logits = model(ids, prefix_length=prefix).logits
    expected = torch.nn.functional.cross_entropy(logits[:, 9:-1].flatten(0, 1), ids[:, 10:].flatten())
    torch.testing.assert_close(loss, expected.float(), check_dtype=False)
    with pytest.raises(ValueError, match="shorter prefix_length"):
        model(ids[:, :16], labels=ids[:, :16])


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_the_loss_depends_neither_on_padding_nor_on_the_type_of_labels(name):
    model = build(name)
    rows = [texts()[0, :20], texts()[1, :31]]
    ids, mask = left_padded(rows)
    prefix = torch.zeros(2, dtype=torch.long)
    losses = [model(row[None], labels=row[None], prefix_length=prefix[:1]).loss for row in rows]
    expected = (losses[0] * 19 + losses[1] * 30) / 49
    for labels in (ids, ids.int()):
        loss = model(ids, attention_mask=mask, labels=labels, prefix_length=prefix).loss
        torch.testing.assert_close(loss, expected)


def test_generate_reads_the_prefix_that_it_is_told():
    model, prompt = build("mini-jrt"), texts(2, 20)
    prefix = torch.tensor([3, 9])
    free = model.generate(prompt, max_new_tokens=6, do_sample=False)
    told = model.generate(prompt, max_new_tokens=6, do_sample=False, prefix_length=prefix)
    assert not torch.equal(told, free)
    for column in range(20, 26):
        logits = model(told[:, :column], prefix_length=prefix).logits[:, -1]
        assert torch.equal(logits.argmax(-1), told[:, column])
    with pytest.raises(ValueError, match="short_prompt"):
        model.generate(prompt, prefix_length=prefix, short_prompt="repeat")


def test_states_select_and_repeat_rows():
    model, ids = build("debug"), texts()
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        token = texts(3, 1, seed=3)
        expected = model(token, past_key_values=cache, use_cache=False).logits
        cache.batch_select_indices(torch.tensor([2, 0]))
        picked = model(token[[2, 0]], past_key_values=cache, use_cache=False).logits
        cache.batch_repeat_interleave(2)
        repeated = model(token[[2, 2, 0, 0]], past_key_values=cache, use_cache=False).logits
    torch.testing.assert_close(picked, expected[[2, 0]])
    torch.testing.assert_close(repeated, expected[[2, 2, 0, 0]])
    with pytest.raises(ValueError, match="cannot be cropped"):
        cache.crop(3)


@pytest.mark.parametrize("name", ["mini-attention", "mini-mamba", "mini-based", "mini-jrt"])
def test_state_bytes_are_what_the_states_take(name):
    model = build(name).float()
    for length in (5, 30):
        with torch.no_grad():
            cache = model(texts(1, length), use_cache=True).past_key_values
        assert model.core.state_bytes(length) == cache.state.nbytes() - _empty_window(model.core, length)


def _empty_window(config: Config, length: int) -> int:
    """Zeros that a window keeps until its first tokens have come; `state_bytes` counts what a row needs."""
    unused = max(0, config.window_of(0) - length) if config.has("S") else 0
    return config.pattern.count("S") * 4 * 2 * config.width * unused


BAD = [
    (lambda ids: dict(input_ids=ids[:, :0]), "empty"),
    (lambda ids: dict(input_ids=ids + 97), "outside the vocabulary"),
    (lambda ids: dict(input_ids=ids - 98), "outside the vocabulary"),
    (lambda ids: dict(input_ids=ids.float()), "expected integers"),
    (lambda ids: dict(input_ids=ids[0]), "expected integers of shape"),
    (lambda ids: dict(input_ids=ids.tolist()), "input_ids is a list; expected a tensor of integers"),
    (lambda ids: dict(input_ids=ids > 5), "int64 or int32"),
    (lambda ids: dict(input_ids=ids.to(torch.uint8)), "int64 or int32"),
    (lambda ids: dict(input_ids=ids, attention_mask=ids.tolist()), "attention_mask is a list; expected a tensor"),
    (lambda ids: dict(input_ids=ids, blank_length=5), "blank_length is a int"),
    (lambda ids: dict(input_ids=ids, blank_length=torch.tensor([5])), "blank_length has shape"),
    (lambda ids: dict(input_ids=ids, prefix_length=torch.ones(len(ids), dtype=torch.bool)), "tensor of integers"),
    (lambda ids: dict(input_ids=ids, labels=ids.tolist()), "labels is a list; expected a tensor"),
    (lambda ids: dict(input_ids=ids, labels=ids.float()), "labels are torch.float32; expected int64 or int32"),
    (lambda ids: dict(input_ids=ids, labels=ids + 97), "label .* is outside the vocabulary"),
    (lambda ids: dict(input_ids=ids, labels=ids - 97), "label .* is outside the vocabulary"),
    (lambda ids: dict(input_ids=ids, attention_mask=torch.ones(3, 7)), "attention_mask has shape"),
    (lambda ids: dict(input_ids=ids, attention_mask=(torch.arange(LENGTH) < 30).expand(3, -1)), "left padding"),
    (lambda ids: dict(input_ids=ids, attention_mask=torch.zeros(3, LENGTH)), "all padding"),
    (lambda ids: dict(input_ids=ids, prefix_length=torch.tensor([5])), "prefix_length has shape"),
    (lambda ids: dict(input_ids=ids, prefix_length=torch.full((len(ids),), 5.0)), "expected a tensor of integers"),
    (lambda ids: dict(input_ids=ids, prefix_length=5), "prefix_length is a int"),
    (lambda ids: dict(input_ids=ids, prefix_length=torch.tensor([5, 5, 41])), "own tokens"),
    (lambda ids: dict(input_ids=ids, labels=ids[:, 1:]), "labels have shape"),
    (lambda ids: dict(input_ids=ids, inputs_embeds=torch.zeros(1)), "inputs_embeds"),
    (lambda ids: dict(input_ids=ids, output_attentions=True), "output_attentions is not supported"),
    (lambda ids: dict(attention_mask=torch.ones_like(ids)), "input_ids is a NoneType; expected a tensor"),
    (lambda ids: dict(input_ids=ids, output_attentions=True), "output_attentions is not supported"),
]


@pytest.mark.parametrize(("arguments", "said"), BAD, ids=[said for _, said in BAD])
def test_bad_input_says_what_was_expected(arguments, said):
    with pytest.raises(ValueError, match=said):
        build("mini-jrt")(**arguments(texts()))


def test_a_tuple_where_one_is_asked_for():
    model, ids = build("mini-jrt"), texts()
    named = model(ids, use_cache=True)
    logits, cache = model(ids, use_cache=True, return_dict=False)
    assert torch.equal(logits, named.logits) and cache.get_seq_length() == LENGTH


def test_a_state_from_another_model_is_refused():
    from transformers.cache_utils import DynamicCache

    ids = texts()
    cache = build("mini-mamba")(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="another model"):
        build("mini-jrt")(ids[:, :1], past_key_values=cache)
    with pytest.raises(ValueError, match="another model"):
        build("mini-based")(ids[:, :1], past_key_values=build("mini-jrt")(ids, use_cache=True).past_key_values)
    with pytest.raises(ValueError, match="RecurrentCache"):
        build("mini-jrt")(ids[:, :1], past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="3 rows"):
        build("mini-mamba")(ids[:1, :1], past_key_values=cache)


def test_generate_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="short_prompt"):
        build("mini-jrt").generate(texts(), short_prompt="fill")
    with pytest.raises(ValueError, match="no prefix encoder"):
        build("mini-mamba").generate(texts(), short_prompt="pad")
    with pytest.raises(ValueError, match="short_prompt"):
        build("mini-jrt").generate(texts(), short_prompt=["pad"])
    with pytest.raises(ValueError, match="needs input_ids"):
        build("mini-jrt").generate()
    with pytest.raises(ValueError, match="attention_mask has shape"):
        build("mini-mamba").generate(texts(), attention_mask=torch.ones(3, 7))
    with pytest.raises(ValueError, match="empty"):
        build("mini-jrt").generate(torch.zeros(1, 0, dtype=torch.long))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (dict(pattern="CXQ"), "one letter per layer"),
        (dict(pattern=""), "one letter per layer"),
        (dict(pattern="P"), "enc_length"),
        (dict(pattern="A", heads=5), "multiple of heads"),
        (dict(pattern="L", linear_heads=5), "multiple of linear_heads"),
        (dict(pattern="SS", window=(3,)), "2 S layers"),
        (dict(pattern="C", biases=("everything",)), "expected names"),
        (dict(pattern="C", biases=(["conv.projections"],)), "expected names"),
        (dict(pattern="C", width=0), "at least 1"),
        (dict(pattern="C", conv_expand=0), "conv_expand is 0: expected at least one channel"),
        (dict(pattern="C", conv_expand=-1), "conv_expand is -1: expected at least one channel"),
        (dict(pattern="C", norm_eps=-1e-5), "norm_eps is -1e-05; expected at least 0"),
        (dict(pattern="C", train_length=0), "train_length must be at least 1"),
        (dict(pattern="M", mamba_kernel=0), "mamba_kernel must be at least 1"),
        (dict(pattern="M", mamba_expand=0), "mamba_expand must be at least 1"),
        (dict(pattern="M", dt_rank=0), "dt_rank must be at least 1"),
        (dict(pattern="L", linear_heads=2, feature_scale=0), "feature_scale must be at least 1"),
        (dict(pattern="L", linear_heads=2, decay_const=0), "decay_const is 0: expected below 0"),
    ],
)
def test_configurations_that_cannot_be_built(fields, said):
    with pytest.raises(ValueError, match=said):
        Config(**{"width": 32, "vocab_rows": 97, **fields})


def test_quirks_that_nobody_knows_are_refused():
    with pytest.raises(ValueError, match=r"names out of .*blank_padding"):
        JRTForCausalLM(JRTConfig(quirks={"magic": True}))


def test_every_letter_has_a_mixer():
    from jrt.mixers import MIXERS

    assert set(MIXERS) == set(LETTERS)
