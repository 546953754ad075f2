"""Writes this package's models as one Python file, so that a folder loads where `jrt` is not installed.

The file is made of the package's own source: starting from the classes that transformers asks for, every definition
that is reached is copied, module by module. `jrt.ops.portable` stands in for the choice of backends.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

FILE = "modeling_jrt.py"
ROOTS = (
    ("jrt.modeling_jrt", "JRTConfig"),
    ("jrt.modeling_jrt", "JRTForCausalLM"),
    ("jrt.released.modeling", "ReleasedForCausalLM"),
)
AUTO_MAP = {"AutoConfig": "JRTConfig", "AutoModelForCausalLM": "JRTForCausalLM"}
PORTABLE = ("linear_attention", "encode_prefix", "selective_scan")  # of jrt.ops, taken from jrt.ops.portable
Definition = tuple[str, str]  # a module and a top-level name in it
HEADER = '''"""JRT, Based, attention and Mamba language models in one file, for `trust_remote_code=True`.

Written by `jrt convert --self-contained` out of jrt {version} (Apache-2.0): change it there. It computes what jrt
computes, in plain PyTorch; jrt itself is faster on a GPU.
"""

from __future__ import annotations

'''


@dataclass
class _Module:
    """One source file: its top-level definitions, and what its imports mean."""

    name: str
    text: str
    statements: dict[str, ast.stmt] = field(default_factory=dict)  # {top-level name: the statement that binds it}
    own_imports: dict[str, Definition] = field(default_factory=dict)  # {name: (module of jrt, name there)}
    other_imports: dict[str, str] = field(default_factory=dict)  # {name: import line}

    @classmethod
    def read(cls, name: str) -> _Module:
        module = cls(name, Path(importlib.util.find_spec(name).origin).read_text())
        for statement in ast.parse(module.text).body:
            match statement:
                case ast.ImportFrom(module=source) if source.split(".")[0] == "jrt":
                    for alias in statement.names:
                        module.own_imports[alias.asname or alias.name] = (source, alias.name)
                case ast.ImportFrom(module=source) if source != "__future__":
                    for alias in statement.names:
                        module.other_imports[alias.asname or alias.name] = f"from {source} import {_spelled(alias)}"
                case ast.Import():
                    for alias in statement.names:
                        module.other_imports[alias.asname or alias.name.split(".")[0]] = f"import {_spelled(alias)}"
                case ast.FunctionDef() | ast.ClassDef():
                    module.statements[statement.name] = statement
                case ast.Assign(targets=[ast.Name(id=bound)]) | ast.AnnAssign(target=ast.Name(id=bound)):
                    module.statements[bound] = statement
        return module


def modelling_source(version: str) -> str:
    """The text of the modelling file, the same for every model."""
    modules: dict[str, _Module] = {}
    reached: dict[Definition, None] = {}
    for module, name in ROOTS:
        _reach(module, name, modules, reached)
    final = _final_names(reached)
    imports, sections = set(), []
    for module in _in_order(modules, reached):
        names = [name for name in module.statements if (module.name, name) in reached]
        pieces = [_copied(module, module.statements[name], modules, final) for name in dict.fromkeys(names)]
        for piece in pieces:
            used = _names_in(ast.parse(piece))
            imports |= {line for name, line in module.other_imports.items() if name in used}
        sections.append(_section(module, pieces))
    return HEADER.format(version=version) + _import_block(imports) + "".join(sections)


def make_self_contained(folder: Path, version: str) -> None:
    """Adds the modelling file to a folder that `save_pretrained` wrote, and names it in its config.json."""
    (folder / FILE).write_text(modelling_source(version))
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {auto: f"{Path(FILE).stem}.{name}" for auto, name in AUTO_MAP.items()}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _reach(module_name: str, name: str, modules: dict[str, _Module], reached: dict[Definition, None]) -> None:
    """Marks a definition and, before it, everything of this package that it mentions."""
    module_name, name = _where(module_name, name, modules)
    if (module_name, name) in reached:
        return
    reached[module_name, name] = None
    module = modules[module_name]
    for used in _names_in(module.statements[name]):
        if used in module.own_imports or used in module.statements:
            _reach(module_name, used, modules, reached)


def _where(module_name: str, name: str, modules: dict[str, _Module]) -> Definition:
    """The module and name of a definition, followed through imports."""
    if module_name == "jrt.ops" and name in PORTABLE:
        module_name = "jrt.ops.portable"
    if module_name not in modules:
        modules[module_name] = _Module.read(module_name)
    module = modules[module_name]
    if name in module.statements:
        return module_name, name
    assert name in module.own_imports, f"{module_name} has no definition {name}"
    return _where(*module.own_imports[name], modules)


def _final_names(reached: dict[Definition, None]) -> dict[Definition, str]:
    """{definition: its name in the file}; the same name in two modules gets the module's in front, in helpers."""
    owners: dict[str, list[str]] = {}
    for module, name in reached:
        owners.setdefault(name, []).append(module)
    keeps = {"jrt.ops.portable", "jrt.mixers", *(module for module, _ in ROOTS)}
    final = {}
    for module, name in reached:
        clashes = len(owners[name]) > 1 and module not in keeps
        stem = module.rsplit(".", 1)[-1]
        stem = stem.upper() if name.isupper() else stem
        final[module, name] = f"{'_' * name.startswith('_')}{stem}_{name.lstrip('_')}" if clashes else name
    taken = list(final.values())
    assert len(set(taken)) == len(taken), "two definitions have the same name in the modelling file"
    return final


