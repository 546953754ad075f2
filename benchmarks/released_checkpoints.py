"""Measures time and peak memory of converting and loading full-size checkpoints in the released format.

    python benchmarks/released_checkpoints.py --json benchmarks/results/released_checkpoints.json

JRT-1B and attn-1B are written with random weights in the released format (config.json, and pytorch_model.bin with
`model.` names and the trainer's counters). They are converted, and both forms are loaded on the CPU and, if there is
one, on the GPU. Each stage runs in a process of its own. If the logits of a loaded model differ from those of the
released form, the run ends without a figure.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import record
import torch

import jrt
from jrt.checkpoints.convert import convert
from jrt.config import Config
from jrt.model import LanguageModel

MODELS = {"JRT-1B-50B": "jrt-1.3b", "attn-1b-50bn": "attention-1.3b"}
BOUND = 1.2  # host memory / the file's size
GPU_BOUND = 1.02  # GPU memory / the weights' size: nothing is held twice
TOKENS = torch.arange(1, 33)[None]
COMMON = {
    "model_type": "gpt2",
    "activation_function": "swiglu",
    "n_positions": 0,
    "vocab_size": 50257,
    "rms_norm": True,
    "residual_in_fp32": True,
    "layer_norm_epsilon": 1e-5,
}


def released_config(core: Config) -> dict:
    """Returns the config.json of a released model with these sizes."""
    config = COMMON | {"n_embd": core.width, "n_head": core.heads, "n_layer": len(core.pattern)}
    if core.pattern == "A" * len(core.pattern):
        return config | {"n_inner": None, "rotary_emb_fraction": 0.5, "pad_vocab_size_multiple": 16}
    start = "based.models.mixers."
    return config | {
        "n_inner": core.mlp_width,
        "rotary_emb_fraction": 1,
        "pad_vocab_size_multiple": 8,
        "mixer": {"_target_": start + "convolution.BaseConv", "expand_proj": 4, "kernel_sizes": [3], "use_bias": True},
        "alt_mixer": {
            "_target_": start + "prefix_linear_attention.PrefixLinearAttention",
            "num_heads": core.linear_heads,
            "feature_dim": core.feature_dim,
            "enc_length": core.enc_length,
            "use_mask": True,
        },
        "alt_mixer_layers": [layer for layer, letter in enumerate(core.pattern) if letter == "P"],
        "alt_mixer_2": {"_target_": start + "slide_attention.SlidingAttention", "window_size": 256, "causal": True},
        "alt_mixer_2_layers": [layer for layer, letter in enumerate(core.pattern) if letter == "S"],
    }


def released_name(name: str) -> str:
    """A tensor's name in the released files."""
    fixed = {
        "embedding.weight": "transformer.embeddings.word_embeddings.weight",
        "norm.weight": "transformer.ln_f.weight",
        "head.weight": "lm_head.weight",
    }
    layer = name.replace("blocks.", "transformer.layers.").replace("mixer.conv.", "mixer.conv.conv.")
    return "model." + fixed.get(name, layer)


def write_released(folder: Path, preset: str) -> None:
    core = jrt.presets()[preset]
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LanguageModel(core).state_dict().items()}
    device = "cuda" if torch.cuda.is_available() else "cpu"  # draws faster
    weights = {f"{part}_metrics.num-tokens.count": torch.tensor(1) for part in ("train", "val", "test")}
    for name, shape in shapes.items():
        tensor = torch.ones(shape) if "norm" in name else torch.empty(shape, device=device).normal_(std=0.02).cpu()
        weights[released_name(name)] = tensor
    weights["model.lm_head.weight"] = weights["model.transformer.embeddings.word_embeddings.weight"]
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(released_config(core), indent=2))
    torch.save(weights, folder / "pytorch_model.bin")


