"""Model folders with generated JSON files: opening and asking such a model gives an answer or a ValueError."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jrt_recall import PROTOCOLS
from jrt_recall.tokenizers import shipped_tokenizer
from random_models import save_random_model

from jrt.evaluate import ModelSpec, open_model
from jrt.evaluate.answering import answer, encode, prompt_limit

sys.path.insert(0, str(ROOT / "benchmarks"))
import tiny_models

FILES = ("config.json", "generation_config.json", "tokenizer_config.json")
OURS = ("CL", "CPSLAM")
OTHERS = ("llama", "gpt2", "mamba2", "lfm2")
# Names that some configuration has and others do not.
MORE = (
    *("max_seq_len", "n_positions", "model_max_length", "use_cache", "cache_implementation", "torch_dtype", "dtype"),
    *("auto_map", "quantization_config", "tie_word_embeddings", "is_encoder_decoder", "num_beams", "suppress_tokens"),
    *("repetition_penalty", "forced_eos_token_id", "eos_token_id", "pad_token_id", "architectures", "model_type"),
    *("attn_implementation", "rope_scaling", "rope_parameters", "layer_types", "add_bos_token", "tokenizer_class"),
    *(
        "guidance_scale",
        "stop_strings",
        "watermarking_config",
        "min_length",
        "sliding_window",
        "pad_token",
        "bos_token",
    ),
)
TEXT = st.text(max_size=8) | st.sampled_from(
    ["float16", "llama", "jrt", "eager", "sdpa", "static", "no such", "../x", ""]
)
# No large numbers: a model of a million layers is built for hours, whoever builds it.
NUMBER = st.sampled_from([-1, 0, 1, 2, 3, 5, 8, 33, 64, 4095, 4096]) | st.integers(-3, 300) | st.floats()
SCALAR = st.none() | st.booleans() | NUMBER | TEXT
VALUE = st.recursive(
    SCALAR, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=2), max_leaves=4
)
ABSENT = object()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of sound models, by name."""
    root = tmp_path_factory.mktemp("sound")
    found = {pattern: Path(save_random_model(root / pattern, pattern)) for pattern in OURS}
    for kind in OTHERS:
        torch.manual_seed(0)
        config = tiny_models.configuration(kind)
        config.vocab_size = 4096
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(root / kind)
        shipped_tokenizer().save_pretrained(root / kind)
        found[kind] = root / kind
    return found


def changed(draw, content):
    """A JSON object with one to three fields replaced, taken away or added; now and then something else altogether."""
    if draw(st.integers(0, 30)) == 0:
        return draw(VALUE)
    content = dict(content)
    for name in draw(st.lists(st.sampled_from([*content, *MORE]), min_size=1, max_size=3)):
        value = draw(st.just(ABSENT) | VALUE)
        if value is ABSENT:
            content.pop(name, None)
        else:
            content[name] = value
    return content


def open_and_ask(folder: Path) -> None:
    """What `jrt eval` does with a model."""
    opened = open_model(ModelSpec(str(folder)))
    json.dumps(opened.info())
    opened.state_bytes(30)
    protocol = PROTOCOLS["full"]
    limit = prompt_limit(protocol, opened.max_length)
    prompts = ["The valve opens at noon.", "The valve opens at noon, and closes at"]
    asked = [one.ids for one in encode(opened.tokenizer, prompts, limit, opened.vocabulary) if not one.problem]
    if not opened.mode.batches:
        asked = asked[:1]
    if not opened.mode.padding:
        asked = [ids for ids in asked if len(ids) == len(asked[0])]
    if asked:
        assert len(answer(opened, asked, protocol)) == len(asked)


def configurations(folders, work):
    @given(st.data())
    def run(data):
        name = data.draw(st.sampled_from([*OURS, *OTHERS]))
        file = data.draw(st.sampled_from(FILES))
        folder = work / "model"
        if folder.exists():
            shutil.rmtree(folder)
        shutil.copytree(folders[name], folder)
        content = changed(data.draw, json.loads((folder / file).read_text()) if (folder / file).exists() else {})
        (folder / file).write_text(json.dumps(content))
        try:
            open_and_ask(folder)
        except ValueError as error:
            assert str(error)

    return run


@pytest.mark.parametrize("examples", [30, pytest.param(2_000, marks=pytest.mark.slow)])
def test_generated_configurations(examples, folders, tmp_path):
    # Not the same ones each time: the point is to find what nobody thought of.
    quiet = {"deadline": None, "suppress_health_check": list(HealthCheck)}
    settings(max_examples=examples, **quiet)(configurations(folders, tmp_path))()
