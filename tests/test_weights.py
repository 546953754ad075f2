"""Broken or hostile checkpoints: they give one clear error, run no code, and use no large memory."""

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import jrt
from jrt.checkpoints.convert import convert
from jrt.checkpoints.files import CheckpointError
from jrt.config import Config
from jrt.configuration_jrt import JRTConfig
from jrt.modeling_jrt import JRTForCausalLM

WIDTH, ROWS = 16, 96
GPT = {
    "model_type": "gpt2",
    "n_embd": WIDTH,
    "n_head": 2,
    "n_layer": 2,
    "n_inner": 256,
    "vocab_size": 90,
    "n_positions": 0,
    "activation_function": "swiglu",
    "rms_norm": True,
    "rotary_emb_fraction": 0.5,
}


def weights() -> dict[str, torch.Tensor]:
    """A released attention checkpoint of two layers."""
    torch.manual_seed(0)
    found = {"transformer.embeddings.word_embeddings.weight": torch.randn(ROWS, WIDTH)}
    for layer in range(2):
        start = f"transformer.layers.{layer}."
        found[start + "norm1.weight"] = found[start + "norm2.weight"] = torch.ones(WIDTH)
        found[start + "mixer.Wqkv.weight"] = torch.randn(3 * WIDTH, WIDTH)
        found[start + "mixer.out_proj.weight"] = torch.randn(WIDTH, WIDTH)
        found[start + "mlp.fc1.weight"] = torch.randn(512, WIDTH)
        found[start + "mlp.fc2.weight"] = torch.randn(WIDTH, 256)
    found["transformer.ln_f.weight"] = torch.ones(WIDTH)
    found["lm_head.weight"] = found["transformer.embeddings.word_embeddings.weight"]
    counter = {"val_metrics.num-tokens.count": torch.tensor(7)}
    return {"model." + name: tensor for name, tensor in found.items()} | counter


LINEAR = {"_target_": "a.LinearAttention"}
FC2 = "model.transformer.layers.1.mlp.fc2.weight"


@pytest.fixture
def folder(tmp_path) -> Path:
    """A sound checkpoint for a test to spoil."""
    (tmp_path / "config.json").write_text(json.dumps(GPT))
    torch.save(weights(), tmp_path / "pytorch_model.bin")
    return tmp_path


def spoilt(folder: Path, **changes: object) -> None:
    """Writes the weights again with other values; None leaves a tensor out."""
    found = weights() | changes
    torch.save({name: value for name, value in found.items() if value is not None}, folder / "pytorch_model.bin")


def refused(folder: Path, match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        jrt.load(folder)
    assert len(str(caught.value).splitlines()) == 1


def test_the_sound_checkpoint_loads(folder):
    assert jrt.load(folder)(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, ROWS)


@pytest.mark.parametrize("keep", [0, 10, 5_000, -100])
def test_truncated(folder, keep):
    file = folder / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:keep])
    refused(folder, "truncated, corrupted|no weight")


@pytest.mark.parametrize("keep", [0, 4, 200, -10])
def test_truncated_safetensors(folder, keep):
    (folder / "pytorch_model.bin").unlink()
    file = folder / "model.safetensors"
    save_file({name: tensor.clone() for name, tensor in weights().items()}, file)
    assert jrt.load(folder).num_parameters() > 0
    file.write_bytes(file.read_bytes()[:keep])
    refused(folder, "truncated, corrupted")


def test_corrupted_bytes(folder):
    file = folder / "pytorch_model.bin"
    content = bytearray(file.read_bytes())
    content[100:400] = os.urandom(300)  # in the pickle
    file.write_bytes(content)
    refused(folder, "truncated, corrupted|expected")


def test_no_pickle_at_all(folder):
    (folder / "pytorch_model.bin").write_bytes(b"<html>404 not found</html>" * 100)
    refused(folder, "truncated, corrupted or no weight file")


class Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("zipped", [True, False])
def test_no_code_runs(folder, zipped):
    mark = folder / "executed"
    torch.save(weights() | {"x": Bomb(mark)}, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    refused(folder, "truncated, corrupted or no weight file .expected named tensors only")  # no advice to run it
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(mark)))
    refused(folder, "truncated, corrupted or no weight file")
    assert not mark.exists()


class Asking:
    """Asks for a bytearray of any length, one of the few calls that `weights_only` grants a pickle."""

    def __reduce__(self):
        return bytearray, (4 << 30,)


@pytest.mark.parametrize("zipped", [True, False])
def test_no_memory_is_granted_to_a_pickle(folder, zipped):
    torch.save(weights() | {"x": Asking()}, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    refused(folder, "holds a bytearray")
    assert peak_bytes(folder) < 100 << 20


def test_whatever_the_unpickler_stumbles_over(folder):
    """Every byte of the pickle, turned into the operation that takes most off its stack, and a few others."""
    file = folder / "pytorch_model.bin"
    with zipfile.ZipFile(file) as archive:
        members = {member.filename: archive.read(member) for member in archive.infolist()}
    name = next(name for name in members if name.endswith("data.pkl"))
    for operation in b"t\x85uRbe.Q":
        for position in range(2, 150, 7):
            content = bytearray(members[name])
            content[position] = operation
            with zipfile.ZipFile(file, "w") as archive:
                for member, other in members.items():
                    archive.writestr(member, bytes(content) if member == name else other)
            try:
                jrt.load(folder)
            except ValueError as error:
                assert len(str(error).splitlines()) == 1


def test_messages_are_one_printable_line(folder):
    spoilt(folder, **{"model.a\nb\x1b[31m": torch.ones(2), "model." + "x" * 100_000: torch.ones(2)})
    with pytest.raises(CheckpointError) as caught:
        jrt.load(folder)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 2000


def test_old_norms_of_layers_that_are_not_there(folder, tmp_path_factory):
    first = {"model.transformer.ln_0.weight": torch.ones(WIDTH)}
    kept = []
    for layers in (10**9, "2", 2.5, [1]):
        (folder / "config.json").write_text(json.dumps(GPT | {"n_layer": layers}))
        spoilt(folder, **first)
        kept.append(shutil.copytree(folder, tmp_path_factory.mktemp("kept") / "folder"))
        with pytest.raises(ValueError):
            jrt.load(folder)
    assert peak_bytes(*kept) < 100 << 20
    (folder / "config.json").write_text(json.dumps(GPT))
    refused(folder, "are both transformer.ln_f.weight")


@pytest.mark.parametrize(
    ("value", "match"),
    [
        ([1.0, 2.0], "is a list; expected named tensors"),
        (3, "is a int; expected named tensors"),
        ({"nested": torch.ones(2)}, "is a dict; expected named tensors"),
        (torch.ones(WIDTH, 256, dtype=torch.int64), "is torch.int64; expected one of"),
        (torch.ones(WIDTH, 256, dtype=torch.complex64), "is torch.complex64; expected one of"),
        (torch.ones(WIDTH, 256).to(torch.float8_e4m3fn), "float8_e4m3fn; expected one of"),
        (torch.ones(WIDTH, 256).to_sparse(), "sparse"),
        (torch.ones(1, 1).expand(WIDTH, 256), "expanded tensor"),
        (torch.ones(1, 1).expand(10**7, 10**7), "expanded tensor"),
        (torch.full((WIDTH, 256), torch.nan), "NaN or infinite"),
        (torch.full((WIDTH, 256), torch.inf), "NaN or infinite"),
        (torch.ones(WIDTH, 255), "has shape"),
        (torch.ones(WIDTH), "has shape"),
        (torch.ones(0), "has shape"),
        (None, "missing"),
    ],
)
def test_one_wrong_tensor(folder, value, match):
    spoilt(folder, **{FC2: value})
    refused(folder, match)


def test_not_a_dictionary(folder):
    torch.save([torch.ones(2)], folder / "pytorch_model.bin")
    refused(folder, "holds a list")


def test_left_over_tensors(folder):
    spoilt(folder, **{"model.transformer.layers.0.mixer.unknown.weight": torch.ones(2)})
    refused(folder, "no place in the model: .*unknown")
    spoilt(folder, **{"model.transformer.layers.2.norm1.weight": torch.ones(WIDTH)})
    refused(folder, "left over .*blocks.2")


def test_the_same_tensor_twice(folder):
    spoilt(folder, **{FC2.removeprefix("model."): torch.ones(WIDTH, 256)})
    with pytest.raises(ValueError, match="both"):
        jrt.load(folder)


def test_an_untied_head_in_a_tied_model(folder):
    spoilt(folder, **{"model.lm_head.weight": torch.randn(ROWS, WIDTH)})
    refused(folder, "head.weight differs")


def test_compressed(folder):
    file = folder / "pytorch_model.bin"
    with zipfile.ZipFile(file) as archive:
        members = {member.filename: archive.read(member) for member in archive.infolist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    refused(folder, "compressed")


def test_safetensors_that_declare_what_they_do_not_hold(folder):
    (folder / "pytorch_model.bin").unlink()
    header = json.dumps({FC2: {"dtype": "F32", "shape": [10**9, 10**9], "data_offsets": [0, 4 * 10**18]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    refused(folder, "truncated, corrupted")
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}")
    refused(folder, "truncated, corrupted")
    entry = '"a": {"dtype": "F32", "shape": [1], "data_offsets": [%d, %d]}'
    header = ("{" + entry % (0, 4) + "," + entry % (4, 8) + "}").encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 8)
    refused(folder, "truncated, corrupted")


def sharded(folder: Path, places: object) -> None:
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))


def test_shards(folder):
    found = weights()
    names = list(found)
    (folder / "pytorch_model.bin").unlink()
    half = len(names) // 2
    for file, part in (("one.bin", names[:half]), ("two.bin", names[half:])):
        torch.save({name: found[name] for name in part}, folder / file)
    sharded(folder, {name: "one.bin" if index < half else "two.bin" for index, name in enumerate(names)})
    assert jrt.load(folder).num_parameters() > 0
    torch.save({name: found[name] for name in names[half - 1 :]}, folder / "two.bin")
    refused(folder, "stands in two files")
    (folder / "two.bin").unlink()
    refused(folder, "shards that are not there: two.bin")
    sharded(folder, {"a": "../one.bin"})
    refused(folder, "outside the folder")
    sharded(folder, {"a": "/etc/passwd"})
    refused(folder, "outside the folder")
    sharded(folder, {"a": "x" * 5000})  # longer than the name of a file can be
    refused(folder, "shards that are not there: xxx")
    for places in ([], 3, {"a": 3}, {"a": None}, {"a": ["one.bin"]}):
        sharded(folder, places)
        refused(folder, "no index of shards")
    (folder / "pytorch_model.bin.index.json").write_text("{")
    refused(folder, "not JSON")


ORDER = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


@pytest.mark.parametrize("first", range(len(ORDER)))
def test_the_same_files_are_chosen_as_transformers_chooses(first, tmp_path):
    """All that come after the first in this order are there too, with other weights."""
    own_model().config.save_pretrained(tmp_path)
    for number in range(first, len(ORDER)):
        found = {name: torch.full_like(tensor, 1.0 + number) for name, tensor in own_weights().items()}
        save, end = (save_file, "safetensors") if "safetensors" in ORDER[number] else (torch.save, "bin")
        if ORDER[number].endswith("index.json"):
            save(found, tmp_path / f"shard-1-of-1.{end}")
            places = {"weight_map": dict.fromkeys(found, f"shard-1-of-1.{end}"), "metadata": {}}
            (tmp_path / ORDER[number]).write_text(json.dumps(places))
        else:
            save(found, tmp_path / ORDER[number], **({"metadata": {"format": "pt"}} if end == "safetensors" else {}))
    ours = jrt.load(tmp_path).model.norm.weight
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).model.norm.weight
    assert ours.unique().tolist() == theirs.unique().tolist() == [1.0 + first]


