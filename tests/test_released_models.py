"""Models with the release's quirks: their classes, saving and loading; the correct code does not contain them."""

import copy
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import jrt
from jrt import JRTConfig, JRTForCausalLM, Quirks, presets
from jrt.released.modeling import ReleasedForCausalLM

ROOT = Path(__file__).resolve().parent.parent


def random_model(pattern: str = "CPSLC", **fields) -> JRTForCausalLM:
    torch.manual_seed(0)
    config = dataclasses.replace(presets()["debug"], pattern=pattern, vocab_rows=97, enc_length=16, feature_dim=8)
    return JRTForCausalLM(JRTConfig(architecture=config.to_dict(), **fields)).eval()


def test_quirks_make_another_class_and_nothing_else_does():
    assert type(random_model()) is JRTForCausalLM
    assert type(random_model(quirks={"double_add": False})) is JRTForCausalLM
    assert type(random_model(short_prompt="pad")) is JRTForCausalLM
    for name in dataclasses.asdict(Quirks()):
        model = random_model(quirks={name: True})
        assert type(model) is ReleasedForCausalLM
        assert type(copy.deepcopy(model)) is ReleasedForCausalLM
        assert model.quirks == Quirks(**{name: True})


def test_a_subclass_that_computes_no_quirks_refuses_them():
    class Own(JRTForCausalLM):
        pass

    with pytest.raises(ValueError, match="Own computes no quirks"):
        Own(JRTConfig(quirks={"double_add": True}))
    assert type(Own(JRTConfig())) is Own


@torch.no_grad()
def test_weights_do_not_depend_on_the_quirks():
    correct, quirky = random_model(), random_model(quirks=dataclasses.asdict(Quirks.released()))
    quirky.load_state_dict(correct.state_dict(), strict=True)
    ids = torch.randint(0, 97, (2, 30))
    assert torch.equal(quirky(ids).logits, correct(ids).logits)  # one call without padding: no quirk shows


@torch.no_grad()
def test_a_saved_folder_keeps_its_quirks(tmp_path):
    """In a fresh process, which has imported nothing but jrt: through the automatic class, ours, and `jrt.load`."""
    model = random_model(quirks={"double_add": True, "blank_padding": True}, short_prompt="pad", short_prompt_token=3)
    model.save_pretrained(tmp_path)
    ids = torch.randint(0, 97, (2, 12), generator=torch.Generator().manual_seed(1))
    out = model.generate(ids, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True)
    torch.save((ids, torch.stack(out.logits)), tmp_path / "expected")
    script = f"""
import torch, jrt
from transformers import AutoModelForCausalLM
ids, expected = torch.load({str(tmp_path / "expected")!r})
options = dict(max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True)
for load in (AutoModelForCausalLM.from_pretrained, jrt.JRTForCausalLM.from_pretrained, jrt.load):
    logits = load({str(tmp_path)!r}).eval().generate(ids, **options).logits
    assert torch.equal(torch.stack(logits), expected), load
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    config = JRTConfig.from_pretrained(tmp_path)
    config.architectures = ["JRTForCausalLM"]  # as folders say that were written before quirks had a class
    config.save_pretrained(tmp_path)
    again = JRTForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(ids, attention_mask=ids > 3).logits, model(ids, attention_mask=ids > 3).logits)
    assert not torch.equal(jrt.load(tmp_path, compat=Quirks())(ids).logits[:, 0], out.logits[0])


@pytest.mark.parametrize("rule", ["pad", "repeat"])
@torch.no_grad()
def test_decoding_goes_on_from_the_cache_of_a_filled_prompt(shared, rule):
    """The cache counts the columns that the caller knows of, whatever was filled in before them."""
    model = jrt.load(shared / "golden" / "jrt_main")
    ids = load_file(shared / "golden" / "jrt_main" / "golden.safetensors")["gen0_default.input_ids"][:, :9]
    options = dict(do_sample=False, short_prompt=rule, return_dict_in_generate=True)
    first = model.generate(ids, max_new_tokens=3, **options)
    assert first.past_key_values.get_seq_length() == first.sequences.shape[1] - 1
    rest = model.generate(first.sequences, past_key_values=first.past_key_values, max_new_tokens=3, do_sample=False)
    assert torch.equal(rest, model.generate(ids, max_new_tokens=6, **options).sequences)
    without = model.generate(ids, max_new_tokens=6, use_cache=False, **options).sequences
    assert torch.equal(rest, without)


def test_a_pad_that_the_model_has_no_row_for_is_refused():
    with pytest.raises(ValueError, match="short_prompt_token 220 is outside the vocabulary of 97 rows"):
        random_model(short_prompt="pad").generate(torch.zeros(1, 3, dtype=torch.long), max_new_tokens=1)


def test_the_correct_model_has_no_word_of_the_release():
    files = [ROOT / "jrt" / name for name in ("model.py", "cache.py", *(f"mixers/{p.name}" for p in mixer_files()))]
    for file in files:
        assert not [word for word in ("quirk", "release", "blank") if word in file.read_text().lower()], file.name


def mixer_files() -> list[Path]:
    return sorted((ROOT / "jrt" / "mixers").glob("*.py"))