def resident_peak() -> int:
    """Returns the peak resident memory of this process so far, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def stage(name: str, source: Path, out: Path, device: str, dtype: str | None) -> dict:
    """Runs one stage in this process. Returns seconds, bytes, and for a load the logits of a short text."""
    if device == "cuda":
        torch.cuda.init()
        torch.zeros(1, device="cuda")
    before, start, found = resident_peak(), time.perf_counter(), {}
    if name == "convert":
        convert(source, out)
    else:
        model = jrt.load(source, device=device, dtype=None if dtype is None else getattr(torch, dtype))
        if device == "cuda":
            torch.cuda.synchronize()
            found["gpu_bytes"] = torch.cuda.max_memory_allocated()
            found["weight_bytes"] = sum(parameter.nbytes for parameter in model.parameters())
    found |= {"seconds": time.perf_counter() - start, "host_bytes": resident_peak() - before}
    if name == "load":
        with torch.no_grad():
            logits = model(TOKENS.to(device)).logits.float().cpu()
        torch.save(logits, out)
        found["parameters"] = model.num_parameters()
    return found


def in_process(*arguments: object) -> dict:
    """Runs `stage` in a fresh process, forked from one that has imported everything and done nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["jrt.checkpoints.convert"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(stage, *arguments).result()


def measure(name: str, work: Path) -> list[dict]:
    """Runs all stages of one model. Its files are removed at the end."""
    source, converted = work / name, work / f"{name}-converted"
    start = time.perf_counter()
    write_released(source, MODELS[name])
    size = (source / "pytorch_model.bin").stat().st_size
    print(f"{name}: wrote {size / 1e9:.2f} GB with random weights in {time.perf_counter() - start:.0f} s")
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    plan = [("convert", source, converted, "cpu", None)]
    plan += [("load", folder, work / "logits.pt", d, None) for d in devices for folder in (source, converted)]
    plan += [("load", converted, work / "logits.pt", device, "bfloat16") for device in devices]
    rows, truth = [], None
    for method, folder, out, device, dtype in plan:
        found = in_process(method, folder, out, device, dtype)
        error = bound = None
        if method == "load":
            logits = torch.load(out)
            truth = logits if truth is None else truth
            error = ((logits - truth).norm() / truth.norm()).item()
            bound = 0.05 if dtype else 1e-3 if device == "cuda" else 0.0
            if not error <= bound:
                raise SystemExit(f"{name} {method} {device} {dtype}: logits differ by {error:.1e}, bound {bound:.1e}")
        if "gpu_bytes" in found and found["gpu_bytes"] > GPU_BOUND * found["weight_bytes"]:
            raise SystemExit(f"{name} {dtype}: the GPU held {found['gpu_bytes']} bytes for {found['weight_bytes']}")
        form = "converted" if folder == converted else "released"
        row = {"method": method, "shape": {"model": name, "form": form, "device": device, "dtype": dtype or "float32"}}
        row |= found | {"file_bytes": size, "host_ratio": found["host_bytes"] / size, "host_bound": BOUND}
        rows.append(row | {"error": error, "bound": bound})
        gpu = f"  GPU {found['gpu_bytes'] / found['weight_bytes']:.2f} x the weights" if "gpu_bytes" in found else ""
        print(
            f"  {method:8s}{form:10s}{device:5s}{dtype or 'float32':9s}{found['seconds']:7.1f} s"
            f"  host {found['host_bytes'] / 1e9:5.2f} GB = {row['host_ratio']:.2f} x the file{gpu}"
        )
    shutil.rmtree(source)
    shutil.rmtree(converted)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--folder", type=Path, help="where to write the checkpoints (12 GB); None: a temporary folder")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    args = parser.parse_args()
    os.environ["TQDM_DISABLE"] = "1"  # of the stages
    rows = []
    with tempfile.TemporaryDirectory(dir=args.folder) as work:
        for name in args.models:
            rows += measure(name, Path(work))
    if args.json:
        record.write("released_checkpoints", rows, args.json)


if __name__ == "__main__":
    main()
