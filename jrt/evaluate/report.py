"""A run as one HTML file that needs nothing else: tables, figures, and items to read with the found answer marked.

All text that came from a dataset or a model is escaped. `page(...)` gives the file's text.
"""

import json
import re
from collections.abc import Iterable, Sequence
from html import escape

from jrt.evaluate.plots import Drawn
from jrt.evaluate.tables import HEADER, comparisons_text, counts_line, protocols_of, result_row

SHOWN_ITEMS = 40
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#1b1f24}
table{border-collapse:collapse;margin:.5rem 0 1.5rem}th,td{padding:.25rem .7rem;text-align:right;border-bottom:1px solid #d8dee4}
th:first-child,td:first-child{text-align:left}figure{margin:1rem 0}svg{max-width:100%;height:auto}
pre{white-space:pre-wrap;background:#f6f8fa;padding:.7rem;max-height:22rem;overflow:auto;font-size:13px}
mark{background:#ffe28a}.right{color:#116329}.wrong{color:#a40e26}details{border:1px solid #d8dee4;margin:.4rem 0;padding:.4rem .7rem}
summary{cursor:pointer}.note{color:#57606a}select,input{font:inherit;margin-right:.6rem}
"""
_SCRIPT = """
const items=[...document.querySelectorAll('#items>details')];
function choose(){const text=document.getElementById('text').value.toLowerCase(),kind=document.getElementById('kind').value;
items.forEach(d=>{d.hidden=(kind&&!d.dataset.kinds.split(' ').includes(kind))||!d.textContent.toLowerCase().includes(text)})}
document.getElementById('text').addEventListener('input',choose);document.getElementById('kind').addEventListener('change',choose);
"""


def page(
    title: str,
    records: Sequence[dict],
    comparisons: Sequence[dict],
    predictions: Sequence[dict],
    manifest: dict,
    figures: Iterable[Drawn],
    extra: str = "",
    items: int = SHOWN_ITEMS,
) -> str:
    """The report's text. extra: HTML that goes between the results and the figures (published tables)."""
    parts = [f"<h1>{escape(title)}</h1>", _results(records, manifest), extra]
    if comparisons:
        parts += ["<h2>Paired differences</h2>", f"<pre>{escape(comparisons_text(comparisons))}</pre>"]
    for figure in figures:
        parts.append(f"<h2>{escape(figure.heading)}</h2><figure>{figure.svg}</figure>")
    parts += [_browser(predictions, items), _manifest(manifest)]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body>{''.join(parts)}<script>{_SCRIPT}</script></body></html>\n"
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table; all cells are escaped."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _results(records: Sequence[dict], manifest: dict) -> str:
    groups: dict[tuple[str, str], list[dict]] = {}
    for record in records:
        groups.setdefault((record["task"], record["protocol"]), []).append(record)
    described = {protocol.name: protocol.describe() for protocol in protocols_of(manifest)}
    parts = []
    for (task, protocol), members in groups.items():
        words = described[protocol]
        parts.append(f"<h2>{escape(task)}</h2><p class=note>{escape(words)}<br>{escape(counts_line(members[0]))}</p>")
        parts.append(table(HEADER, [result_row(record) for record in members]))
        if any(record["beyond_training"] for record in members):
            parts.append("<p class=note>* prompts longer than the model's training sequences</p>")
    return "".join(parts)


def _browser(predictions: Sequence[dict], count: int) -> str:
    """Items with all answers, those first on which cells disagree."""
    items: dict[tuple[str, str, str], list[dict]] = {}
    for row in predictions:
        items.setdefault((row["task"], row["protocol"], row["id"]), []).append(row)
    chosen = sorted(items.values(), key=lambda rows: len({row["score"] for row in rows}) < 2)[:count]
    kinds = sorted({row["task"] for rows in chosen for row in rows})
    options = "".join(
        f"<option value='{escape(kind)}'>{escape(kind)}</option>" for kind in (*kinds, "differ", "right", "wrong")
    )
    return (
        f"<h2>Items to read</h2><p class=note>{len(chosen)} of {len(items)} items; those first whose answers differ in rightness. "
        "The answer is marked where it stands.</p>"
        f"<p><select id=kind><option value=''>all</option>{options}</select><input id=text placeholder='search'></p>"
        f"<div id=items>{''.join(map(_item, chosen))}</div>"
    )


def _item(rows: list[dict]) -> str:
    first = rows[0]
    scores = {row["score"] for row in rows}
    kinds = " ".join([first["task"], "differ" if len(scores) > 1 else ("right" if scores == {1} else "wrong")])
    context, question = split_question(first["prompt"])
    lines = "".join(
        f"<tr><td>{escape(row['model'])}</td><td>{escape(row['strategy'])}</td>"
        f"<td class={'right' if row['score'] else 'wrong'}>{marked(row['prediction'], row['answers']) or '(nothing)'}</td></tr>"
        for row in rows
    )
    return (
        f"<details data-kinds='{escape(kinds)}'><summary>{escape(first['id'])}: {sum(row['score'] for row in rows)} of "
        f"{len(rows)} right</summary><pre>{marked(context, first['answers'])}</pre><p><b>Question</b> {escape(question)}<br>"
        f"<b>Answer</b> {escape(' | '.join(dict.fromkeys(first['answers'])))}</p><table><tr><th>model</th><th>strategy</th>"
        f"<th>went on with</th></tr>{lines}</table></details>"
    )


def split_question(prompt: str) -> tuple[str, str]:
    """Context and question of a prompt read once: its last line where that is short, else what follows its last full stop."""
    context, line_end, last = prompt.rpartition("\n")
    if line_end and len(last) <= 300:
        return context, last
    context, stop, last = prompt.rpartition(". ")
    return (context + stop, last) if stop else ("", prompt)


def marked(text: str, answers: Sequence[str]) -> str:
    """`text` escaped, with the first answer that stands in it marked at each of its places."""
    for answer in answers:
        pieces = re.split(f"({re.escape(answer)})", text, flags=re.IGNORECASE) if answer else [text]
        if len(pieces) > 1:
            return "".join(f"<mark>{escape(p)}</mark>" if number % 2 else escape(p) for number, p in enumerate(pieces))
    return escape(text)


def _manifest(manifest: dict) -> str:
    text = json.dumps(manifest, indent=2, ensure_ascii=False)
    return f"<h2>How it was made</h2><details><summary>manifest</summary><pre>{escape(text)}</pre></details>"
