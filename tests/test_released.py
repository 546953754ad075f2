"""The released format: goldens (stored outputs of the released code), each quirk, the rules for short prompts."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import GenerationConfig

import jrt
from jrt import Quirks
from jrt.short_prompts import SHORT_PROMPTS, fill_short_prompts

FOLDERS = ("attn", "attn_oddrotary_m128", "based_decay_legacy", "based_fla", "jrt_f16", "jrt_main", "mamba")
TOLERANCE = dict(rtol=1e-4, atol=1e-3)  # relative to the largest logit
MODES = {"default": "none", "default_left_pad": "pad", "naive": "iterate"}


@pytest.fixture(scope="module", params=FOLDERS)
def golden(request, shared) -> tuple[Path, dict[str, Tensor], dict]:
    folder = shared / "golden" / request.param
    cases = json.loads((folder / "manifest.json").read_text())["cases"]
    return folder, load_file(folder / "golden.safetensors"), cases


def assert_close(actual: Tensor, expected: Tensor) -> None:
    scale = expected.abs().max()
    torch.testing.assert_close(actual / scale, expected / scale, **TOLERANCE)


@torch.no_grad()
def stepwise(model, ids: Tensor, first: int, mask: Tensor | None) -> tuple[Tensor, Tensor, list]:
    """Logits of a prefill and of one-token steps, and the states of the layers after each of the two."""
    out = model(ids[:, :first], attention_mask=mask, use_cache=True)
    cache, prefill, states, steps = out.past_key_values, out.logits, [out.past_key_values.state.layers], []
    for column in range(first, ids.shape[1]):
        steps.append(model(ids[:, column : column + 1], past_key_values=cache, use_cache=True).logits)
    return prefill, torch.cat(steps, dim=1), [*states, cache.state.layers]


@pytest.mark.parametrize("compat", [None, "released"])
@torch.no_grad()
def test_full_forward(golden, compat):
    folder, tensors, cases = golden
    model = jrt.load(folder, compat=compat)
    for case in (case for case in cases if case.startswith("full")):
        logits = model(tensors[f"{case}.input_ids"]).logits
        assert_close(logits, tensors[f"{case}.logits"])


@torch.no_grad()
def test_each_kind_of_mixer(golden):
    folder, tensors, _ = golden
    model = jrt.load(folder)
    inputs = {
        name.split(".")[2]: tensor
        for name, tensor in tensors.items()
        if name.startswith("full0.mixer") and name.endswith(".in")
    }
    assert inputs
    seen: dict[int, Tensor] = {}
    for index in map(int, inputs):
        model.model.blocks[index].mixer.register_forward_hook(
            lambda _, __, out, index=index: seen.update({index: out[0]})
        )
    model(tensors["full0.input_ids"])
    for name, tensor in tensors.items():
        if name.startswith("full0.mixer") and name.endswith(".out"):
            assert_close(seen[int(name.split(".")[2])], tensor)


@torch.no_grad()
def test_masked_forward_as_released(golden):
    folder, tensors, cases = golden
    model, correct = jrt.load(folder, compat="released"), jrt.load(folder)
    for case in (case for case in cases if case.startswith("masked")):
        ids, mask = tensors[f"{case}.input_ids"], tensors[f"{case}.attn_mask"]
        assert_close(model(ids, attention_mask=mask).logits, tensors[f"{case}.logits"])
        own = correct(ids, attention_mask=mask).logits
        for row, keep in enumerate(mask.bool()):
            alone = correct(ids[row, keep][None]).logits[0]
            assert_close(own[row, keep], alone)


def test_steps_and_states_as_released(golden):
    folder, tensors, cases = golden
    model = jrt.load(folder, compat="released")
    for case in (case for case in cases if case.startswith("steps")):
        prefill, steps, states = stepwise(
            model, tensors[f"{case}.input_ids"], cases[case]["P"], tensors.get(f"{case}.mask")
        )
        assert_close(prefill, tensors[f"{case}.prefill_logits"])
        assert_close(steps, tensors[f"{case}.step_logits"])
        for moment, layers in zip(("prefill", "steps"), states, strict=True):
            start = f"{case}.state_after_{moment}.layer"
            for name in (name for name in tensors if name.startswith(start)):
                layer, _, part = name.removeprefix(start).split(".")
                check_state(layers[int(layer)], part, tensors[name], model.core.pattern[int(layer)])


def check_state(state, part: str, expected: Tensor, letter: str) -> None:
    """Golden states keep all 1 + d + d^2 features and the convolution's current input as well."""
    match letter, part:
        case "C", "conv":
            assert_close(state.mT, expected[..., 1:])
        case "M", "0":
            assert_close(state.conv.mT, expected[..., 1:])
        case "M", "1":
            assert_close(state.ssm, expected)
        case "P" | "L", "0":
            assert_close(state.S, symmetric(expected[:, :, 0]).mT)
        case "P" | "L", "1":
            assert_close(state.z, symmetric(expected[:, :, 0, 0]))
        case _:
            raise AssertionError(f"no rule for {letter} {part}")


