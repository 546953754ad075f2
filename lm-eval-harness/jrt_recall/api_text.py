"""API text: a readable page for a Python module, made from its source with ``ast`` (nothing is imported).

A page is the module's docstring, then for every public class and function, in source order, one heading line and the
first paragraph of its docstring::

    Read and write things.
    class Reader
    Reads records from a stream.
    read(size=-1, *, timeout=None)
    Return at most size records.

A heading ``name(arguments)`` is called a *fact*, because it makes a recall question: given the name, what are the
arguments? Arguments are shown with their defaults, without annotations and without ``self`` or ``cls``. The training
text of the mini models and the ``reference_pages`` task are both made of these strings. A *question* is the line
``name(``, which the model must continue. An *announcement* is the line ``name ?`` in front of the page; it says what
will be asked."""

import ast
import re
from typing import NamedTuple

HEADING = re.compile(r"^([A-Za-z_]\w*)\((.*)\)$")


class Fact(NamedTuple):
    """One heading line of a page: ``page.split("\\n")[line] == f"{name}({arguments})"``."""

    name: str
    arguments: str
    line: int


def question(name: str) -> str:
    """The beginning of a heading. A prompt ends with it; the answer is the arguments and a closing bracket."""
    return f"{name}("


def announcement(name: str) -> str:
    """The line that names what will be asked, for prompts that put the question before the page."""
    return f"{name} ?"


def heading(name: str, arguments: str) -> str:
    """The whole line of a fact, the answer included."""
    return f"{name}({arguments})"


def facts(page: str) -> list[Fact]:
    """All heading lines of a page in order, repeated ones included. Without arguments, ``arguments`` is ``""``."""
    found = []
    for number, line in enumerate(page.split("\n")):
        match = HEADING.match(line)
        if match:
            found.append(Fact(match[1], match[2], number))
    return found


def render(source: str) -> str:
    """Returns the page of one module, given its source code.

    Lines are separated by "\\n", and the last line has none. The page is "" if the module has nothing public and no
    docstring. Raises ``ValueError`` if ``source`` is not valid code for the running Python (a ``SyntaxError`` is turned
    into a ``ValueError``)."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, RecursionError) as error:
        raise ValueError(f"not a Python module that this Python can read: {error}") from error
    lines = _tidy(ast.get_docstring(tree) or "")
    _render_body(tree.body, lines, in_class=False)
    return "\n".join(lines)


def _render_body(body: list[ast.stmt], lines: list[str], in_class: bool) -> None:
    for node in body:
        match node:
            case ast.ClassDef() if not node.name.startswith("_"):
                lines.append(f"class {node.name}")
                lines.extend(_first_paragraph(node))
                _render_body(node.body, lines, in_class=True)
            case ast.FunctionDef() | ast.AsyncFunctionDef() if not node.name.startswith("_"):
                lines.append(heading(node.name, _arguments(node, in_class)))
                lines.extend(_first_paragraph(node))
            # A definition may depend on the platform: the definitions of both branches are shown.
            case ast.If() | ast.Try():
                _render_body(node.body, lines, in_class)
                _render_body(node.orelse, lines, in_class)


def _arguments(node: ast.FunctionDef | ast.AsyncFunctionDef, in_class: bool) -> str:
    """The argument list of a function without annotations, and without ``self`` or ``cls`` of a method."""
    arguments = node.args
    positional = arguments.posonlyargs or arguments.args
    is_static = any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in node.decorator_list)
    if in_class and positional and not is_static:
        if len(arguments.defaults) == len(arguments.posonlyargs) + len(arguments.args):
            del arguments.defaults[0]
        del positional[0]
    for argument in ast.walk(arguments):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    return ast.unparse(arguments)


def _first_paragraph(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """The first paragraph of a docstring as one line, so that line breaks of the source file do not matter."""
    text = ast.get_docstring(node) or ""
    paragraph = " ".join(re.split(r"\n\s*\n", text, maxsplit=1)[0].split())
    return [paragraph] if paragraph else []


def _tidy(text: str) -> list[str]:
    """The lines of a text, with runs of spaces collapsed and empty lines removed."""
    return [line for line in (" ".join(raw.split()) for raw in text.split("\n")) if line]
