"""`jrt.checkpoints.convert`: the converted model equals the original, loads elsewhere, and is never half written."""

import ast
import importlib
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
from jrt.checkpoints.self_contained import source_files
from jrt.config import Config
from jrt.configuration_jrt import JRTConfig
from jrt.modeling_jrt import JRTForCausalLM

GOLDENS = ("jrt_main", "jrt_f16", "based_fla", "based_decay_legacy", "attn", "attn_oddrotary_m128", "mamba")

# Loads folders with transformers alone and keeps what they compute; {prepare} decides whether jrt can be imported.
# Each is loaded, saved by transformers, and loaded again from there.
ELSEWHERE = """
import sys
{prepare}
import torch
from transformers import AutoModelForCausalLM
for name in sys.argv[1:]:
    ids = torch.load(name + ".ids")
    for folder in (name, name + ".again"):
        model = AutoModelForCausalLM.from_pretrained(folder, **{options}).eval()
        with torch.no_grad():
            logits = model(ids).logits
            batch = torch.cat([ids[:1, :20], torch.cat([ids.new_zeros(1, 8), ids[1:, :12]], 1)])
            mask = torch.cat([torch.ones(1, 20), torch.cat([torch.zeros(1, 8), torch.ones(1, 12)], 1)]).long()
            masked = model(batch, attention_mask=mask).logits
            new = model.generate(batch, attention_mask=mask, max_new_tokens=5, do_sample=False)[:, -5:]
        decay = model.model.state_dict().get("log_decay")
        found = dict(logits=logits, masked=masked, new=new, decay=decay, module=type(model).__module__)
        torch.save(found, folder + ".found")
        if folder == name:
            model.save_pretrained(name + ".again")
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
    run_elsewhere(script, [*map(str, folders)], tmp_path, isolated=self_contained)
    found = [torch.load(f"{folder}.found") for folder in folders]
    for folder, first in zip(folders, found, strict=True):
        again = torch.load(f"{folder}.again.found")
        assert torch.equal(again["logits"], first["logits"]) and torch.equal(again["new"], first["new"])
    return found


def run_elsewhere(script: str, arguments: list[str], tmp_path: Path, *, isolated: bool) -> None:
    """Runs Python in another folder, offline; isolated: without this checkout on its path."""
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    if not isolated:
        environment["PYTHONPATH"] = str(Path(jrt.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, *(["-I"] if isolated else []), "-c", script, *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def token_ids(model, batch: int = 2, length: int = 40) -> torch.Tensor:
    rows = model.config.vocab_tokens
    return torch.randint(0, rows, (batch, length), generator=torch.Generator().manual_seed(0))


def padded_batch(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Rows of 20 and 12 tokens."""
    batch = torch.cat([ids[:1, :20], torch.cat([ids.new_zeros(1, 8), ids[1:, :12]], 1)])
    mask = torch.cat([torch.ones(1, 20), torch.cat([torch.zeros(1, 8), torch.ones(1, 12)], 1)]).long()
    return {"input_ids": batch, "attention_mask": mask}


def decoded(model, ids: torch.Tensor) -> torch.Tensor:
    return model.generate(**padded_batch(ids), max_new_tokens=5, do_sample=False)[:, -5:]


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
    """And compute the same to the last bit, several in one process, with the quirks of one of them."""
    names = ("jrt_main", "based_decay_legacy", "attn_oddrotary_m128", "mamba")
    models = [jrt.load(shared / "golden" / name) for name in names]
    folders = [convert(shared / "golden" / name, tmp_path / name, self_contained=True) for name in names]
    models.append(jrt.load(shared / "golden" / "jrt_main", compat="released"))
    models[-1].save_pretrained(tmp_path / "quirks")
    folders.append(convert(tmp_path / "quirks", tmp_path / "jrt_main_quirks", self_contained=True))
    tokens = {folder: token_ids(model) for folder, model in zip(folders, models, strict=True)}
    results = loaded_elsewhere(tokens, tmp_path, self_contained=True)
    for model, (folder, ids), found in zip(models, tokens.items(), results, strict=True):
        assert found["module"].startswith("transformers_modules")
        with torch.no_grad():
            assert torch.equal(found["logits"], model(ids).logits)
            assert torch.equal(found["masked"], model(**padded_batch(ids)).logits)
            assert torch.equal(jrt.load(folder)(ids).logits, model(ids).logits)  # still a folder of this package
        assert torch.equal(found["new"], decoded(model, ids))
    assert not torch.equal(results[0]["masked"], results[-1]["masked"])


