"""`jrt report`: runs collected into tables and files (`collected`), the page (`html`) and its figures (`plots`)."""

from jrt.evaluate.report.collected import FILES, Collected, collect, paper_table, runs_in
from jrt.evaluate.report.html import marked, page, split_question, write_page

__all__ = [
    "FILES",
    "Collected",
    "collect",
    "marked",
    "page",
    "paper_table",
    "runs_in",
    "split_question",
    "write_page",
]
