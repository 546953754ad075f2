"""`jrt.decoding` gives the logits and states of `LanguageModel.read`, and the output of transformers' own loop."""

import copy
import dataclasses
import gc
import logging
import weakref
from unittest import mock

import pytest
import torch
from interpreter import INTERPRETED, pass_in_the_interpreter
from transformers import GenerationMixin
from transformers.generation import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from jrt import JRTConfig, JRTForCausalLM, presets
from jrt.decoding import loop as decoding_loop
from jrt.decoding.plain import PlainStep
from jrt.decoding.session import CapturedSession, Session, Sessions, _addresses
from jrt.recurrent_cache import CACHE

DEBUG = dataclasses.replace(presets()["debug"], vocab_rows=64)
BIASES = ("conv.projections", "conv.filter", "attention.qkv", "attention.out", "mlp.fc1", "mlp.fc2")
CONFIGS = {
    "all": DEBUG,
    "decay": dataclasses.replace(DEBUG, pattern="LL", decay_const=-3, decay_projection=True, feature_scale=16),
    "odd rotary": dataclasses.replace(DEBUG, pattern="SA", rotary_dim=7, inverse_layer_scale=True, biases=BIASES),
    "odd sizes": dataclasses.replace(DEBUG, pattern="CMAS", width=44, rotary_dim=11, conv_kernel=4, conv_expand=1.5),
}
PROMPT, NEW = 21, 12
CLOSE = 1e-5  # of the largest logit
gpu = pytest.mark.gpu