HUB = """
import sys
{prepare}
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("somebody/a-jrt.model", trust_remote_code=True)
torch.save(model(torch.arange(20)[None]).logits, sys.argv[1])
"""


def test_a_self_contained_model_loads_from_the_hub_s_cache(shared, tmp_path):
    """Where each file is a link, and transformers fetches what a file imports one by one."""
    folder = convert(shared / "golden" / "based_fla", tmp_path / "model", self_contained=True)
    cache, commit = (
        tmp_path / "hf" / "hub" / "models--somebody--a-jrt.model",
        "0123456789abcdef0123456789abcdef01234567",
    )
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text(commit)
    (cache / "blobs").mkdir()
    (cache / "snapshots" / commit).mkdir(parents=True)
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(cache / "blobs" / str(number))
        (cache / "snapshots" / commit / file.name).symlink_to(Path("..", "..", "blobs", str(number)))
    run_elsewhere(HUB.format(prepare=BLOCKED), [str(tmp_path / "logits")], tmp_path, isolated=True)
    expected = jrt.load(shared / "golden" / "based_fla")(torch.arange(20)[None]).logits
    assert torch.equal(torch.load(tmp_path / "logits"), expected)


def test_a_self_contained_folder_leaves_this_package_s_classes_alone(shared, tmp_path):
    """Its own classes load it until jrt is imported, jrt's from then on."""
    plain = convert(shared / "golden" / "attn", tmp_path / "plain")
    folder = convert(shared / "golden" / "attn", tmp_path / "folder", self_contained=True)
    script = f"""
from transformers import AutoModelForCausalLM
def module(name, **options):
    return type(AutoModelForCausalLM.from_pretrained(name, **options)).__module__.split(".")[0]
assert module({str(folder)!r}, trust_remote_code=True) == "transformers_modules"
import jrt
assert module({str(plain)!r}) == module({str(folder)!r}) == module({str(folder)!r}, trust_remote_code=True) == "jrt"
"""
    run_elsewhere(script, [], tmp_path, isolated=False)


def test_the_source_files_import_nothing_but_each_other_and_public_packages():
    for module in ("jrt.modeling_jrt", "jrt.released.modeling"):
        trees = {name.removesuffix(".py"): ast.parse(text) for name, text in source_files(module, "0").items()}
        for name, tree in trees.items():
            for node in ast.walk(tree):
                imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and node.level == 0:
                    imported.append(node.module)
                elif isinstance(node, ast.ImportFrom):
                    missing = {alias.name for alias in node.names} - bound_names(trees[node.module])
                    assert not missing, f"{name} imports {missing} from {node.module}, which are no names in it"
                assert not {name.split(".")[0] for name in imported} & {"jrt", "jrt_kernels", "triton"}, name


def bound_names(tree: ast.Module) -> set[str]:
    """Names that a module's own statements bind."""
    found = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            found |= {target.id for target in ast.walk(node) if isinstance(target, ast.Name)}
    return found


def test_the_source_files_train(tmp_path):
    """Gradients of the files' own scan equal those of the package's."""
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
        assert torch.equal(own.grad, other.grad), name


def imported(folder: Path) -> ModuleType:
    """The package of source files in a folder."""
    (folder / "bundled").mkdir()
    (folder / "bundled" / "__init__.py").touch()
    for name, text in source_files("jrt.modeling_jrt", "0").items():
        (folder / "bundled" / name).write_text(text)
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module("bundled.modeling_jrt")
    finally:
        sys.path.remove(str(folder))


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


def test_a_generation_configuration_comes_along_as_it_is(shared, tmp_path):
    """Even one that transformers reads and would not write: a temperature without sampling."""
    source = tmp_path / "source"
    source.mkdir()
    for file in (shared / "golden" / "attn").iterdir():
        (source / file.name).symlink_to(file)
    text = json.dumps({"temperature": 0.5, "do_sample": False, "eos_token_id": [1, 2]})
    (source / "generation_config.json").write_text(text)
    out = convert(source, tmp_path / "out")
    assert (out / "generation_config.json").read_text() == text
    assert jrt.load(out).generation_config.to_dict() == jrt.load(source).generation_config.to_dict()


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
