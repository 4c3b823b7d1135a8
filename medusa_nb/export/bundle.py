"""One self-contained Python file from what this package's ``custom_generate`` needs of its modules."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent
# in the order in which they need each other
PARTS = (
    *("errors", "private", "storage", "base_model", "tree", "ngrams", "heads", "path_heads", "heads_file"),
    *(
        "kv_cache",
        "drafting",
        "logits",
        "rope",
        "verification",
        "sampling",
        "packing",
        "compilation",
        "stopping",
        "decoding",
        "export.custom_generate",
    ),
)
HEADER = '''"""Decoding with Medusa heads for transformers' ``custom_generate``.

Written by ``medusa-nb export`` from the modules of the package; change those, not this file.
Needs torch, transformers and safetensors. Licence: Apache-2.0.
"""
'''


def bundle() -> str:
    """The source of ``custom_generate/generate.py``: ``generate``, and all that it needs directly or indirectly."""
    imports: dict[str, str] = {}  # by the name that each binds
    definitions: dict[str, ast.stmt] = {}  # by the names that each defines
    texts: dict[ast.stmt, str] = {}
    for part in PARTS:
        source = (PACKAGE / f"{part.replace('.', '/')}.py").read_text(encoding="utf-8")
        for node in ast.parse(source).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                module = getattr(node, "module", "")
                if not module.startswith("medusa_nb"):
                    start = f"from {module} import" if module else "import"
                    imports |= {bound_name(alias): f"{start} {ast.unparse(alias)}" for alias in node.names}
            else:
                definitions |= dict.fromkeys(defined_names(node), node)
                texts[node] = text_of(node, source)
    used, asked = set(), ["generate"]
    while asked:
        name = asked.pop()
        if name not in used:
            used.add(name)
            asked += names_in(definitions[name]) if name in definitions else []
    kept = {definitions[name] for name in used & definitions.keys()}
    lines = sorted({line for name, line in imports.items() if name in used and name not in definitions})
    bodies = [text for node, text in texts.items() if node in kept]
    return "\n".join([HEADER, *lines]) + "\n\n\n" + "\n\n\n".join(bodies) + "\n"


def bound_name(alias: ast.alias) -> str:
    """The name that ``a.b`` or ``a as b`` binds."""
    return alias.asname or alias.name.split(".")[0]


def defined_names(node: ast.stmt) -> set[str]:
    """The names that a top-level statement defines: one, or several."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)}


def names_in(node: ast.stmt) -> list[str]:
    """The names that a statement uses, those in strings (annotations of what is defined later) included."""
    names = [part.id for part in ast.walk(node) if isinstance(part, ast.Name)]
    return names + [part.value for part in ast.walk(node) if isinstance(part, ast.Constant) and str is type(part.value)]


def text_of(node: ast.stmt, source: str) -> str:
    """The statement as it stands in the source, decorators included."""
    start = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
    return "\n".join(source.splitlines()[start - 1 : node.end_lineno])
