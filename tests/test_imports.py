"""Imports go one way, public names load lazily, and private names of libraries stand in one place and still exist."""

import ast
import importlib
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import torch
from tiny_models import small_llama
from transformers import GenerationConfig

import medusa_nb
from medusa_nb import private

PACKAGE = Path(medusa_nb.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
STAGES = ["", "distillation", "training", "measurement", "export", "widgets", "course"]  # "" are the heart's files
ANYWHERE = {"__main__", "cli"}  # the command line, which is above all folders
LIBRARIES = ("torch", "transformers", "papermill", "nbconvert")
NAMES_IN_FILES = ("test_private", "_replace", "_asdict", "_fields", "_make")  # of named tuples: documented, public


def module_name(file: Path) -> str:
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(["medusa_nb", *(part for part in parts if part != "__init__")])


MODULES = {module_name(file): file for file in FILES}


def imported(file: Path) -> set[str]:
    """The package's modules that a file imports, inside functions, too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
    return found & MODULES.keys()


def stage(module: str) -> int:
    first = module.removeprefix("medusa_nb").strip(".").split(".")
    if len(first) == 1:
        return len(STAGES) if first[0] in ANYWHERE else 0
    return STAGES.index(first[0])


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_module_imports_from_a_later_stage(module):
    later = {other for other in imported(MODULES[module]) if stage(other) > stage(module)}
    assert not later, f"{module} imports {', '.join(sorted(later))}"


def test_no_circle():
    """Function-level imports included: prepare() names the modules of a circle."""
    TopologicalSorter({module: imported(file) - {module} for module, file in MODULES.items()}).prepare()


def test_every_folder_is_a_stage():
    assert {file.parent.name for file in FILES if file.parent != PACKAGE} <= set(STAGES)


def test_public_names_load_when_they_are_asked_for():
    code = "import sys, medusa_nb; assert not {'torch', 'transformers'} & sys.modules.keys(); assert dir(medusa_nb)[20]"
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", medusa_nb.__all__)
def test_each_public_name_is_there(name):
    value = getattr(medusa_nb, name)
    assert value.__module__.startswith("medusa_nb.") and value.__doc__


def test_no_other_name_is_public():
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        medusa_nb.nothing  # noqa: B018
    with pytest.raises(ImportError):
        from medusa_nb import nothing  # noqa: F401


@pytest.mark.parametrize("words", [r"torch\._inductor", r"unittest\.mock", "from unittest import mock"])
def test_nothing_reaches_into_the_compiler_or_is_mocked(words):
    found = [str(file) for file in FILES if re.search(words, file.read_text(encoding="utf-8"))]
    assert not [file for file in found if not file.endswith("private.py")]


def is_private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def private_uses(file: Path) -> set[str]:
    """Private names a file asks of what is not its own: attributes, imports, and names given as strings."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    own |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}
    own |= {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            found.add(node.attr)
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            found |= {part for name in names for part in name.split(".") if is_private(part)}
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "setattr", "hasattr"):
            name = node.args[1].value if isinstance(node.args[1], ast.Constant) else ""
            found |= {name} if is_private(str(name)) else set()
    return found - own


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_private_names_of_libraries_stand_in_one_file(file):
    if file.name != "private.py":
        assert private_uses(file) - set(NAMES_IN_FILES) == set()


MODEL = small_llama()
WHERE = {  # each private name in private.py: who has it
    "_reorder_linear_weight": (torch.ops.mkldnn, "pack_weight: steps would not be compiled"),
    "_linear_pointwise": (torch.ops.mkldnn, "packed_product: steps would not be compiled"),
    "_version": (torch.ones(1), "write_count: a change of weights would go unnoticed"),
    "_attn_implementation": (MODEL.config, "attention_of: the attention in use would be unknown"),
    "_prepare_generation_config": (MODEL, "prepared_generation_config: generate's own defaults would be unknown"),
    "_get_default_generation_params": (GenerationConfig(), "generation_defaults: options left out would be unknown"),
}


def test_every_private_name_is_known_to_this_test():
    assert private_uses(PACKAGE / "private.py") == set(WHERE)


@pytest.mark.parametrize("name", WHERE)
def test_a_private_name_still_exists(name):
    owner, use = WHERE[name]
    if owner is torch.ops.mkldnn and not torch.backends.mkldnn.is_available():
        pytest.skip("this build of torch has no oneDNN")
    assert hasattr(owner, name), f"{name} has moved or gone; medusa_nb.private.{use}"


def test_private_names_do_what_they_are_used_for():
    tensor = torch.ones(2)
    before = private.write_count(tensor)
    tensor.add_(1)
    assert private.write_count(tensor) > before
    assert private.attention_of(MODEL.config) == "sdpa"
    config, rest = private.prepared_generation_config(MODEL, None, dict(top_k=3, other=1))
    assert config.top_k == 3 and rest.get("other") == 1
    assert private.generation_defaults(GenerationConfig())["temperature"] == 1.0


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this build of torch has no oneDNN")
@pytest.mark.parametrize("bias", [False, True])
def test_a_packed_product_is_the_product(bias):
    x, weight, added = torch.randn(3, 16), torch.randn(8, 16), torch.randn(8) if bias else None
    with torch.no_grad():
        product = private.packed_product(x, private.pack_weight(weight, 3), added)
    assert torch.allclose(product, torch.nn.functional.linear(x, weight, added), atol=1e-4)


def test_every_module_can_be_imported_alone():
    for module in MODULES:
        if not module.endswith("__main__") and module != "medusa_nb.measurement.vllm_runner":
            importlib.import_module(module)
