"""Log-likelihoods: the prefix encoder does not read scored tokens, except with the release's quirk; lm-eval agrees."""

import dataclasses
import json

import pytest
import torch
from jrt_recall import task_folder
from jrt_recall.tokenizers import shipped_tokenizer
from transformers import AutoTokenizer

from jrt import JRTConfig, JRTForCausalLM, presets
from jrt.evaluate import LocalPool, ModelSpec, Request, plan, run
from jrt.evaluate.likelihood import filled_row, log_likelihoods
from jrt.released.quirks import Quirks

PAIRS = [([5, 6, 7, 8], [9, 10, 11]), ([12, 13], [14]), ([20, 21, 22, 23, 24, 25, 26], [27, 28])]


def random_model(pattern: str, short_prompt: str = "none", **quirks: bool) -> JRTForCausalLM:
    torch.manual_seed(0)
    config = dataclasses.replace(presets()["debug"], pattern=pattern, enc_length=12)
    config = JRTConfig(architecture=config.to_dict(), short_prompt=short_prompt, quirks=quirks)
    model = JRTForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # so that what was read shows in the logits
    return model


@torch.no_grad()
def stepwise(model: JRTForCausalLM, context: list[int], continuation: list[int]) -> float:
    """Reads the context, then the continuation token by token: what decoding would have assigned."""
    output = model(torch.tensor([context]), use_cache=True)
    total = 0.0
    for token in continuation:
        total += float(output.logits[0, -1].log_softmax(-1)[token])
        output = model(torch.tensor([[token]]), past_key_values=output.past_key_values, use_cache=True)
    return total


@pytest.mark.parametrize("pattern", ["CPSLAM", "CLSM", "CA"])
@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_scores_are_those_of_decoding(pattern, batch_size):
    model = random_model(pattern)
    found = log_likelihoods(model, PAIRS, batch_size)
    expected = [stepwise(model, *pair) for pair in PAIRS]
    assert [one.log_likelihood for one in found] == pytest.approx(expected, rel=1e-4)


def test_the_greedy_continuation_is_recognised():
    model = random_model("CPSLAM")
    context = PAIRS[0][0]
    greedy = model.generate(torch.tensor([context]), max_new_tokens=3, do_sample=False)[0, len(context) :].tolist()
    right, wrong = log_likelihoods(model, [(context, greedy), (context, [*greedy[:2], greedy[2] + 1])], 2)
    assert right.is_greedy and not wrong.is_greedy


def test_the_published_leak_is_a_quirk():
    honest, leaking = (random_model("CPSLAM", leak_continuation=leak) for leak in (False, True))
    assert Quirks(leak_continuation=True).active() == ("leak_continuation",)
    for pair in PAIRS:
        a, b = (log_likelihoods(model, [pair], 1)[0].log_likelihood for model in (honest, leaking))
        if len(pair[1]) == 1:  # a single token is never among its own inputs
            assert a == pytest.approx(b, rel=1e-5)
        else:
            assert abs(a - b) > 1e-3


@pytest.mark.parametrize("rule", ["pad", "repeat"])
def test_short_contexts_are_filled_as_generate_fills_them(rule):
    model = random_model("CPSLAM", rule)
    context = PAIRS[0][0]
    output = model.generate(
        torch.tensor([context]), max_new_tokens=3, do_sample=False, output_scores=True, return_dict_in_generate=True
    )
    tokens = output.sequences[0, len(context) :].tolist()
    scores = torch.stack(output.scores)[:, 0].log_softmax(-1)
    expected = sum(float(scores[step, token]) for step, token in enumerate(tokens))
    found = log_likelihoods(model, [(context, tokens), PAIRS[2]], 2)[0]
    assert found.log_likelihood == pytest.approx(expected, rel=1e-4) and found.is_greedy


def test_iterated_scores_encode_everything_so_far():
    model = random_model("CPSLAM", "iterate")
    plain = random_model("CPSLAM")
    context, continuation = PAIRS[0]
    expected = sum(
        float(plain(torch.tensor([[*context, *continuation[:end]]])).logits[0, -1].log_softmax(-1)[continuation[end]])
        for end in range(len(continuation))
    )
    assert log_likelihoods(model, PAIRS, 2)[0].log_likelihood == pytest.approx(expected, rel=1e-4)