def symmetric(full: Tensor) -> Tensor:
    """(..., 1 + d + d^2) features as the symmetric 1 + d + d (d + 1) / 2:

    pairs i < j are worth sqrt(2) of the original's.
    """
    d = int((full.shape[-1] - 1) ** 0.5)
    rows, columns = torch.triu_indices(d, d)
    pairs = full[..., 1 + d :].unflatten(-1, (d, d))[..., rows, columns]
    return torch.cat([full[..., : 1 + d], pairs * torch.where(rows == columns, 1, 2**0.5)], dim=-1)


def test_greedy_generation_as_released(golden):
    folder, tensors, cases = golden
    model = jrt.load(folder, compat="released")
    for case in (case for case in cases if case.startswith("gen")):
        ids = tensors[f"{case}.input_ids"]
        new = cases[case]["max_length"] - cases[case]["P"]
        short_prompt = MODES[case.split("_", 1)[1]] if model.core.has("P") else None
        out = model.generate(
            ids,
            max_new_tokens=new,
            do_sample=False,
            short_prompt=short_prompt,
            output_logits=True,
            return_dict_in_generate=True,
        )
        assert torch.equal(out.sequences[:, -new:], tensors[f"{case}.sequences"][:, -new:])
        assert torch.equal(out.sequences[:, : ids.shape[1]], ids)
        assert_close(torch.stack(out.logits, dim=1), tensors[f"{case}.scores"])


@pytest.mark.parametrize("name", FOLDERS)
@torch.no_grad()
def test_correct_decoding_equals_the_full_forward(shared, name):
    """Where the release's own steps differ (Based adds twice), the default follows its full forward."""
    model = jrt.load(shared / "golden" / name)
    ids = load_file(shared / "golden" / name / "golden.safetensors")["steps0.input_ids"]
    first = ids.shape[1] - 5
    prefix = torch.full((ids.shape[0],), min(first, model.core.enc_length)) if model.core.has("P") else None
    prefill, steps, _ = stepwise(model, ids, first, None)
    assert_close(torch.cat([prefill, steps], dim=1), model(ids, prefix_length=prefix).logits)


def test_double_adding_alone_changes_based_steps_only(shared):
    folder = shared / "golden" / "based_fla"
    tensors = load_file(folder / "golden.safetensors")
    model = jrt.load(folder, compat=Quirks(double_add=True))
    prefill, steps, _ = stepwise(model, tensors["steps0.input_ids"], 40, None)
    assert_close(prefill, tensors["steps0.prefill_logits"])
    assert_close(steps, tensors["steps0.step_logits"])
    correct = stepwise(jrt.load(folder), tensors["steps0.input_ids"], 40, None)[1]
    assert not torch.allclose(steps, correct, rtol=1e-2)