def own_weights() -> dict[str, torch.Tensor]:
    """The tensors of `own_model`, the tied one once."""
    return {name: tensor.clone() for name, tensor in own_model().state_dict().items() if name != "model.head.weight"}


def own_model() -> JRTForCausalLM:
    config = Config(pattern="AC", width=WIDTH, vocab_rows=ROWS, heads=2)
    return JRTForCausalLM(JRTConfig(architecture=config.to_dict()))


def test_a_whole_save_beside_older_shards(tmp_path):
    old, new = own_model(), own_model()
    old.save_pretrained(tmp_path, max_shard_size="1KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    new.save_pretrained(tmp_path / "new")
    shutil.copy(tmp_path / "new" / "model.safetensors", tmp_path)
    for name, tensor in jrt.load(tmp_path).state_dict().items():
        assert torch.equal(tensor, new.state_dict()[name]), name


def test_weights_that_a_configuration_names_are_not_looked_for(tmp_path):
    own_model().save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"transformers_weights": "other.safetensors"}))
    refused(tmp_path, "transformers_weights")


@pytest.mark.parametrize(
    "fields",
    [
        {"eos_token_id": [0, 5]},
        {"eos_token_id": 3, "pad_token_id": 4},
        {"max_new_tokens": 7, "repetition_penalty": 1.5, "do_sample": True, "temperature": 0.5},
        {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": None},
        {},
    ],
)
def test_the_generation_configuration_is_the_folder_s(fields, tmp_path):
    own_model().save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps(fields))
    found, expected = (load(tmp_path).generation_config for load in (jrt.load, AutoModelForCausalLM.from_pretrained))
    assert found.to_dict() == expected.to_dict()
    ids = torch.tensor([[1, 2, 3]])
    options = dict(attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=0)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).generate(ids, **options)
    assert torch.equal(jrt.load(tmp_path).generate(ids, **options), theirs)


