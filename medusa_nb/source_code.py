"""Documented Python functions as prompts: signature and docstring in, body out.

Every learner already has several thousand of them: the standard library. The same function reads
any other folder of Python source.
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


@dataclass(frozen=True)
class Function:
    """One documented function.

    ``prompt`` is the decorated signature and the docstring, ``body`` the source lines after it, both
    indented so that ``prompt + "\\n" + body`` is again the function.
    """

    id: str
    path: str
    prompt: str
    body: str


def split_of(path: str) -> str:
    """The split a file belongs to, by a stable hash of its path relative to its root.

    All functions of one file share a split, on every machine and in every run, so that the base
    model, the heads and the evaluation never share a function.
    """
    point = int.from_bytes(hashlib.sha256(path.encode()).digest()[:4], "big") / 2**32
    for name, share in SPLITS.items():
        if point < share:
            return name
        point -= share
    return name


def read_functions(
    folder: str | Path,
    name: str,
    max_docstring_chars: int = 160,
    max_prompt_chars: int = 900,
    max_body_chars: int = 1200,
    left_out: frozenset[str] = frozenset(),
) -> Iterator[Function]:
    """Yield the documented functions of every Python file below ``folder``, in path order.

    Functions inside other functions are part of their parent's body. Files that do not parse are
    skipped. ``name`` starts every id: ``stdlib:json/decoder.py:JSONDecoder.decode``. A docstring is
    cut at the end of the paragraph that passes ``max_docstring_chars``; functions longer than the
    other two limits, and top-level folders named in ``left_out``, are not read.
    """
    folder = Path(folder)
    for file in sorted(folder.rglob("*.py")):
        relative = file.relative_to(folder)
        if SKIPPED_FOLDERS.intersection(relative.parts) or relative.parts[0] in left_out:
            continue
        path = relative.as_posix()
        seen: dict[str, int] = {}
        for qualified_name, prompt, body in _functions_of_file(file, max_docstring_chars):
            seen[qualified_name] = seen.get(qualified_name, 0) + 1
            again = f"#{seen[qualified_name]}" if seen[qualified_name] > 1 else ""
            if len(prompt) <= max_prompt_chars and len(body) <= max_body_chars:
                yield Function(f"{name}:{path}:{qualified_name}{again}", path, prompt, body)


def _functions_of_file(file: Path, max_docstring_chars: int) -> Iterator[tuple[str, str, str]]:
    try:
        source = file.read_text(encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = ast.parse(source)
    except (OSError, SyntaxError, ValueError, RecursionError):
        return
    lines = source.split("\n")
    for qualified_name, node in _walk(module, ""):
        parts = _prompt_and_body(node, lines, max_docstring_chars)
        if parts:
            yield qualified_name, *parts


def _walk(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.AST]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield prefix + child.name, child
        elif isinstance(child, ast.ClassDef):
            yield from _walk(child, f"{prefix}{child.name}.")
        elif isinstance(child, ast.If | ast.Try):
            yield from _walk(child, prefix)


def _prompt_and_body(node, lines: list[str], max_docstring_chars: int) -> tuple[str, str] | None:
    docstring = ast.get_docstring(node)
    if not docstring or '"""' in docstring or len(node.body) < 2:
        return None
    first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
    doc = node.body[0]
    signature = _dedent(lines[first - 1 : doc.lineno - 1], node.col_offset)
    body = _dedent(lines[doc.end_lineno : node.end_lineno], node.col_offset)
    if not signature or not body.strip():
        return None
    return signature + "\n" + _render(docstring, max_docstring_chars), body


def _dedent(lines: list[str], columns: int) -> str:
    """Remove ``columns`` leading spaces where a line has them (strings that span lines may not)."""
    margin = " " * columns
    return "\n".join(line.removeprefix(margin).rstrip() for line in lines).strip("\n")


def _render(docstring: str, max_chars: int) -> str:
    """The docstring as source, cut at the end of the paragraph that passes ``max_chars``."""
    kept: list[str] = []
    for paragraph in docstring.split("\n\n"):
        kept.append(paragraph.rstrip())
        if sum(map(len, kept)) > max_chars:
            break
    text = "\n\n".join(kept).strip()
    if text.endswith(('"', "\\")):
        text += " "  # or it would run into the closing quotes
    quotes = 'r"""' if "\\" in text else '"""'
    if "\n" not in text:
        return f'{INDENT}{quotes}{text}"""'
    indented = [INDENT + line if line.strip() else "" for line in text.split("\n")]
    return f"{INDENT}{quotes}{text.splitlines()[0]}\n" + "\n".join(indented[1:]) + f'\n{INDENT}"""'
