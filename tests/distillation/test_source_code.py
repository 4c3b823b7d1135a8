"""Documented functions as prompts: stable ids and splits, Python in and Python out."""

import sysconfig
from pathlib import Path

import pytest

from medusa_nb.distillation.prompts import load_prompts
from medusa_nb.distillation.source_code import SPLITS, read_functions, split_of

MODULE = '''
class Box:
    @property
    def size(self):
        """The number of things."""
        return len(self.things)

def add(a, b):
    """Add two numbers.

    Both may be floats.
    """
    def inner():
        """Part of its parent."""
        return a
    return inner() + b

def undocumented(a):
    return a

def only_documented():
    """Nothing else."""
'''


@pytest.fixture
def package(tmp_path):
    folder = tmp_path / "mine"
    (folder / "sub").mkdir(parents=True)
    (folder / "box.py").write_text(MODULE)
    (folder / "sub" / "deep.py").write_text('def deep():\n    """Go down."""\n    return 1\n')
    (folder / "broken.py").write_text("def (:\n")
    (folder / "latin.py").write_bytes(b"# \xe9\n")
    return folder


def by_id(functions) -> dict:
    return {function.id: function for function in functions}


def test_functions_of_a_folder(package):
    found = by_id(read_functions(package, "mine"))
    assert set(found) == {"mine:box.py:Box.size", "mine:box.py:add", "mine:sub/deep.py:deep"}
    size = found["mine:box.py:Box.size"]
    assert size.head == '@property\ndef size(self):\n    """The number of things."""'
    assert size.body == "    return len(self.things)"
    assert size.head in size.question
    assert found["mine:box.py:add"].head.endswith('Both may be floats.\n    """')
    rows = {row["id"]: row for row in load_prompts(str(package))}
    assert rows.keys() == found.keys()
    assert rows["mine:box.py:Box.size"]["messages"][1]["content"] == size.human_answer


def test_ids_and_splits_are_stable_when_a_file_is_added(package):
    before = by_id(read_functions(package, "mine"))
    (package / "aaa.py").write_text('def first():\n    """Comes before all others."""\n    return 2\n')
    after = by_id(read_functions(package, "mine"))
    assert len(after) == len(before) + 1
    assert {name: after[name] for name in before} == before


def test_splits_are_by_file_and_cover_all(tmp_path):
    for number in range(60):
        body = "".join(f'def f{i}():\n    """Do."""\n    return {number * 10 + i}\n\n' for i in range(3))
        (tmp_path / f"m{number}.py").write_text(body)
    splits: dict = {}
    for row in load_prompts(str(tmp_path)):
        splits.setdefault(row["id"].split(":")[1], set()).add(row["split"])
    assert len(splits) == 60
    for path, found in splits.items():
        assert found == {split_of(path)}
    parts = {name: set(load_prompts(str(tmp_path), name)["id"]) for name in SPLITS}
    assert sum(map(len, parts.values())) == 180 == len(set.union(*parts.values()))


def test_split_shares():
    counts = {name: 0 for name in SPLITS}
    for i in range(5000):
        counts[split_of(f"package/module_{i}.py")] += 1
    for name, share in SPLITS.items():
        assert abs(counts[name] / 5000 - share) < 0.03


@pytest.mark.parametrize("package", ["json", "email", "asyncio", "unittest"])
def test_head_and_body_are_python(package):
    functions = list(read_functions(Path(sysconfig.get_paths()["stdlib"]) / package, package))
    for function in functions:
        compile(f"{function.head}\n{function.body}", function.id, "exec", dont_inherit=True)
    assert len({function.id for function in functions}) == len(functions) >= 3


def test_equal_bodies_are_read_once(tmp_path):
    (tmp_path / "a.py").write_text('def f():\n    """One."""\n    return 1\n')
    (tmp_path / "b.py").write_text('def g():\n    """Two."""\n    return  1\n')
    assert len(load_prompts(str(tmp_path))) == 1