def _in_order(modules: dict[str, _Module], reached: dict[Definition, None]) -> list[_Module]:
    """The modules that are part of the file, each after those it imports."""
    order: list[str] = []
    seen: set[str] = set()

    def visit(name: str) -> None:
        if name in seen or name not in modules:
            return
        seen.add(name)
        for source, imported in modules[name].own_imports.values():
            visit("jrt.ops.portable" if source == "jrt.ops" and imported in PORTABLE else source)
        order.append(name)

    for module, _ in ROOTS:
        visit(module)
    return [modules[name] for name in order if any(module == name for module, _ in reached)]


def _copied(module: _Module, statement: ast.stmt, modules: dict[str, _Module], final: dict[Definition, str]) -> str:
    """The source of a statement, comments included, with names as they are in the file."""
    renames = {}
    for used in {*_names_in(statement), getattr(statement, "name", "")}:
        if used in module.own_imports or used in module.statements:
            renamed = final[_where(module.name, used, modules)]
            if renamed != used:
                renames[used] = renamed
    for node in ast.walk(statement):
        bound = node.arg if isinstance(node, ast.arg) else None
        assert bound not in renames, f"{module.name}: the parameter {bound} hides a definition that is renamed"
        local = isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jrt")
        assert not local, f"{module.name}: an import inside a definition cannot be copied"
    lines = module.text.splitlines()
    places = [
        (node.lineno, node.col_offset, node.id)
        for node in ast.walk(statement)
        if isinstance(node, ast.Name) and node.id in renames
    ]
    if getattr(statement, "name", "") in renames:
        keyword = "class " if isinstance(statement, ast.ClassDef) else "def "
        places.append((statement.lineno, statement.col_offset + len(keyword), statement.name))
    for line, column, name in sorted(places, reverse=True):
        text = lines[line - 1].encode()  # columns count bytes
        assert text[column : column + len(name)].decode() == name
        lines[line - 1] = (text[:column] + renames[name].encode() + text[column + len(name) :]).decode()
    first = min([statement.lineno, *(node.lineno for node in getattr(statement, "decorator_list", ()))])
    while first > 1 and module.text.splitlines()[first - 2].startswith("# "):
        first -= 1
    registers = {node.lineno for node in ast.walk(statement) if _imports_jrt(node)}  # of no use in a single file
    return "\n".join(lines[number - 1] for number in range(first, statement.end_lineno + 1) if number not in registers)


def _imports_jrt(node: ast.AST) -> bool:
    """Whether this is the statement `importlib.import_module("jrt....")`."""
    match node:
        case ast.Expr(value=ast.Call(func=ast.Attribute(attr="import_module"), args=[ast.Constant(value=str(name))])):
            return name.split(".")[0] == "jrt"
    return False


def _section(module: _Module, pieces: list[str]) -> str:
    """A module's definitions under its docstring, which holds the legend of shapes."""
    docstring = ast.get_docstring(ast.parse(module.text)) or ""
    heading = "\n".join(f"# {line}".rstrip() for line in (f"---- {module.name}", *docstring.splitlines()))
    text = f"\n\n{heading}\n"
    for piece in pieces:
        text += ("\n\n" if piece.startswith(("def ", "class ", "@")) or "\ndef " in piece else "\n") + piece + "\n"
    return text


def _import_block(lines: set[str]) -> str:
    standard = {line for line in lines if line.split()[1].split(".")[0] in sys.stdlib_module_names}
    return "\n".join([*sorted(standard), "", *sorted(lines - standard), ""])


def _names_in(statement: ast.AST) -> list[str]:
    return list(dict.fromkeys(node.id for node in ast.walk(statement) if isinstance(node, ast.Name)))


def _spelled(alias: ast.alias) -> str:
    return alias.name if alias.asname is None else f"{alias.name} as {alias.asname}"