def test_a_second_end_token_ends_a_generation_and_survives_a_conversion(tmp_path):
    model, ids = own_model(), torch.tensor([[1, 2, 3]])
    options = dict(attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0)
    stop = model.generate(ids, max_new_tokens=1, **options)[0, -1].item()
    model.generation_config.eos_token_id = [(stop + 1) % ROWS, stop]
    model.save_pretrained(tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "out")
    for folder in (tmp_path / "model", tmp_path / "out"):
        assert jrt.load(folder).generate(ids, max_new_tokens=9, **options).shape == (1, 4)
    endless = jrt.load(tmp_path / "model", compat="released")  # whose loop had no end token
    assert endless.generation_config.eos_token_id is None
    assert endless.generate(ids, max_new_tokens=9, **options).shape == (1, 12)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "not JSON"),
        ("[1]", "holds a list"),
        ('{"eos_token_id": "end"}', "eos_token_id"),
        ('{"eos_token_id": [1, [2]]}', "eos_token_id"),
        ('{"pad_token_id": 1.5}', "pad_token_id"),
        ('{"eos_token_id": 1' + "0" * 30 + "}", "eos_token_id"),
        ('{"bos_token_id": true}', "bos_token_id"),
        ('{"max_new_tokens": -1}', "generation configuration"),
        ('{"cache_implementation": 3}', "generation configuration"),
        ('{"a": [' + "[]," * (6 << 20) + "[]]}", "too large"),
    ],
)
def test_generation_configurations_that_are_none(text, match, folder):
    (folder / "generation_config.json").write_text(text)
    refused(folder, match)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1]", "holds a list"),
        ("\xff\xfe", "not JSON|no "),
        ("{}", "unknown model"),
        ('{"a": [' + "[]," * (6 << 20) + "[]]}", "too large"),
        ('{"model_type": "llama"}', "llama"),
    ],
)
def test_configurations_that_are_none(folder, text, match):
    (folder / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=match):
        jrt.load(folder)
    (folder / "config.json").unlink()
    refused(folder, "no config.json")


