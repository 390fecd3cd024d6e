"""The standard library as data: sorted, capped, and each part what its name says."""

from __future__ import annotations

import ast
import inspect
import io
import textwrap
import tokenize

import pytest

from lisa_kernels.errors import InputError
from lisa_kernels.train.records import load_records
from lisa_kernels.train.sources.stdlib import join_docstrings, questions, strip_comments


def test_the_standard_library_is_capped_sorted_python_without_tests() -> None:
    records = load_records("stdlib", max_bytes=200_000)
    assert records.kind == "text"
    assert sum(len(item.encode()) for item in records.items) == 200_000
    assert records.items == load_records("stdlib", max_bytes=200_000).items
    for item in records.items[:-1]:
        ast.parse(item)


def test_stdlib_code_is_python_without_comments_or_docstrings() -> None:
    records = load_records("stdlib:code", max_bytes=150_000)
    for item in records.items[:-1]:
        assert_bare(item)


def test_stdlib_docstrings_are_prose_of_some_length() -> None:
    records = load_records("stdlib:docstrings", max_bytes=20_000)
    assert all(len(item) >= 80 for item in records.items[:-1])
    assert not any("def __init__(self" in item for item in records.items[:3])


def test_stdlib_questions_are_about_functions_and_no_answer_comes_twice() -> None:
    records = load_records("stdlib:questions", max_bytes=40_000)
    assert records.kind == "instruction"
    assert len(records) > 200
    for place in (0, 1):
        assert len({item[place]["content"] for item in records.items}) == len(records)
    assert records.items == load_records("stdlib:questions", max_bytes=40_000).items


def test_a_question_about_the_library_as_it_is() -> None:
    asked = dict(questions(inspect.getsource(textwrap), "textwrap"))
    wrap = "What does the Python function textwrap.wrap(text, width=70, **kwargs) do?"
    assert asked[wrap] == "Wrap a single paragraph of text, returning a list of wrapped lines."


def test_a_question_has_the_signature_without_self_and_its_answer_is_the_first_sentence() -> None:
    """Private names, docstrings that are no sentence, and very short ones are left out."""
    body = '''
async def fetch(url, *, again=3):
    """Fetch what the address names, again\nwhere that fails. It is slow.

    More.
    """
def _own(): "Do something that is long enough to be read."
def scale(x): "scale(x) -> the same, twice as large, no sentence"
def short(): "Be short."
def register(cls, name): "Remember a class under the name that was given."
class Pile:
    """A class is not asked about, whatever it says."""
    def push(self, item): "Put an item on top of all the others there are."
    class _Inner:
        def f(self): "Do something that is long enough to be read."
'''
    assert list(questions(body, "piles")) == [
        ("What does the Python function piles.fetch(url, *, again=3) do?",
         "Fetch what the address names, again where that fails."),
        ("What does the Python function piles.register(cls, name) do?",
         "Remember a class under the name that was given."),
        ("What does the Python method piles.Pile.push(item) do?",
         "Put an item on top of all the others there are."),
    ]  # fmt: skip


def test_an_unknown_part_of_stdlib_names_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean 'docstrings'"):
        load_records("stdlib:docstring")
    with pytest.raises(InputError, match="part of stdlib"):
        load_records("stdlib:")


SOURCE = '''#!/usr/bin/python
"""Module docstring that is clearly longer than eighty characters, so that it counts as a text of its own."""
import os  # a comment
x = "# no comment"
def sole():
    """Only a docstring."""
def one_line(): "é doc"
class C:  # é
    """Class docstring,
    over two lines.
    """  # after it

    def f(self, a="é"): r"""raw doc"""; return a
    async def g(self):
        # alone on its line
        "short"
        return """not a docstring"""
'''


def test_strip_comments_keeps_code_and_strings_and_fills_empty_bodies() -> None:
    bare = strip_comments(SOURCE)
    assert_bare(bare)
    assert '"# no comment"' in bare
    assert '"""not a docstring"""' in bare
    assert "def sole():\n    pass\n" in bare
    assert "import os\n" in bare
    assert bare.startswith("import os")
    assert strip_comments("") == ""


def test_join_docstrings_leaves_out_short_ones_and_cleans_indents() -> None:
    long = "Word " * 20
    source = f'class C:\n    """Short."""\n    def f(self):\n        """{long}\n\n        End.\n        """\n'
    assert join_docstrings(source) == f"{long}\n\nEnd."
    assert join_docstrings(SOURCE).startswith("Module docstring")


def assert_bare(source: str) -> None:
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    assert [token.string for token in tokens if token.type == tokenize.COMMENT] == []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
    assert [ast.get_docstring(node) for node in nodes if ast.get_docstring(node)] == []