def test_empty_pairs_are_refused():
    model = random_model("CA")
    with pytest.raises(ValueError, match="pair 1"):
        log_likelihoods(model, [PAIRS[0], ([], [5])], 2)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("saved") / "jrt"
    torch.manual_seed(0)
    config = dataclasses.replace(presets()["debug"], train_length=1024)
    JRTForCausalLM(JRTConfig(architecture=config.to_dict(), eos_token_id=0, pad_token_id=1)).save_pretrained(folder)
    shipped_tokenizer().save_pretrained(folder)
    return str(folder)


def test_lm_eval_with_our_model_class_asks_and_scores_the_same(saved, tmp_path):
    import lm_eval
    from lm_eval.tasks import TaskManager

    from jrt.evaluate.harness import JRTHarness

    ours = run(
        plan(Request((ModelSpec(saved),), ("reference_pages",), ("once",), "pages-512", limit=4)), LocalPool(), tmp_path
    )
    manager = TaskManager(include_path=str(task_folder()), include_defaults=False, metadata={"max_items": 4})
    theirs = lm_eval.simple_evaluate(
        model=JRTHarness(saved, batch_size=2),
        tasks=["recall_reference_pages_512"],
        task_manager=manager,
        log_samples=True,
        bootstrap_iters=0,
    )
    samples = theirs["samples"]["recall_reference_pages_512"]
    assert [
        s["arguments"][0][0] if isinstance(s["arguments"], list) else s["arguments"]["gen_args_0"]["arg_0"]
        for s in samples
    ] == [row["prompt"] for row in ours.predictions]
    assert [sample["resps"][0][0] for sample in samples] == [row["prediction"] for row in ours.predictions]
    assert theirs["results"]["recall_reference_pages_512"]["contains,none"] == ours.records[0]["score"]


def test_lm_eval_scores_choices_without_a_leak(saved):
    from lm_eval.api.instance import Instance

    from jrt.evaluate.harness import JRTHarness

    harness = JRTHarness(saved, batch_size=2)
    asked = [
        Instance("loglikelihood", {}, (context, choice), 0)
        for context in ("open(", "read(size")
        for choice in (" yes", " not at all")
    ]
    found = harness.loglikelihood(asked, disable_tqdm=True)
    for request, (score, _) in zip(asked, found, strict=True):
        whole = harness.tok_encode("".join(request.args))
        context = harness.tok_encode(request.args[0])
        assert score == pytest.approx(stepwise(harness.model, context, whole[len(context) :]), rel=1e-4)
    with pytest.raises(ValueError, match="does not fit"):
        harness._kept([5], list(range(2000)))


def test_pairs_equal_the_published_ones(shared, tmp_path):
    """The published evaluation pads context and continuation together to the encoder's 1,024 tokens."""
    from jrt.evaluate.harness import JRTHarness

    golden = json.loads((shared / "golden" / "tokenization.json").read_text(encoding="utf-8"))
    config = dataclasses.replace(presets()["debug"], enc_length=1024).to_dict()
    options = {"short_prompt": "pad", "short_prompt_token": golden["tokenizer"]["pad_token_id"]}
    model = JRTForCausalLM(JRTConfig(architecture=config, quirks={"leak_continuation": True}, **options))
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(shared / "gpt2").save_pretrained(tmp_path)
    harness = JRTHarness(str(tmp_path))
    for case in golden["encode_pair"]:
        context, continuation = harness._encode_pair(case["context"], case["continuation"])
        blank = 0
        if case["decode_mode"] == "default_left_pad":
            row = filled_row(harness.model, context, continuation)
            context, blank = row.ids[: len(row.ids) + 1 - len(continuation)], row.blank
        assert len(context) == case["n_ctx"] and continuation == case["cont"]
        assert context[: len(case["ctx_head"])] == case["ctx_head"]
        assert context[-len(case["ctx_tail"]) :] == case["ctx_tail"]
        assert blank == (case["mask_zeros"] or 0)
