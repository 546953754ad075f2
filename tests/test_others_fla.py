"""GLA, a model of flash-linear-attention, compared with an fp64 loop written from the paper, and evaluated.

The tests need no network. They use a folder with random weights in the layout of `fla-hub/gla-*`. The package's kernels
need a GPU."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from jrt.cli import main
from jrt.evaluate.models import ModelSpec, open_model
from jrt.foreign.architectures import register_architecture

WIDTH, LAYERS, HEADS, NORMALIZER, EPS = 64, 2, 2, 16, 1e-6
WORDS = "the valve opens slowly when pressure in the outer chamber rises above one bar and closes again"
ROUNDING = 8 * 2**-11  # of the largest logit: the package multiplies fp32 in TF32, whose unit is 2^-11
INSTALLED = importlib.util.find_spec("fla") is not None


def gla_folder(folder: Path, tokenizer: Path) -> Path:
    """As fla-hub/gla-1.3B-100B has it, smaller: the fields of its config.json that matter."""
    folder.mkdir()
    fields = {"model_type": "gla", "architectures": ["GLAForCausalLM"], "hidden_size": WIDTH, "vocab_size": 50257}
    fields |= {"num_hidden_layers": LAYERS, "num_heads": HEADS, "expand_k": 0.5, "expand_v": 1, "hidden_act": "swish"}
    (folder / "config.json").write_text(json.dumps(fields))
    for file in tokenizer.iterdir():
        shutil.copy(file, folder)
    return folder


def save_random_gla(folder: Path, tokenizer: Path) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    gla_folder(folder, tokenizer)
    register_architecture(str(folder))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    return folder


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight


def by_the_paper(w: dict[str, Tensor], ids: Tensor) -> Tensor:
    """Logits (T, V) of one sequence: gated linear attention (arXiv 2312.06635, section 4), a token at a time, fp64."""
    hidden = w["model.embeddings.weight"][ids]  # (T, E)
    for layer in range(LAYERS):
        start = f"model.layers.{layer}."
        part = {name.removeprefix(start): tensor for name, tensor in w.items() if name.startswith(start)}
        x = rms_norm(hidden, part["attn_norm.weight"])
        q, k, v, gate = ((x @ part[f"attn.{name}_proj.weight"].T).unflatten(-1, (HEADS, -1)) for name in "qkvg")
        low = x @ part["attn.gk_proj.0.weight"].T @ part["attn.gk_proj.1.weight"].T + part["attn.gk_proj.1.bias"]
        decay = (F.logsigmoid(low) / NORMALIZER).exp().unflatten(-1, (HEADS, -1))  # (T, H, d)
        state = torch.zeros(HEADS, k.shape[-1], v.shape[-1], dtype=torch.float64)
        outputs = []
        for time in range(len(ids)):
            state = decay[time][..., None] * state + k[time][..., None] * v[time][:, None]
            outputs.append(torch.einsum("hd,hdv->hv", q[time] * q.shape[-1] ** -0.5, state))
        mixed = rms_norm(torch.stack(outputs), part["attn.g_norm_swish_gate.weight"]) * F.silu(gate)
        hidden = hidden + mixed.flatten(1) @ part["attn.o_proj.weight"].T
        x = rms_norm(hidden, part["mlp_norm.weight"])
        inner = F.silu(x @ part["mlp.gate_proj.weight"].T) * (x @ part["mlp.up_proj.weight"].T)
        hidden = hidden + inner @ part["mlp.down_proj.weight"].T
    return rms_norm(hidden, w["model.norm.weight"]) @ w["lm_head.weight"].T


@pytest.fixture
def untuned(monkeypatch):
    """Kernels of the package take the first two of their configurations: all compute the same, and to try each of them
    takes minutes."""
    from triton.runtime.autotuner import Autotuner

    every = Autotuner.prune_configs
    monkeypatch.setattr(Autotuner, "prune_configs", lambda tuner, arguments: every(tuner, arguments)[:2])


@pytest.mark.skipif(INSTALLED, reason="flash-linear-attention is installed")
def test_without_the_package_one_line_names_it(tmp_path, shared):
    with pytest.raises(ValueError, match=r"'gla'.*pip install flash-linear-attention") as told:
        open_model(ModelSpec(str(gla_folder(tmp_path / "gla", shared / "gpt2"))))
    assert "\n" not in str(told.value) and "unknown model" not in str(told.value)


@pytest.mark.skipif(INSTALLED, reason="flash-linear-attention is installed")
@pytest.mark.parametrize(
    "command",
    [
        ["-m", "jrt", "info", "MODEL"],
        ["-m", "jrt", "doctor", "MODEL"],
        ["-m", "jrt", "generate", "--prompt", "a", "--model", "MODEL"],
        ["-m", "jrt", "eval", "--tasks", "squad", "--output", "OUT", "--model", "MODEL"],
        [
            "-c",
            "from jrt_recall.harness import main; main()",
            "--model",
            "hf",
            "--model_args",
            "pretrained=MODEL",
            "--tasks",
            "recall_squad",
        ],
    ],
    ids=lambda words: " ".join(words[1:3]),
)
def test_every_command_names_the_package(tmp_path, shared, command):
    gla = gla_folder(tmp_path / "gla", shared / "gpt2")
    words = [word.replace("MODEL", str(gla)).replace("OUT", str(tmp_path / "out")) for word in command]
    ended = subprocess.run([sys.executable, *words], check=False, capture_output=True, text=True)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert "'gla'" in ended.stderr.splitlines()[-1]
    assert "pip install flash-linear-attention" in ended.stderr.splitlines()[-1]


@pytest.mark.gpu
@pytest.mark.skipif(not INSTALLED, reason="needs flash-linear-attention")
@pytest.mark.parametrize("length", [1, 40, 130])
@pytest.mark.usefixtures("untuned")
def test_it_computes_what_the_paper_says(tmp_path, shared, length):
    """Within ROUNDING."""
    opened = open_model(ModelSpec(str(save_random_gla(tmp_path / "gla", shared / "gpt2")), device="cuda"))
    assert type(opened.model).__name__ == "GLAForCausalLM"
    ids = torch.arange(7, 7 + length) * 977 % 50257
    with torch.no_grad():
        logits = opened.model(ids[None].cuda()).logits[0].double().cpu()
    truth = by_the_paper({name: tensor.double().cpu() for name, tensor in opened.model.state_dict().items()}, ids)
    assert (logits - truth).abs().max() <= ROUNDING * truth.abs().max()


@pytest.mark.gpu
@pytest.mark.skipif(not INSTALLED, reason="needs flash-linear-attention")
@pytest.mark.usefixtures("untuned")
def test_it_is_evaluated(tmp_path, shared):
    """Rows of different lengths share a batch, or not, as the probe says; every answer is what greedy decoding of the
    same prompt alone gives, up to a token where the two largest logits are as near as rounding."""
    folder = save_random_gla(tmp_path / "gla", shared / "gpt2")
    words = WORDS.split()
    texts = [" ".join(words[(3 * i + j * (i + 1)) % len(words)] for j in range(4 + 40 * i)) for i in range(4)]
    rows = [
        {"context": text, "question": f"what does {words[i]} do?", "answers": ["x"]} for i, text in enumerate(texts)
    ]
    (tmp_path / "squad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "run"
    given = ["eval", "--model", str(folder), "--tasks", "qa_squad", "--passages", str(tmp_path)]
    assert main([*given, "--output", str(output), "--device", "cuda", "--dtype", "float32"]) == 0
    found = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
    assert len(found) == len(rows)
    opened = open_model(ModelSpec(str(folder), device="cuda"))
    for row in found:
        ids = opened.tokenizer(row["prompt"], return_tensors="pt")["input_ids"].cuda()
        alone = opened.model.generate(
            ids, max_new_tokens=48, do_sample=False, pad_token_id=0, output_logits=True, return_dict_in_generate=True
        )
        new = alone.sequences[0, ids.shape[1] :]

        def text(tokens):
            return opened.tokenizer.decode(tokens, skip_special_tokens=True).split("\n")[0]

        if row["prediction"] != text(new):
            equal = [n for n in range(len(new)) if row["prediction"].startswith(text(new[:n]))]
            logits = alone.logits[max(equal)][0].float()
            largest, second = logits.topk(2).values
            assert largest - second <= 2 * ROUNDING * logits.abs().max()
