"""`jrt.checkpoints.convert`: what comes out equals what went in, loads elsewhere, and appears whole or not at all."""

import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors import safe_open

import jrt
from jrt.checkpoints.convert import convert, sha256
from jrt.checkpoints.self_contained import modelling_source
from jrt.config import Config
from jrt.configuration_jrt import JRTConfig
from jrt.modeling_jrt import JRTForCausalLM

GOLDENS = ("jrt_main", "jrt_f16", "based_fla", "based_decay_legacy", "attn", "attn_oddrotary_m128", "mamba")

# Loads folders with transformers alone and keeps what they compute; {prepare} decides whether jrt can be imported.
ELSEWHERE = """
import sys
{prepare}
import torch
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, **{options}).eval()
    ids = torch.load(folder + ".ids")
    with torch.no_grad():
        logits = model(ids).logits
        batch = torch.cat([ids[:1, :20], torch.cat([ids.new_zeros(1, 8), ids[1:, :12]], 1)])
        mask = torch.cat([torch.ones(1, 20), torch.cat([torch.zeros(1, 8), torch.ones(1, 12)], 1)]).long()
        new = model.generate(batch, attention_mask=mask, max_new_tokens=5, do_sample=False)[:, -5:]
    decay = model.model.state_dict().get("log_decay")
    torch.save(dict(logits=logits, new=new, decay=decay, module=type(model).__module__), folder + ".found")
assert ("jrt" in sys.modules) == {jrt}
"""
BLOCKED = """
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("jrt", "jrt_kernels", "jrt_recall"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
"""


def loaded_elsewhere(folders: dict[Path, torch.Tensor], tmp_path: Path, *, self_contained: bool) -> list[dict]:
    """What another process computes, started elsewhere with nothing of this one but the folders (and their tokens)."""
    for folder, ids in folders.items():
        torch.save(ids, f"{folder}.ids")
    script = ELSEWHERE.format(
        prepare=BLOCKED if self_contained else "import jrt",
        options={"trust_remote_code": True} if self_contained else {},
        jrt=not self_contained,
    )
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    if not self_contained:
        environment["PYTHONPATH"] = str(Path(jrt.__file__).parents[1])
    flags = ["-I"] if self_contained else []
    done = subprocess.run(
        [sys.executable, *flags, "-c", script, *map(str, folders)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(f"{folder}.found") for folder in folders]


def token_ids(model, batch: int = 2, length: int = 40) -> torch.Tensor:
    rows = model.config.vocab_tokens
    return torch.randint(0, rows, (batch, length), generator=torch.Generator().manual_seed(0))


def decoded(model, ids: torch.Tensor) -> torch.Tensor:
    batch = torch.cat([ids[:1, :20], torch.cat([ids.new_zeros(1, 8), ids[1:, :12]], 1)])
    mask = torch.cat([torch.ones(1, 20), torch.cat([torch.zeros(1, 8), torch.ones(1, 12)], 1)]).long()
    return model.generate(batch, attention_mask=mask, max_new_tokens=5, do_sample=False)[:, -5:]


@pytest.mark.parametrize("golden", GOLDENS)
def test_round_trip_keeps_every_bit(golden, shared, tmp_path):
    source = shared / "golden" / golden
    before = jrt.load(source)
    after = jrt.load(convert(source, tmp_path / "out"))
    ids = token_ids(before)
    with torch.no_grad():
        assert torch.equal(before(ids).logits, after(ids).logits)
    assert torch.equal(decoded(before, ids), decoded(after, ids))
    for name in ("short_prompt", "quirks", "vocab_tokens", "architecture", "eos_token_id"):
        assert getattr(before.config, name) == getattr(after.config, name), name
    released = jrt.load(tmp_path / "out", compat="released")
    assert torch.equal(decoded(jrt.load(source, compat="released"), ids), decoded(released, ids))


def test_the_card_names_every_file_with_its_hash(shared, tmp_path):
    source = shared / "golden" / "jrt_main"
    out = convert(source, tmp_path / "out", self_contained=True)
    card = (out / "README.md").read_text()
    for file in (source / "pytorch_model.bin", source / "config.json", *out.iterdir()):
        assert file.name == "README.md" or f"| `{file.name}` | {file.stat().st_size:,} | `{sha256(file)}` |" in card
    for text in (card, (out / "config.json").read_text()):
        assert str(shared) not in text and str(tmp_path) not in text


def test_loads_in_a_fresh_process(shared, tmp_path):
    """In the source's dtype, and in bfloat16, where the decay stays in fp32."""
    names = ("jrt_main", "based_decay_legacy")
    models = {name: jrt.load(shared / "golden" / name) for name in names}
    folders = [convert(shared / "golden" / name, tmp_path / name) for name in names]
    folders.append(convert(shared / "golden" / names[1], tmp_path / "half", dtype=torch.bfloat16))
    half = jrt.load(tmp_path / "half")
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert half.model.log_decay.dtype == torch.float32
    assert torch.equal(half.model.log_decay, models[names[1]].model.log_decay)
    ids = token_ids(half)
    results = loaded_elsewhere(dict.fromkeys(folders, ids), tmp_path, self_contained=False)
    for model, found in zip((*models.values(), half), results, strict=True):
        assert found["module"] == "jrt.modeling_jrt"
        assert found["logits"].dtype == model.dtype
        assert found["decay"] is None or found["decay"].dtype == torch.float32
        with torch.no_grad():
            assert torch.equal(found["logits"], model(ids).logits)
        assert torch.equal(found["new"], decoded(model, ids))


def test_self_contained_folders_load_without_jrt(shared, tmp_path):
    names = ("jrt_main", "based_decay_legacy", "attn_oddrotary_m128", "mamba")
    models = [jrt.load(shared / "golden" / name) for name in names]
    folders = [convert(shared / "golden" / name, tmp_path / name, self_contained=True) for name in names]
    tokens = {folder: token_ids(model) for folder, model in zip(folders, models, strict=True)}
    results = loaded_elsewhere(tokens, tmp_path, self_contained=True)
    for model, (folder, ids), found in zip(models, tokens.items(), results, strict=True):
        assert found["module"].startswith("transformers_modules")
        with torch.no_grad():
            torch.testing.assert_close(found["logits"], model(ids).logits, rtol=1e-5, atol=1e-5)
            assert torch.equal(jrt.load(folder)(ids).logits, model(ids).logits)  # still a folder of this package
        assert torch.equal(found["new"], decoded(model, ids))


def test_the_modelling_file_names_nothing_of_this_package():
    source = modelling_source("0")
    for node in ast.walk(ast.parse(source)):
        imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        imported += [node.module] if isinstance(node, ast.ImportFrom) else []
        assert not {name.split(".")[0] for name in imported} & {"jrt", "jrt_kernels", "triton"}
    assert 'import_module("jrt' not in source


def test_the_modelling_file_trains(tmp_path):
    """Gradients of the file's own scan equal those of the package's."""
    bundled = imported(tmp_path)
    config = Config(pattern="MC", width=16, vocab_rows=32)
    torch.manual_seed(0)
    ours = JRTForCausalLM(JRTConfig(architecture=config.to_dict()))
    theirs = bundled.JRTForCausalLM(bundled.JRTConfig(architecture=config.to_dict()))
    theirs.load_state_dict(ours.state_dict())
    ids = torch.randint(0, 32, (2, 40))
    ours.train()(ids, labels=ids).loss.backward()
    theirs.train()(ids, labels=ids).loss.backward()
    for (name, own), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-4, atol=1e-6, msg=name)