@pytest.mark.parametrize(
    "change",
    [
        {"n_layer": 10**12},
        {"n_layer": 3},
        {"n_layer": -1},
        {"n_layer": "2"},
        {"n_layer": None},
        {"n_layer": True},
        {"n_embd": 10**15},
        {"n_embd": 15},
        {"n_head": 10**15},
        {"n_head": 3},
        {"n_head": 0},
        {"n_inner": 10**18},
        {"n_inner": "wide"},
        {"vocab_size": 10**18},
        {"vocab_size": "many"},
        {"vocab_size": -5},
        {"rotary_emb_fraction": 1e9},
        {"rotary_emb_fraction": -1},
        {"rotary_emb_fraction": "half"},
        {"layer_norm_epsilon": "small"},
        {"layer_norm_epsilon": 10**20},
        {"layer_norm_epsilon": float("nan")},
        {"mixer": [1]},
        {"mixer": "conv"},
        {"mixer": {"_target_": "os.system", "command": "true"}},
        {"mixer": {"_target_": "a.SlidingAttention", "window_size": "wide"}},
        {"mixer": {"_target_": "a.BaseConv", "kernel_size": 10**18}},
        {"alt_mixer": LINEAR | {"num_heads": 10**9, "feature_dim": 10**9}, "alt_mixer_layers": [1]},
        {"alt_mixer": LINEAR | {"num_heads": "4"}, "alt_mixer_layers": [1]},
        {"alt_mixer": LINEAR, "alt_mixer_layers": 5},
        {"rms_norm": False},
        {"activation_function": "gelu"},
        {"n_positions": 1024},
    ],
)
def test_configurations_that_do_not_fit(folder, change):
    (folder / "config.json").write_text(json.dumps(GPT | change))
    with pytest.raises(ValueError) as caught:
        jrt.load(folder)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"pattern": 3},
        {"pattern": "X"},
        {"pattern": "A" * 1000},
        {"width": 10**15},
        {"width": "16"},
        {"width": None},
        {"linear_heads": 2**62, "pattern": "L", "width": 2**62},
        {"conv_kernel": 2**62, "pattern": "CC"},
        {"biases": 3},
        {"biases": ["everything"]},
        {"unknown": 1},
        None,
        "text",
        {"quirks": {"no_such_quirk": True}},
        {"quirks": {"double_add": "false"}},
        {"quirks": ["double_add"]},
        {"short_prompt": None},
        {"short_prompt_token": 2.5},
        {"short_prompt_token": True},
        {"short_prompt": "sometimes"},
        {"eos_token_id": "end"},
        {"eos_token_id": [1, None, {}]},
        {"pad_token_id": 10**30},
        {"vocab_tokens": "x"},
        {"vocab_tokens": ROWS + 1},
        {"heads": 16, "rotary_dim": 4},
        {"rotary_dim": None},
        {"rotary_dim": 2**63},
        {"norm_eps": "x"},
        {"norm_eps": float("nan")},
        {"window": "64", "pattern": "S"},
        {"window": -1, "pattern": "S"},
        {"tied": "yes"},
    ],
)
def test_own_configurations_that_do_not_fit(tmp_path, change):
    config = Config(pattern="AA", width=WIDTH, vocab_rows=ROWS, heads=2)
    JRTForCausalLM(JRTConfig(architecture=config.to_dict())).save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    if isinstance(change, dict) and set(change) <= {
        "quirks",
        "short_prompt",
        "short_prompt_token",
        "vocab_tokens",
        "eos_token_id",
        "pad_token_id",
    }:
        raw |= change
    else:
        raw["architecture"] = raw["architecture"] | change if isinstance(change, dict) else change
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError) as caught:
        jrt.load(tmp_path)
    assert len(str(caught.value).splitlines()) == 1


