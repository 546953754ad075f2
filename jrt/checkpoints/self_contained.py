"""Adds a model's source files to its folder, so that transformers can load it where `jrt` is not installed.

transformers loads such a folder with `trust_remote_code=True`. It copies the file that `auto_map` in config.json names,
and the files in the same folder that this one imports. It does not look into subfolders. So `jrt/mixers/attention.py`
is written as `mixers_attention.py`, and so on. Only the imports inside jrt are changed, to relative ones. `ops.py` is
`jrt/ops/portable.py`, which has no compiled kernels.
"""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path

from transformers import PreTrainedModel

OPS, PORTABLE_OPS = "jrt.ops", "jrt.ops.portable"
IMPORT = re.compile(r"^from (jrt[\w.]*) import ", re.MULTILINE)
HEADER = "# From jrt {version} (Apache-2.0), written by `jrt convert --self-contained`: change it there.\n"


def make_self_contained(folder: Path, model_class: type[PreTrainedModel], version: str) -> None:
    """Writes the files that `model_class` needs into a folder of `save_pretrained`, and names them in its
    config.json."""
    for name, text in source_files(model_class.__module__, version).items():
        (folder / name).write_text(text, encoding="utf-8")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config_class = model_class.config_class
    assert config_class is not None
    config["auto_map"] = {
        "AutoConfig": f"{_flat(config_class.__module__)}.{config_class.__name__}",
        "AutoModelForCausalLM": f"{_flat(model_class.__module__)}.{model_class.__name__}",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def source_files(module: str, version: str) -> dict[str, str]:
    """{file name: text} of a module of this package and of all modules of the package that it imports, directly or
    not."""
    files: dict[str, str] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if f"{_flat(name)}.py" in files:
            continue
        text = _source(PORTABLE_OPS if name == OPS else name)
        waiting += IMPORT.findall(text)
        relative = IMPORT.sub(lambda found: f"from .{_flat(found[1])} import ", text)
        files[f"{_flat(name)}.py"] = HEADER.format(version=version) + relative
    return files


def _flat(module: str) -> str:
    """The name of a module's file in the folder, without `.py`."""
    return module.removeprefix("jrt.").replace(".", "_")


def _source(module: str) -> str:
    spec = find_spec(module)
    assert spec is not None and spec.origin is not None, f"there is no module {module}"
    return Path(spec.origin).read_text(encoding="utf-8")
