"""The running Python's own standard library as data: its sources, its code, its docstrings, questions about it."""

from __future__ import annotations

import ast
import io
import re
import sysconfig
import tokenize
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from lisa_kernels.errors import unknown_name

LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
MIN_DOCSTRING_CHARACTERS = 80
QUESTIONS = "stdlib:questions"
# What reads as an English sentence: a capital letter, more than one word, a full stop.
ANSWER = re.compile(r"[A-Z][a-z]+ [ -~]*\.")
ANSWER_CHARACTERS = range(30, 201)
OWN_ARGUMENT = re.compile(r"^(self|cls)\b(, /)?(, )?")
SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'(])")


def stdlib_objects(spec: str) -> Iterator[tuple[str, object]]:
    """Yield (path, object) for each file that has any text of the part that `spec` (stdlib or stdlib:PART) names.

    Of `stdlib:questions` each object is one question and its answer; none comes twice.
    """
    parts: dict[str, Callable[[str], str]] = {"code": strip_comments, "docstrings": join_docstrings}
    part = spec.partition(":")[2]
    if spec == QUESTIONS:
        return _questions()
    if spec != "stdlib" and part not in parts:
        raise unknown_name("part of stdlib", part, [*parts, QUESTIONS.partition(":")[2]])
    return ((str(path), {"text": text}) for path, text in _texts(parts.get(part, str)))


def _texts(extract: Callable[[str], str]) -> Iterator[tuple[Path, str]]:
    root = Path(sysconfig.get_path("stdlib"))
    relatives = (path.relative_to(root) for path in root.rglob("*.py"))
    for relative in sorted(path for path in relatives if not LEFT_OUT & set(path.parts)):
        try:
            with tokenize.open(root / relative) as file:
                text = extract(file.read())
        except (SyntaxError, UnicodeDecodeError, OSError):
            continue  # distributions ship a few files that are templates, or unreadable
        yield relative, text


def _questions() -> Iterator[tuple[str, object]]:
    known = set[str]()
    for path, source in _texts(str):
        module = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
        if any(part.startswith("_") for part in module.split(".")):
            continue
        for question, answer in questions(source, module):
            if not known & {question, answer}:
                known |= {question, answer}
                yield str(path), {"question": question, "answer": answer}


def questions(source: str, module: str) -> Iterator[tuple[str, str]]:
    """Yield what each public function of a Python source does: the question, and its docstring's first sentence."""
    try:
        tree = _parsed(source)
    except SyntaxError:
        return  # as of the files that are templates
    for name, node in _public_functions(tree.body):
        docstring = ast.get_docstring(node) or ""
        answer = SENTENCE_END.split(" ".join(docstring.partition("\n\n")[0].split()))[0]
        if ANSWER.fullmatch(answer) and len(answer) in ANSWER_CHARACTERS:
            kind, arguments = "function", ast.unparse(node.args)
            if "." in name:
                kind, arguments = "method", OWN_ARGUMENT.sub("", arguments)
            yield f"What does the Python {kind} {module}.{name}({arguments}) do?", answer


def _public_functions(
    body: list[ast.stmt], scope: str = ""
) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            if isinstance(node, ast.ClassDef):
                yield from _public_functions(node.body, f"{scope}{node.name}.")
            else:
                yield f"{scope}{node.name}", node


def _parsed(source: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old modules hold invalid escapes, which ast.parse reports
        return ast.parse(source)


def _documented(source: str) -> list[tuple[ast.AST, ast.Expr]]:
    """Return each module, class and function that has a docstring, with its docstring's statement, in source order."""
    tree = _parsed(source)
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [
        (node, node.body[0])
        for node in ast.walk(tree)
        if isinstance(node, kinds) and ast.get_docstring(node, clean=False) is not None
    ]
    return sorted(((n, s) for n, s in found if isinstance(s, ast.Expr)), key=lambda pair: pair[1].lineno)


def join_docstrings(source: str) -> str:
    """Return the docstrings of at least 80 characters in a Python source, cleaned and joined by blank lines."""
    texts = (ast.get_docstring(node, clean=True) or "" for node, _ in _documented(source))  # type: ignore[arg-type]
    return "\n\n".join(text for text in texts if len(text) >= MIN_DOCSTRING_CHARACTERS)


def strip_comments(source: str) -> str:
    """Return a Python source without its docstrings and comments, otherwise in its own layout."""
    lines = io.StringIO(source).readlines()
    docstrings = {(s.lineno, s.col_offset): len(getattr(node, "body", [])) == 1 for node, s in _documented(source)}
    cuts: list[tuple[tokenize.TokenInfo, str]] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        row, column = token.start
        # ast counts columns in bytes, tokenize in characters
        place = (row, len(lines[row - 1][:column].encode())) if token.type == tokenize.STRING else (0, 0)
        if token.type == tokenize.COMMENT:
            cuts.append((token, ""))
        elif place in docstrings:
            followed = lines[token.end[0] - 1][token.end[1] :].lstrip().startswith(";")
            needed = followed or (docstrings[place] and row > 1)
            cuts.append((token, "pass" if needed else ""))
    for token, replacement in reversed(cuts):
        (first, start), (last, end) = token.start, token.end
        merged = (lines[first - 1][:start] + replacement + lines[last - 1][end:]).rstrip()
        lines[first - 1 : last] = [merged + "\n"] if merged else []
    return "".join(lines).strip("\n") + "\n" if lines else ""
