"""The probe and `jrt doctor`: a right model passes, and each kind of error is found by its own check."""

import copy
import json
import sys

import pytest
import torch
from conftest import ROOT
from random_models import save_random_model
from transformers import AutoModelForCausalLM, BertConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM

from jrt.cli import main
from jrt.foreign.caches import keeps_no_tokens, select_rows
from jrt.foreign.greedy import set_aside
from jrt.probe import CHECKS, LENGTH, PASSES, RunMode, probe
from jrt.probe.trials import Trials
from jrt.recurrent_cache import CACHE

sys.path.insert(0, str(ROOT / "benchmarks"))
from tiny_models import CONTROLS, tiny_model

USUAL = set(CHECKS) - {"no cache"}


def failed(findings) -> set[str]:
    return {check.name for check in findings.checks if not check.holds}


class Broken(LlamaForCausalLM):
    """Llama with what other models get wrong; each subclass changes what reaches `forward`, or its logits."""

    def __init__(self, config=None):
        super().__init__(config or LlamaConfig(**CONTROLS["llama"][1], vocab_size=256, pad_token_id=0, eos_token_id=2))
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(std=0.4)


class IgnoresMask(Broken):
    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **given):
        return super().forward(input_ids=input_ids, **given)


class MixesRows(Broken):
    def forward(self, *args, **given):
        output = super().forward(*args, **given)
        output.logits = output.logits + 0.01 * output.logits.mean(0, keepdim=True) * (len(output.logits) > 1)
        return output


class MixesRowsWhenDecoding(Broken):
    """As RWKV: prompts are right in a batch, and each token after them is computed from a mean over the rows."""

    def forward(self, input_ids=None, **given):
        output = super().forward(input_ids=input_ids, **given)
        if input_ids.shape[1] == 1:
            output.logits = output.logits.mean(0, keepdim=True).expand_as(output.logits)
        return output


class ForgetsWhenDecoding(Broken):
    def forward(self, input_ids=None, **given):
        output = super().forward(input_ids=input_ids, **given)
        if input_ids.shape[1] == 1:
            output.logits = output.logits * 1.01
        return output


class ForgetsBetweenCalls(Broken):
    """Right in one call and in single tokens; wrong where several tokens are read on top of a cache."""

    def forward(self, input_ids=None, **given):
        cache = given.get(CACHE)
        gone_on = cache is not None and cache.get_seq_length() > 0 and input_ids.shape[1] > 1
        output = super().forward(input_ids=input_ids, **given)
        if gone_on:
            output.logits = output.logits + 0.1
        return output


class LosesOldTokens(Broken):
    """Its cache keeps the last 40 tokens only, without a word."""

    def forward(self, *args, **given):
        output = super().forward(*args, **given)
        for layer in output.past_key_values.layers if output.past_key_values is not None else ():
            layer.keys[:, :, :-40] = 0
            layer.values[:, :, :-40] = 0
        return output


class MixesManyRows(Broken):
    """Right for one and for two rows: the rows of larger batches come out in another order."""

    def forward(self, *args, **given):
        output = super().forward(*args, **given)
        output.logits = output.logits.roll(int(len(output.logits) > 3), 0)
        return output


class IgnoresMaskOfFewColumns(Broken):
    def forward(self, input_ids=None, attention_mask=None, **given):
        if attention_mask is not None and attention_mask.float().mean() > 0.8:
            attention_mask = None
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **given)