def test_blank_padding_alone_changes_padded_rows_only(shared):
    folder = shared / "golden" / "jrt_main"
    tensors = load_file(folder / "golden.safetensors")
    ids, mask = tensors["masked1.input_ids"], tensors["masked1.attn_mask"]
    with torch.no_grad():
        quirky = jrt.load(folder, compat=Quirks(blank_padding=True))(ids, attention_mask=mask).logits
        correct = jrt.load(folder)(ids, attention_mask=mask).logits
    assert_close(quirky, tensors["masked1.logits"])
    assert_close(quirky[0], correct[0])  # this row has no padding
    assert not torch.allclose(quirky[1, -1], correct[1, -1], rtol=1e-2)


def test_half_states_act_in_half_precision_only(shared):
    folder = shared / "golden" / "jrt_main"
    ids = load_file(folder / "golden.safetensors")["steps0.input_ids"]
    for dtype, differs in ((torch.float32, False), (torch.bfloat16, True)):
        runs = [
            stepwise(jrt.load(folder, dtype=dtype, compat=compat), ids, 64, None)[2][1][1].S
            for compat in (None, Quirks(half_states=True))
        ]
        assert torch.equal(*runs) is not differs


def test_padded_rows_are_never_generated_by_default(shared):
    folder = shared / "golden" / "jrt_main"
    prompt = load_file(folder / "golden.safetensors")["gen0_default.input_ids"]
    for compat, allowed in ((None, False), (Quirks(padded_rows=True), True)):
        model = jrt.load(folder, compat=compat)
        row = model.config.vocab_tokens  # the first row without a token
        model.model.head.weight = torch.nn.Parameter(model.model.head.weight.clone())
        hidden, _ = model.model.read(prompt)
        model.model.head.weight.data[row] = (
            10 * hidden[0, -1].detach()
        )  # by far the best next token of the first prompt
        first = model.generate(prompt, max_new_tokens=1, do_sample=False, short_prompt="none")[0, -1]
        assert (first == row).item() is allowed


def test_ignoring_batch_padding_reads_pads_as_tokens(shared):
    folder = shared / "golden" / "jrt_main"
    ids = load_file(folder / "golden.safetensors")["gen0_default.input_ids"][:, :40]
    mask = (torch.arange(40) >= 4).long().expand(2, -1)
    quirky = jrt.load(folder, compat=Quirks(ignore_batch_padding=True))
    arguments = dict(max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True)
    ignored = torch.stack(quirky.generate(ids, attention_mask=mask, **arguments).logits)
    unmasked = torch.stack(quirky.generate(ids, **arguments).logits)
    correct = torch.stack(jrt.load(folder).generate(ids, attention_mask=mask, **arguments).logits)
    torch.testing.assert_close(ignored, unmasked)
    assert not torch.allclose(ignored, correct, rtol=1e-2)


def test_released_models_do_not_stop_at_an_end_token(shared):
    folder = shared / "golden" / "attn"
    prompt = load_file(folder / "golden.safetensors")["gen0_default.input_ids"][:1]
    for compat, length in ((None, 1), ("released", 6)):
        model = jrt.load(folder, compat=compat)
        first = model.generate(prompt, max_new_tokens=1, do_sample=False)[0, -1].item()
        if compat is None:
            model.generation_config.eos_token_id = first
        out = model.generate(prompt, max_new_tokens=6, do_sample=False)
        assert out.shape[1] - prompt.shape[1] == length
    assert model.generation_config.eos_token_id is None


def test_unknown_names_are_refused(shared):
    folder = shared / "golden" / "attn"
    with pytest.raises(ValueError, match="compat='paper'"):
        jrt.load(folder, compat="paper")
    with pytest.raises(ValueError, match="short_prompt='twice'"):
        jrt.load(folder, short_prompt="twice")
    with pytest.raises(ValueError, match="no model 'mini-gpt'"):
        jrt.load("mini-gpt")