def test_transformers_own_fields_are_not_read(tmp_path):
    """`num_labels` alone would make a table of as many names."""
    config = Config(pattern="AA", width=WIDTH, vocab_rows=ROWS, heads=2)
    JRTForCausalLM(JRTConfig(architecture=config.to_dict())).save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"num_labels": 10**8, "dtype": [1]}))
    assert jrt.load(tmp_path).num_parameters() > 0
    assert peak_bytes(tmp_path) < 100 << 20


PEAK = """
import resource, sys, torch, jrt
from pathlib import Path
from jrt.modeling_jrt import JRTForCausalLM
import jrt.checkpoints.load
def peak(): return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024
before = peak()
for folder in sys.argv[1:]:
    try:
        model = jrt.load(folder, dtype={dtype})
        with torch.no_grad():
            assert all(bool(p.sum().isfinite()) for p in model.parameters())
    except ValueError as error:
        print("refused", error, file=sys.stderr)
print(peak() - before)
"""


def peak_bytes(*folders: Path, dtype: torch.dtype | None = None) -> int:
    """Memory that loading one after the other takes at its worst, in a process of its own."""
    if not Path("/proc/self/status").is_file():
        pytest.skip("measures through /proc")
    done = subprocess.run(
        [sys.executable, "-c", PEAK.format(dtype=dtype), *map(str, folders)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(Path(jrt.__file__).parents[1]), "OMP_NUM_THREADS": "1"},
    )
    return int(done.stdout)


@pytest.mark.parametrize("layout", ["bin", "safetensors"])
def test_loading_takes_no_more_than_the_file(tmp_path, layout):
    width, rows = 1024, 30_000
    (tmp_path / "config.json").write_text(json.dumps(GPT | {"n_embd": width, "n_inner": 8192, "vocab_size": rows}))
    found = {"transformer.embeddings.word_embeddings.weight": torch.ones(rows, width)}
    for layer in range(2):
        start = f"transformer.layers.{layer}."
        found[start + "norm1.weight"], found[start + "norm2.weight"] = torch.ones(width), torch.ones(width)
        found[start + "mixer.Wqkv.weight"] = torch.ones(3 * width, width)
        found[start + "mixer.out_proj.weight"] = torch.ones(width, width)
        found[start + "mlp.fc1.weight"] = torch.ones(2 * 8192, width)
        found[start + "mlp.fc2.weight"] = torch.ones(width, 8192)
    found["transformer.ln_f.weight"] = torch.ones(width)
    if layout == "bin":
        found["lm_head.weight"] = found["transformer.embeddings.word_embeddings.weight"]
        file = tmp_path / "pytorch_model.bin"
        torch.save(found, file)
    else:
        file = tmp_path / "model.safetensors"
        save_file(found, file)
    size = file.stat().st_size
    assert size > 3e8
    for dtype in (None, torch.bfloat16):
        assert peak_bytes(tmp_path, dtype=dtype) <= 1.2 * size, dtype


def test_hostile_files_take_no_memory(folder, tmp_path_factory):
    kept = []

    def keep() -> None:
        kept.append(shutil.copytree(folder, tmp_path_factory.mktemp("kept") / "folder"))

    spoilt(folder, **{FC2: torch.ones(1, 1).expand(10**6, 10**6)})
    keep()
    (folder / "config.json").write_text(json.dumps(GPT | {"n_embd": 10**6, "vocab_size": 10**9, "n_inner": 10**8}))
    spoilt(folder)
    keep()
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    (folder / "pytorch_model.bin").unlink()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    keep()
    assert peak_bytes(*kept) < 100 << 20


def test_saving_over_the_loaded_folder(tmp_path):
    """The weights are mapped from the very file that is being written."""
    config = Config(pattern="CA", width=WIDTH, vocab_rows=ROWS, heads=2)
    JRTForCausalLM(JRTConfig(architecture=config.to_dict())).save_pretrained(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    model = jrt.load(tmp_path / "one")
    model.save_pretrained(tmp_path / "one")
    again, reference = jrt.load(tmp_path / "one"), jrt.load(tmp_path / "two")
    for (name, found), expected in zip(again.named_parameters(), reference.parameters(), strict=True):
        assert torch.equal(found, expected), name