class RefusesCache(Broken):
    def forward(self, *args, **given):
        if given.get("use_cache"):
            raise RuntimeError("no cache here")
        return super().forward(*args, **given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", CONTROLS)
def test_what_is_right_is_not_blamed(kind, dtype):
    findings = probe(tiny_model(kind).to(dtype))
    assert not failed(findings) and {check.name for check in findings.checks} == USUAL
    assert findings.mode == RunMode() and findings.mode.sentences() == []
    assert findings.passes <= PASSES


@pytest.mark.parametrize(
    ("kind", "wrong", "mode"),
    [
        (IgnoresMask, {"padding alone", "padding", "shared state"}, RunMode(padding=False, sharing=False)),
        (MixesRows, {"padding", "neighbours", "shared state"}, RunMode(batches=False, padding=False, sharing=False)),
        (MixesRowsWhenDecoding, {"padding", "neighbours"}, RunMode(batches=False, padding=False, sharing=False)),
        (MixesManyRows, {"neighbours"}, RunMode(batches=False, padding=False, sharing=False)),
        (IgnoresMaskOfFewColumns, {"padding alone"}, RunMode(padding=False, sharing=False)),
        (ForgetsBetweenCalls, {"two calls", "shared state"}, RunMode(sharing=False)),
    ],
)
def test_each_kind_of_wrong_is_found_by_its_check(kind, wrong, mode):
    findings = probe(kind().eval())
    assert failed(findings) == wrong
    assert findings.mode == mode and findings.mode.sentences()


@pytest.mark.parametrize("kind", [ForgetsWhenDecoding, RefusesCache, LosesOldTokens])
def test_a_model_that_breaks_with_a_cache_is_run_without(kind):
    findings = probe(kind().eval())
    assert findings.holds("no cache") and findings.holds("padding") and findings.holds("neighbours")
    assert findings.mode == RunMode(cache=False, sharing=False)
    untried = [check for check in findings.checks if check.holds is None]
    assert {check.name for check in untried} == {"two calls", "state copy", "single tokens", "shared state"}
    assert all(check.reason for check in untried)


def test_rwkv_reads_padding_and_mixes_rows_when_it_decodes():
    findings = probe(tiny_model("rwkv"))
    assert {"padding alone", "padding", "neighbours"} <= failed(findings) and findings.holds("decode")
    assert findings.mode == RunMode(batches=False, padding=False, sharing=False)
    assert "one prompt at a time" in findings.mode.sentences()[0]


def test_a_model_that_is_not_causal_is_called_so():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    bert = AutoModelForCausalLM.from_config(BertConfig(vocab_size=256, initializer_range=0.4, **sizes)).eval()
    findings = probe(bert)
    assert not findings.mode.causal and "no cache" in failed(findings)
    assert "not a causal language model" in findings.mode.sentences()[0]
    assert probe(ForgetsWhenDecoding().eval()).mode.causal


def test_rows_hold_no_token_that_the_head_lacks():
    model = Broken()
    embedding = torch.nn.Embedding(4096, model.config.hidden_size)
    torch.nn.init.normal_(embedding.weight, std=0.4)
    model.set_input_embeddings(embedding)
    assert not failed(probe(model.eval()))


class GoesOnFromTheCallBefore(Broken):
    """As recurrent_gemma: its state lives in the module, and a prompt of one token does not clear it."""

    left = None

    def forward(self, input_ids=None, attention_mask=None, **given):
        output = super().forward(input_ids=input_ids, attention_mask=attention_mask, **given)
        starts = given.get(CACHE) is None or given[CACHE].get_seq_length() == input_ids.shape[1]
        if starts and input_ids.shape[1] == 1 and self.left is not None:
            output.logits = output.logits + self.left
        self.left = output.logits[:1, -1:].detach()
        return output


def test_a_model_that_reads_one_token_on_top_of_the_call_before_is_not_asked_such_prompts():
    findings = probe(GoesOnFromTheCallBefore().eval())
    assert failed(findings) == {"single tokens"} and findings.mode == RunMode(one_token=False)
    assert "one token" in findings.mode.sentences()[0]


class RoundsByBatch(Broken):
    """Its logits in a batch are one part in 16 larger, as where a batch takes another matrix product (much less there)."""

    def forward(self, *args, **given):
        output = super().forward(*args, **given)
        output.logits = output.logits * (1 + (len(output.logits) > 1) / 16)
        return output


def test_the_bound_of_half_precision_is_four_times_the_spread_over_batch_sizes():
    (bound,) = {check.bound for check in probe(RoundsByBatch().bfloat16().eval()).checks}
    assert bound == pytest.approx(4 / 16, rel=0.1)


@torch.no_grad()
def test_where_batches_are_bitwise_equal_the_spread_over_roundings_stands_for_it():
    model = Broken().bfloat16().eval()
    trials = Trials(model, 0)
    trials.truth = trials.read(trials.row[None])[0]
    over_batches, over_roundings = trials.spreads()
    assert over_batches == 0 < over_roundings  # on a CPU this model rounds alike at all batch sizes
    assert {check.bound for check in probe(model).checks} == {4 * over_roundings}


def test_a_model_that_cannot_read_is_a_finding_with_its_error():
    class Broken2(Broken):
        def forward(self, *args, **given):
            raise RuntimeError("weights are missing")

    (check,) = probe(Broken2().eval()).checks
    assert check.holds is False and "weights are missing" in check.reason


def test_nan_logits_never_hold():
    class Broken3(Broken):
        def forward(self, *args, **given):
            output = super().forward(*args, **given)
            output.logits = output.logits / (len(output.logits) < 2)  # infinite, or NaN, where there are two rows
            return output

    findings = probe(Broken3().eval())
    assert {"padding", "neighbours"} <= failed(findings) and findings.to_dict()["checks"]
    json.dumps(findings.to_dict(), allow_nan=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_whose_head_is_still_zero_is_not_blamed(dtype):
    model = tiny_model("llama").to(dtype)
    torch.nn.init.zeros_(model.lm_head.weight)
    findings = probe(model)
    assert findings.checks and not failed(findings), findings.to_dict()


def test_a_probe_leaves_the_model_as_it_was_and_stays_within_its_passes():
    model = tiny_model("llama").train()
    model.generation_config = GenerationConfig(repetition_penalty=2.0, num_beams=3, eos_token_id=[7, 8], max_length=5)
    before = copy.deepcopy(model.generation_config.to_dict()), copy.deepcopy(model.config.to_dict())
    calls = []
    hook = model.register_forward_pre_hook(
        lambda _, args, given: calls.append(given["input_ids"].shape), with_kwargs=True
    )
    findings = probe(model)
    hook.remove()
    assert not failed(findings) and model.training
    assert (model.generation_config.to_dict(), model.config.to_dict()) == before
    assert len(calls) == findings.passes <= PASSES and max(length for _, length in calls) == LENGTH
    assert sum(rows * length for rows, length in calls) <= PASSES * LENGTH


@pytest.mark.parametrize("pattern", ["CL", "MM", "AS", "CP"])
def test_models_of_this_project_pass(tmp_path, pattern):
    from jrt import load

    model = load(save_random_model(tmp_path, pattern))
    findings = probe(model, pad_token_id=1)
    assert not [check for check in findings.checks if check.holds is False]
    assert findings.mode.padding and findings.mode.cache and findings.mode.sharing == (pattern != "CP")


@pytest.mark.parametrize("kind", ["llama", "mistral", "mamba2", "bamba", "lfm2", "falcon_h1"])
@torch.no_grad()
def test_chosen_rows_of_a_cache_go_on_as_rows_read_alone(kind):
    model = tiny_model(kind)
    ids = torch.randint(5, 256, (2, 20), generator=torch.Generator().manual_seed(1))
    name = "cache_params" if kind == "mamba2" and CACHE == "past_key_values" else CACHE
    cache = model(input_ids=ids[:, :19], use_cache=True)[name]
    rows = torch.tensor([1, 0, 1])
    select_rows(cache, rows)
    assert keeps_no_tokens(cache) == (kind == "mamba2")
    positions = {} if kind == "mamba2" else {"position_ids": torch.full((3, 1), 19)}
    found = model(input_ids=ids[rows, 19:], use_cache=True, **{name: cache}, **positions).logits[:, 0]
    torch.testing.assert_close(found, model(input_ids=ids, use_cache=False).logits[rows, -1], rtol=0, atol=1e-4)


def test_rows_of_what_is_no_cache_are_refused():
    with pytest.raises(ValueError, match="list cannot be chosen"):
        select_rows([torch.zeros(2, 3)], torch.tensor([0]))


@pytest.mark.parametrize("end", [True, [2, True], [2, 3.0], "2", []])
def test_an_end_token_that_is_no_id_is_set_aside_and_named(end):
    model = tiny_model("llama")
    assert set_aside(model, {"eos_token_id": end}) == {"eos_token_id": end}
    assert model.generation_config.eos_token_id is None


def test_saved_settings_that_change_greedy_answers_are_set_aside_and_named():
    model = tiny_model("llama")
    model.generation_config = GenerationConfig(
        eos_token_id=[2, 5], pad_token_id=3, temperature=0.5, do_sample=True, top_k=7, max_length=9, output_scores=True,
        repetition_penalty=1.05, suppress_tokens=[9], min_new_tokens=4, guidance_scale=1.0, num_beams=1, use_cache=False,
        cache_implementation="static", forced_eos_token_id=2,
    )  # fmt: skip
    model.config.no_repeat_ngram_size = 2  # as in checkpoints older than generation_config.json
    assert set_aside(model) == {
        "cache_implementation": "static",
        "forced_eos_token_id": 2,
        "min_new_tokens": 4,
        "no_repeat_ngram_size": 2,
        "repetition_penalty": 1.05,
        "suppress_tokens": [9],
        "use_cache": False,
    }
    assert model.generation_config.eos_token_id == [2, 5] and model.generation_config.pad_token_id == 3
    assert set_aside(model) == {}
    prompt = torch.randint(5, 256, (1, 6))
    plain = tiny_model("llama")
    plain.generation_config.eos_token_id = [2, 5]
    assert torch.equal(model.generate(prompt, max_new_tokens=8), plain.generate(prompt, max_new_tokens=8))


def test_doctor_on_a_model(tmp_path, capsys):
    folder = save_random_model(tmp_path / "ours", "CL")
    assert main(["doctor", folder]) == 0
    text = capsys.readouterr().out
    assert "NO" not in text and CHECKS["padding"] in text and "saved and loaded" in text and "float16" in text
    rwkv = tmp_path / "rwkv"
    tiny_model("rwkv").save_pretrained(rwkv)
    assert main(["doctor", str(rwkv), "--json"]) == 1  # without a tokenizer
    without = json.loads(capsys.readouterr().out)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (rwkv / file).write_bytes((tmp_path / "ours" / file).read_bytes())
        (tmp_path / "ours" / file).unlink()
    assert main(["doctor", folder]) == 0
    capsys.readouterr()
    assert main(["doctor", str(rwkv), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["sound"] and found["mode"]["padding"] is False
    assert {check["name"]: check["holds"] for check in found["checks"]}["save and load"] is True
    assert {check["name"]: check["holds"] for check in without["checks"]}["padding"] is False
    assert main(["doctor", str(tmp_path)]) == 2


def test_doctor_on_the_installation(capsys):
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["sound"]
    for package in ("flash-linear-attention", "causal-conv1d", "flash-attn", "mamba-ssm", "wandb", "pybind11", "ray"):
        assert "(" in found["installed"][package]
    tried = {(check["op"], check["backend"]) for check in found["backends"] if check["holds"]}
    ops = ("linear_attention", "encode_prefix", "prefix_linear_attention", "selective_scan")
    assert {(op, "chunked") for op in ops} <= tried
    assert ("short convolution", "pytorch") in tried


def test_doctor_finds_a_backend_that_is_wrong(monkeypatch):
    from jrt.doctor import backends

    def slightly_wrong(k, v, mask=None, backend=None):
        state = right(k, v, mask=mask, backend=backend)
        return tuple(x * (1.001 if backend == "chunked" else 1) for x in state)

    right = backends.encode_prefix
    monkeypatch.setattr(backends, "encode_prefix", slightly_wrong)
    wrong = {(check.op, check.backend) for check in backends.check_backends() if check.holds is False}
    assert wrong == {("encode_prefix", "chunked")}
