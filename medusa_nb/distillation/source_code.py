"""Documented Python functions as questions: a user shows signature and docstring, somebody writes the function.

Every learner already has several thousand of them: the standard library. Any other folder of Python source will do.
"""

import ast
import hashlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SPLITS = {"train": 0.80, "calibration": 0.10, "test": 0.10}
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", ".git", ".venv", "node_modules"}
INDENT = "    "
DOCSTRING_CHARS = 160  # a docstring is cut after the paragraph that passes this length
QUESTION_CHARS = 350  # longer signatures with docstrings are left out: answers to them are often cut off, or loop
BODY_LINES = 8  # and so are longer functions: a small model loses its way in them


@dataclass(frozen=True)
class Function:
    """One documented function: ``head`` is its signature with the docstring, ``body`` the lines after it."""

    id: str
    path: str
    head: str
    body: str

    @property
    def question(self) -> str:
        """What a user would ask an assistant. Other wordings were tried, see ``data/README.md``."""
        return f"Write this Python function, then explain in two sentences how it works.\n\n```python\n{self.head}\n```"

    @property
    def human_answer(self) -> str:
        """What its author wrote."""
        return f"```python\n{self.head}\n{self.body}\n```"


def split_of(path: str) -> str:
    """The split a file belongs to, by a stable hash of its path relative to its root.

    All functions of one file share a split, on every machine and in every run, so that training and evaluation never
    share a function.
    """
    point = int.from_bytes(hashlib.sha256(path.encode()).digest()[:4], "big") / 2**32
    for name, share in SPLITS.items():
        if point < share:
            return name
        point -= share
    return name


def read_functions(folder: str | Path, name: str, left_out: frozenset[str] = frozenset()) -> Iterator[Function]:
    """Yield the documented functions of every Python file in ``folder``, in path order.

    Functions inside other functions are part of their parent's body. Files that do not parse are skipped, and so are
    top-level folders named in ``left_out``. ``name`` starts every id: ``stdlib:json/decoder.py:JSONDecoder.decode``.
    """
    folder = Path(folder)
    for file in sorted(folder.rglob("*.py")):
        relative = file.relative_to(folder)
        if SKIPPED_FOLDERS.intersection(relative.parts) or relative.parts[0] in left_out:
            continue
        path = relative.as_posix()
        seen: dict[str, int] = {}
        for qualified_name, head, body in _functions_of_file(file):
            seen[qualified_name] = seen.get(qualified_name, 0) + 1
            again = f"#{seen[qualified_name]}" if seen[qualified_name] > 1 else ""
            if len(head) <= QUESTION_CHARS and len(body.splitlines()) <= BODY_LINES:
                yield Function(f"{name}:{path}:{qualified_name}{again}", path, head, body)


def _functions_of_file(file: Path) -> Iterator[tuple[str, str, str]]:
    try:
        source = file.read_text(encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old source may hold escapes that Python warns about
            module = ast.parse(source)
    except (OSError, SyntaxError, ValueError, RecursionError):
        return
    lines = source.split("\n")
    for qualified_name, node in _walk(module, ""):
        parts = _head_and_body(node, lines)
        if parts:
            yield qualified_name, *parts


def _walk(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield prefix + child.name, child
        elif isinstance(child, ast.ClassDef):
            yield from _walk(child, f"{prefix}{child.name}.")
        elif isinstance(child, ast.If | ast.Try):
            yield from _walk(child, prefix)


def _head_and_body(node, lines: list[str]) -> tuple[str, str] | None:
    docstring = ast.get_docstring(node)
    if not docstring or '"""' in docstring or len(node.body) < 2:
        return None
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    doc = node.body[0]
    signature = _dedent(lines[first - 1 : doc.lineno - 1], node.col_offset)
    body = _dedent(lines[doc.end_lineno : node.end_lineno], node.col_offset)
    if not signature or not body.strip():
        return None
    return signature + "\n" + _render(docstring), body


def _dedent(lines: list[str], columns: int) -> str:
    """Remove ``columns`` leading spaces where a line has them (strings that span lines may not)."""
    margin = " " * columns
    return "\n".join(line.removeprefix(margin).rstrip() for line in lines).strip("\n")


def _render(docstring: str) -> str:
    """The docstring as source, cut after the paragraph that passes :data:`DOCSTRING_CHARS`."""
    kept: list[str] = []
    for paragraph in docstring.split("\n\n"):
        kept.append(paragraph.rstrip())
        if sum(map(len, kept)) > DOCSTRING_CHARS:
            break
    text = "\n\n".join(kept).strip()
    if text.endswith(('"', "\\")):
        text += " "  # or it would run into the closing quotes
    quotes = 'r"""' if "\\" in text else '"""'
    if "\n" not in text:
        return f'{INDENT}{quotes}{text}"""'
    indented = [INDENT + line if line.strip() else "" for line in text.split("\n")]
    return f"{INDENT}{quotes}{text.splitlines()[0]}\n" + "\n".join(indented[1:]) + f'\n{INDENT}"""'