@pytest.mark.parametrize(
    "change",
    [
        {"device": "potato"},
        {"device": "cuda:63"},
        {"device": None},
        {"dtype": "int8"},
        {"dtype": torch.int8},
        {"dtype": "potato"},
        {"dtype": 16},
    ],
    ids=str,
)
def test_devices_and_dtypes_that_cannot_be_had_are_refused(change):
    with pytest.raises(ValueError, match=r"expected (cpu|float32)"):
        jrt.load("mini-jrt", **change)


def test_a_dtype_may_be_a_name():
    assert jrt.load("mini-jrt", dtype="bfloat16").dtype == jrt.load("mini-jrt", dtype=torch.bfloat16).dtype


def test_released_jrt_models_fill_short_prompts_with_pads(shared):
    model = jrt.load(shared / "golden" / "jrt_main")
    assert model.config.short_prompt == "pad"
    assert jrt.load(shared / "golden" / "jrt_main", short_prompt="repeat").config.short_prompt == "repeat"
    assert jrt.load(shared / "golden" / "mamba").config.short_prompt == "none"


@pytest.mark.parametrize("rule", SHORT_PROMPTS)
def test_short_prompts_are_filled_row_by_row(shared, rule):
    model = jrt.load(shared / "golden" / "jrt_main")
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, 229, (length,), generator=generator) for length in (7, 20, 40)]
    ids, mask = torch.full((3, 40), 5), torch.zeros(3, 40, dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, 40 - len(row) :], mask[index, 40 - len(row) :] = row, 1
    arguments = dict(
        max_new_tokens=4, do_sample=False, short_prompt=rule, output_logits=True, return_dict_in_generate=True
    )
    batch = model.generate(ids, attention_mask=mask, **arguments)
    for index, row in enumerate(rows):
        alone = model.generate(row[None], **arguments)
        assert torch.equal(alone.sequences[0, -4:], batch.sequences[index, -4:])
        assert_close(torch.stack(batch.logits)[:, index], torch.stack(alone.logits)[:, 0])


@pytest.mark.parametrize(
    "limits",
    [
        {"max_length": 9},
        {"max_length": 9, "min_length": 9},
        {"max_new_tokens": 4},
        {"max_length": 50, "max_new_tokens": 4},
    ],
)
@pytest.mark.parametrize("place", ["argument", "generation_config", "model"])
def test_limits_count_the_prompt_as_it_was_given(shared, limits, place):
    model = jrt.load(shared / "golden" / "jrt_main", short_prompt="pad")
    ids = torch.randint(0, 200, (2, 5), generator=torch.Generator().manual_seed(0))
    if place == "argument":
        found = model.generate(ids, do_sample=False, **limits)
    elif place == "generation_config":
        found = model.generate(ids, generation_config=GenerationConfig(do_sample=False, **limits))
    else:
        model.generation_config = GenerationConfig(do_sample=False, **limits)
        found = model.generate(ids)
    assert found.shape == (2, 9)
    assert torch.equal(found, model.generate(ids, do_sample=False, max_new_tokens=4))


def test_what_each_rule_fills_in():
    ids, mask = torch.tensor([[9, 1, 2, 3]]), torch.tensor([[False, True, True, True]])
    repeated = fill_short_prompts(ids, mask, 8, "repeat")
    assert repeated.input_ids.tolist() == [[2, 3, 1, 2, 3, 1, 2, 3]]
    assert repeated.attention_mask.all()
    padded = fill_short_prompts(ids, mask, 8, "pad")
    assert padded.input_ids.tolist() == [[220] * 5 + [1, 2, 3]]
    assert padded.attention_mask.all()
    assert (padded.prefix_length.item(), padded.blank_length.item()) == (8, 5)
    plain = fill_short_prompts(ids, mask, 8, "none")
    assert plain.input_ids is ids
    assert plain.prefix_length.item() == 3
    assert fill_short_prompts(ids, mask, 8, "iterate").prefix_length is None
    long = fill_short_prompts(ids, mask, 2, "pad")
    assert long.input_ids.tolist() == [[1, 2, 3]]
    assert (long.prefix_length.item(), long.blank_length.item()) == (2, 0)
