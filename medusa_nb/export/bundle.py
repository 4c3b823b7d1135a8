"""One self-contained Python file from the modules of this package that decode with heads."""

import ast
import re
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent
# In the order in which they need each other; None: the whole module.
PARTS: dict[str, set[str] | None] = {
    "errors": None,
    "private": None,
    "storage": {"read_text", "decode_text", "read_json", "parse_json", "_NAMES"},
    "base_model": {
        *("context_length", "as_ids", "_HandThrough", "logits_of", "base_fingerprint", "weights_state", "dtype_name")
    },
    "tree": {"Ranks", "Tree", "ROOT_ONLY"},
    "ngrams": {"ngram_tokens"},
    "heads": None,
    "path_heads": None,
    "heads_file": {"WEIGHTS", "CONFIG", "heads_from", "_empty_heads", "_read_tensors", "_refuse_other_base"},
    "kv_cache": None,
    "drafting": None,
    "verification": None,
    "sampling": {"Sampler"},
    "compilation": None,
    "decoding": None,
    "export.custom_generate": None,
}
HEADER = '''"""Decoding with Medusa heads for transformers' ``custom_generate``.

Written by ``medusa-nb export`` from the modules of the package; change those, not this file.
Needs torch, transformers and safetensors. Licence: Apache-2.0.
"""
'''


def bundle() -> str:
    """The source of ``custom_generate/generate.py``."""
    modules: dict[str, set[str]] = {}  # what to import from where; the module itself under ""
    bodies = []
    for name, wanted in PARTS.items():
        source = (PACKAGE / f"{name.replace('.', '/')}.py").read_text(encoding="utf-8")
        for node in ast.parse(source).body:
            if isinstance(node, ast.Import):
                modules.setdefault("", set()).update(ast.unparse(alias) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                if not node.module.startswith("medusa_nb"):
                    modules.setdefault(node.module, set()).update(ast.unparse(alias) for alias in node.names)
            elif not is_docstring(node) and (wanted is None or wanted & names_of(node)):
                bodies.append(text_of(node, source))
    code = "\n\n\n".join(bodies)
    lines = []
    for module, names in sorted(modules.items()):
        used = sorted(name for name in names if re.search(rf"\b{bound_name(name)}\b", code))
        if module:
            lines += [f"from {module} import {', '.join(used)}"] if used else []
        else:
            lines += [f"import {name}" for name in used]
    return "\n".join([HEADER, *lines]) + "\n\n\n" + code + "\n"


def bound_name(alias: str) -> str:
    """The name that ``a.b`` or ``a as b`` binds."""
    return alias.split(" as ")[1] if " as " in alias else alias.split(".")[0]


def is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def names_of(node: ast.stmt) -> set[str]:
    """The names a top-level statement defines."""
    if isinstance(node, ast.Assign):
        return {target.id for target in node.targets if isinstance(target, ast.Name)}
    return {getattr(node, "name", "")}


def text_of(node: ast.stmt, source: str) -> str:
    """The statement as it stands in the source, decorators included."""
    start = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
    return "\n".join(source.splitlines()[start - 1 : node.end_lineno])