def make_model(config=DEBUG, dtype=torch.float32, device="cpu") -> JRTForCausalLM:
    """Random weights, large enough that tokens differ from each other."""
    torch.manual_seed(0)
    architecture = config.to_dict()
    model = JRTForCausalLM(
        JRTConfig(architecture=architecture, vocab_tokens=60, eos_token_id=7, pad_token_id=1, short_prompt_token=9)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    return model.to(device=device, dtype=dtype).eval()


def make_prompts(rows: int, device="cpu", length=PROMPT) -> dict[str, torch.Tensor]:
    """Prompts of different lengths where there are several, padded on the left."""
    ids = torch.randint(10, 60, (rows, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row in range(rows - 1):
        mask[row, : 5 - row] = 0
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def by_transformers():
    """`generate` with transformers' own loop."""
    return mock.patch.object(JRTForCausalLM, "_sample", GenerationMixin._sample)


def largest_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative to the largest value."""
    return ((got.double() - want.double()).abs().max() / want.double().abs().max().clamp(min=1e-30)).item()


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30)).item()


def check_step(
    make_step, config, rows: int, dtype=torch.float32, device="cpu", bound=CLOSE, steps=NEW, prompt=PROMPT
) -> None:
    """Compares `steps` steps, and the states after them, with `read`: within `bound` of the largest value.

    In half precision the error, against `read` in fp32 with the same weights, is at most twice that of `read` in this dtype;
    of the logits, over all steps together.
    """
    model = make_model(config, dtype, device).model
    is_half = dtype.itemsize == 2
    exact = copy.deepcopy(model).float() if is_half else model
    prompts = make_prompts(rows, device, prompt)
    mask = prompts["attention_mask"].bool() if rows > 1 else None

    def check(got, eager, truth, where) -> None:
        if not is_half:
            assert largest_error(got, eager) <= bound, where
            return
        allowed = 2 * relative_error(eager, truth) + torch.finfo(dtype).eps / 4
        assert relative_error(got, truth) <= allowed, where

    with torch.no_grad():
        _, state = model.read(prompts["input_ids"], attention_mask=mask)
        _, true_state = exact.read(prompts["input_ids"], attention_mask=mask)
        step = make_step(model, rows)
        step.load(state)
        triples = []
        for number in range(steps):
            tokens = (3 + number + torch.arange(rows, device=device)) % 60  # 60 tokens; rows may be more
            hidden, state = model.read(tokens[:, None], state=state)
            true_hidden, true_state = exact.read(tokens[:, None], state=true_state)
            logits = step.advance(tokens)
            step.position.seen += 1
            triples.append((logits.clone(), model.head(hidden)[:, 0], exact.head(true_hidden)[:, 0]))
            if not is_half:
                check(*triples[-1], number)
    check(*(torch.stack(each) for each in zip(*triples, strict=True)), "all steps")
    after = step.export()
    assert after.seen == state.seen and torch.equal(after.lengths, state.lengths)
    for layer, (got, want, truth) in enumerate(zip(after.layers, state.layers, true_state.layers, strict=True)):
        triples = [(got, want, truth)] if torch.is_tensor(want) else zip(got, want, truth, strict=True)
        for ours, theirs, true in triples:
            assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
            check(ours, theirs, true, f"state of layer {layer}")


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_plain_step_is_read(name, rows, whole):
    check_step(lambda model, rows: PlainStep(model, rows, 64, whole), CONFIGS[name], rows)


def test_the_plain_step_in_double_precision():
    check_step(lambda model, rows: PlainStep(model, rows, 64, whole=False), DEBUG, 2, torch.float64, bound=1e-12)


class Favourite(LogitsProcessor):
    """Looks at the host at each step, as a captured choice could not."""

    def __call__(self, input_ids, scores):
        scores[:, input_ids.shape[1] % 50] += float(scores.max()) / 2
        return scores


class Odd(StoppingCriteria):
    """Ends a row at an odd token beyond 40."""

    def __call__(self, input_ids, scores, **kwargs):
        return (input_ids[:, -1] > 40) & (input_ids[:, -1] % 2 == 1)


ENDS = [7, *range(20, 34)]
CALLS = {
    "greedy": {},
    "ends": {"eos_token_id": ENDS},
    "sampled": {"do_sample": True, "temperature": 1.3, "top_k": 20, "top_p": 0.95},
    "sampled with ends": {"do_sample": True, "top_k": 0, "eos_token_id": ENDS},
    "several a prompt": {"do_sample": True, "num_return_sequences": 2},
    "repetition penalty": {"repetition_penalty": 1.5, "min_new_tokens": 4},
    "own processor": {"logits_processor": LogitsProcessorList([Favourite()])},
    "own criterion": {"stopping_criteria": StoppingCriteriaList([Odd()])},
    "beams": {"num_beams": 3},
    "without a cache": {"use_cache": False},
}


def check_call(model, rows: int, call: dict, new: int = NEW) -> None:
    """The same tokens with and without `jrt.decoding`."""
    prompts = make_prompts(rows, model.device)
    arguments = {"do_sample": False, "max_new_tokens": new} | call
    torch.manual_seed(2)
    ours = model.generate(**prompts, **arguments)
    with by_transformers():
        torch.manual_seed(2)
        theirs = model.generate(**prompts, **arguments)
    assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", CALLS)
def test_generate_gives_transformers_tokens(name, rows):
    check_call(make_model(), rows, CALLS[name])


def check_outputs(model, rows: int, new: int = NEW) -> None:
    """The same scores, logits and cache, from which both go on alike."""
    arguments = {"max_new_tokens": new, "do_sample": False, "return_dict_in_generate": True, "eos_token_id": ENDS}
    arguments |= {"output_scores": True, "output_logits": True}
    prompts = make_prompts(rows, model.device)
    ours = model.generate(**prompts, **arguments)
    with by_transformers():
        theirs = model.generate(**prompts, **arguments)
    assert torch.equal(ours.sequences, theirs.sequences)
    for name in ("scores", "logits"):
        for got, want in zip(ours[name], theirs[name], strict=True):
            assert torch.equal(got.isfinite(), want.isfinite())
            assert largest_error(got[got.isfinite()], want[want.isfinite()]) <= CLOSE
    assert ours[CACHE].state.seen == theirs[CACHE].state.seen == ours.sequences.shape[1] - 1
    last = ours.sequences[:, -1:]
    with torch.no_grad():
        got, want = (model(last, past_key_values=outputs[CACHE]).logits for outputs in (ours, theirs))
    assert largest_error(got, want) <= CLOSE


@pytest.mark.parametrize("rows", [1, 3])
def test_scores_logits_and_cache_are_transformers_own(rows):
    check_outputs(make_model(), rows)


def test_a_cache_that_was_given_goes_on_and_is_moved_on():
    model, prompts = make_model(), make_prompts(1)
    sequences = []
    for loop in (by_transformers(), mock.MagicMock()):
        with loop, torch.no_grad():
            cache = model(prompts["input_ids"][:, :-1], use_cache=True)[CACHE]
            arguments = {"past_key_values": cache, "max_new_tokens": NEW, "do_sample": False}
            sequences.append(model.generate(prompts["input_ids"], **arguments))
            assert cache.get_seq_length() == PROMPT + NEW - 1
    assert torch.equal(*sequences)


class Collected(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


def test_a_streamer_gets_every_token():
    model, streamer = make_model(), Collected()
    out = model.generate(**make_prompts(1), max_new_tokens=NEW, do_sample=False, streamer=streamer)
    assert streamer.tokens == out[0].tolist() and streamer.ended


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ({"use_cache": False}, "use_cache is off"),
        ({"max_new_tokens": NEW}, "forward hooks"),
        ({"max_new_tokens": 10**12, "eos_token_id": list(range(60))}, "columns, and states of a fixed size"),
    ],
)
def test_what_it_cannot_serve_goes_to_transformers_with_a_reason(call, reason, caplog):
    model = make_model()
    if "hooks" in reason:
        model.model.norm.register_forward_hook(lambda module, inputs, output: output)
    with caplog.at_level(logging.DEBUG, logger="jrt"):
        model.generate(**make_prompts(1), do_sample=False, **({"max_new_tokens": 2} | call))
    assert reason in caplog.text


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_left_to_transformers(name, dtype, caplog):
    """Layers then give half precision, and the buffers have the dtype of the weights."""
    with torch.autocast("cpu", dtype), caplog.at_level(logging.DEBUG, logger="jrt"):
        check_call(make_model(CONFIGS[name]), 2, {})
    assert "autocast is on" in caplog.text


WAITS = {
    "a streamer": lambda: {"streamer": Collected()},
    "a logits processor": lambda: {"logits_processor": LogitsProcessorList([Favourite()])},
    "a stopping criterion": lambda: {"stopping_criteria": StoppingCriteriaList([Odd()])},
    "scores or logits": lambda: {"output_scores": True, "return_dict_in_generate": True},
}


@pytest.mark.parametrize("reason", [*WAITS, None])
def test_the_host_sees_each_token_for_a_reason(reason, monkeypatch):
    texts = []

    class Recorded(decoding_loop.Text):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            texts.append(self)

    monkeypatch.setattr(decoding_loop, "Text", Recorded)
    call = {"eos_token_id": ENDS} if reason is None else WAITS[reason]()
    make_model().generate(**make_prompts(1), do_sample=False, max_new_tokens=3, **call)
    [text] = texts
    assert text.reason_to_wait() is None if reason is None else reason in text.reason_to_wait()


@gpu
@pytest.mark.parametrize("reason", WAITS)
def test_a_captured_step_says_why_the_host_chooses(reason, caplog):
    model, call = make_model(device="cuda"), WAITS[reason]() | {"max_new_tokens": 40, "do_sample": False}
    expected = "the cache is wanted" if "return_dict_in_generate" in call else reason
    with caplog.at_level(logging.DEBUG, logger="jrt"):
        model.generate(**make_prompts(1, "cuda"), **call)
    assert f"the host chooses each token: {expected}" in caplog.text


@pytest.mark.parametrize("name", ["norm.weight", "log_decay"])
def test_a_kept_step_sees_new_values_or_is_dropped(name):
    """A step copies the decay, and no weight."""
    model = make_model(CONFIGS["decay"]).model
    sessions = Sessions()
    sessions.kept.append((_addresses(model), Session(PlainStep(model, 2, 64, whole=True))))
    assert sessions.find(model, 2, 64) is not None
    model.load_state_dict({name: 2 * model.state_dict()[name]}, strict=False)
    assert (sessions.find(model, 2, 64) is None) == (name == "log_decay")


def test_a_copy_of_a_model_starts_without_sessions():
    model = make_model()
    model.sessions.kept.append(((), mock.sentinel.session))
    assert isinstance(copy.deepcopy(model).sessions, Sessions) and not copy.deepcopy(model).sessions.kept


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kernels", [True, False])
def test_a_step_that_is_dropped_is_gone_at_once(name, kernels):
    """Its states may fill the GPU: they cannot wait for Python to look for cycles."""
    if kernels:
        pytest.importorskip("triton")
    model = make_model(CONFIGS[name]).model
    gc.collect()
    gc.disable()
    try:
        step = fused(model, 2) if kernels else PlainStep(model, 2, 64, whole=True)
        kept = weakref.ref(step), *(weakref.ref(buffers) for buffers in step.buffers)
        del step
        assert all(reference() is None for reference in kept)
    finally:
        gc.enable()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU itself")
@pytest.mark.parametrize("rows", [1, 2])
def test_triton_kernels_in_the_interpreter(rows, monkeypatch):
    """Triton looks for its interpreter once: a process of its own."""
    if not INTERPRETED:
        pass_in_the_interpreter(f"{__file__}::test_triton_kernels_in_the_interpreter[{rows}]")
        return
    from jrt.decoding.fused import FusedStep
    from jrt.ops.steps import launch

    monkeypatch.setattr(launch, "PROGRAMS", 4)  # the interpreter is slow
    for config in CONFIGS.values():
        check_step(lambda model, rows: FusedStep(model, rows, 64), config, rows, steps=2)
    check_likeliest(rows, torch.float32, "cpu")


def check_likeliest(rows: int, dtype: torch.dtype, device: str) -> None:
    """Of equal logits the first, as `torch.argmax` on a GPU; over several blocks of the vocabulary."""
    from jrt.ops.steps import choice

    count = 2 * choice.BLOCK + 100
    logits = torch.randn(rows, count, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits[0, [300, choice.BLOCK + 1, count - 1]] = 99
    logits[-1, count - 1] = 100
    largest, places = torch.zeros(rows, 3, device=device), torch.zeros(rows, 3, dtype=torch.int32, device=device)
    tokens = torch.zeros(rows, dtype=torch.long, device=device)
    choice.likeliest(logits.to(device), largest, places, tokens)
    expected = [(row == row.max()).nonzero()[0, 0].item() for row in logits]
    assert tokens.tolist() == expected


def fused(model, rows, capacity=64):
    from jrt.decoding.fused import FusedStep

    return FusedStep(model, rows, capacity)


@gpu
@pytest.mark.parametrize("rows", [1, 3, 20, 70])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_kernels_are_read(name, rows, dtype):
    check_step(fused, CONFIGS[name], rows, getattr(torch, dtype), "cuda")


@gpu
@pytest.mark.parametrize("rows", [1, 3, 200])
def test_long_texts_and_wide_models_are_read(rows):
    """Sums over inputs and rings of keys are cut into parts."""
    config = dataclasses.replace(DEBUG, pattern="CPSA", width=512, mlp_width=768, heads=4, linear_heads=4, window=300)
    check_step(lambda model, rows: fused(model, rows, 3000), config, rows, torch.bfloat16, "cuda", prompt=1500)


@gpu
@pytest.mark.parametrize("rows", [1, 130])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_likeliest_token(rows, dtype):
    check_likeliest(rows, dtype, "cuda")


@gpu
@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", CALLS)
def test_a_captured_step_gives_transformers_tokens(name, rows, kernels, monkeypatch):
    if not kernels:
        monkeypatch.setattr("jrt.decoding.fused.unsupported", lambda model: "switched off")
    check_call(make_model(device="cuda"), rows, CALLS[name], new=40)


@gpu
def test_a_captured_step_gives_scores_logits_and_cache():
    check_outputs(make_model(device="cuda"), 3, new=40)


@gpu
def test_a_session_serves_later_calls_and_sees_new_weights():
    model = make_model(device="cuda")
    check_call(model, 2, {}, new=40)
    [(_, session)] = model.sessions.kept
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
    check_call(model, 2, {}, new=33)
    assert model.sessions.kept[0][1] is session
    model.half()
    model.generate(**make_prompts(2, "cuda"), max_new_tokens=40, do_sample=False)
    assert all(kept is not session for _, kept in model.sessions.kept)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
def test_int8_weights(device):
    """PyTorch's own step takes them; on a GPU it is captured."""
    quantization = pytest.importorskip("torchao.quantization")
    model = make_model(device=device)
    quantization.quantize_(
        model,
        quantization.Int8WeightOnlyConfig(),
        lambda module, name: isinstance(module, torch.nn.Linear) and "head" not in name,
    )
    check_call(model, 2, {}, new=40)
    sessions = [session for _, session in model.sessions.kept]
    assert [type(session.step) for session in sessions] == ([PlainStep] if device == "cuda" else [])
    assert all(isinstance(session, CapturedSession) for session in sessions)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("rule", ["none", "pad", "repeat", "iterate"])
def test_prompts_that_were_filled_up_go_on_as_in_transformers_loop(rule, rows):
    """A filled prompt has more columns than `generate` counts, and a window longer than the prompt shows them."""
    config = dataclasses.replace(DEBUG, pattern="CPSA", window=40, enc_length=64)
    model, prompts = make_model(config), make_prompts(rows)
    settings = {
        "short_prompt": rule,
        "max_new_tokens": NEW,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    ours = model.generate(**prompts, **settings)
    with by_transformers():
        theirs = model.generate(**prompts, **settings)
    assert torch.equal(ours.sequences, theirs.sequences)
    for got, want in zip(ours.logits, theirs.logits, strict=True):
        assert largest_error(got, want) <= CLOSE
    if rule != "iterate":
        assert ours[CACHE].get_seq_length() == theirs[CACHE].get_seq_length()
        more = torch.full((rows, 1), 11)
        goes_on = [model(more, past_key_values=output[CACHE]).logits for output in (ours, theirs)]
        assert largest_error(*goes_on) <= CLOSE