def imported(folder: Path) -> ModuleType:
    file = folder / "bundled.py"
    file.write_text(modelling_source("0"))
    spec = importlib.util.spec_from_file_location("bundled", file)
    module = sys.modules["bundled"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_large_results_are_sharded(shared, tmp_path, monkeypatch):
    source = shared / "golden" / "jrt_main"
    monkeypatch.setattr("jrt.checkpoints.convert.SHARD", "1MB")
    out = convert(source, tmp_path / "out")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    shards = set(index["weight_map"].values())
    assert len(shards) > 1
    for shard in shards:
        with safe_open(out / shard, "pt") as opened:
            assert set(opened.keys()) == {name for name, file in index["weight_map"].items() if file == shard}
    model, ids = jrt.load(source), token_ids(jrt.load(source))
    with torch.no_grad():
        assert torch.equal(jrt.load(out)(ids).logits, model(ids).logits)
    again = convert(out, tmp_path / "again")  # shards are a source as well
    with torch.no_grad():
        assert torch.equal(jrt.load(again)(ids).logits, model(ids).logits)


def test_a_tokenizer_comes_along(shared, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for file in (*(shared / "golden" / "attn").iterdir(), *(shared / "gpt2").glob("*.json")):
        (source / file.name).symlink_to(file)
    out = convert(source, tmp_path / "out")
    text = "The quick brown fox; 東京"
    assert jrt.load_tokenizer(out)(text).input_ids == jrt.load_tokenizer(source)(text).input_ids


def test_refuses_a_folder_that_holds_something(shared, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="not empty"):
        convert(shared / "golden" / "attn", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        convert(shared / "golden" / "attn", tmp_path / "file")


def test_leaves_nothing_behind_when_it_fails(shared, tmp_path, monkeypatch):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{}")
    with pytest.raises(ValueError):
        convert(tmp_path / "broken", tmp_path / "out")
    monkeypatch.setattr("jrt.checkpoints.convert.make_self_contained", lambda *_: 1 / 0)  # in the middle of writing
    with pytest.raises(ZeroDivisionError):
        convert(shared / "golden" / "attn", tmp_path / "out", self_contained=True)
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_fills_an_empty_folder(shared, tmp_path):
    (tmp_path / "out").mkdir()
    out = convert(shared / "golden" / "attn", tmp_path / "out")
    assert (out / "README.md").is_file()
    assert oct(out.stat().st_mode & 0o777) == "0o755"
