"""The package's shape, over its syntax trees: who imports whom, who may touch what, and that public names are explained."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import dsconv_surgery

PACKAGE = Path(dsconv_surgery.__file__).parent
OURS = "dsconv_surgery"

# Imports run one way: a folder or module may import from those in later lines only. Names in one line are independent of each other.
DIRECTION = (
    ("__main__",),
    ("cli",),
    ("recipe", "sweep", "checkpoint"),
    ("compression",),
    ("report", "planning", "finetuning"),
    ("surgery",),
    ("calibration",),
    ("plan",),
    ("budget", "separable"),
    ("schemes",),
    ("network",),
    ("support",),
)
LEVEL = {name: level for level, names in enumerate(DIRECTION) for name in names}
WRITERS = {
    "calibration.activation_store",
    "calibration.image_folder",
    "checkpoint",
    "cli.commands",
    "cli.export",
    "finetuning.training_checkpoint",
    "report",
    "support.atomic_files",
    "support.cache",
    "support.plotting",
}
WRITING_METHODS = {
    "chmod", "dump", "mkdir", "mkstemp", "rename", "replace", "rmdir", "save", "save_file", "save_model", "savefig", "touch", "unlink",
    "write_bytes", "write_text",
}  # fmt: skip


def _name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def _top(name: str) -> str:
    """The folder, or the module at the top."""
    return name.split(".")[0]


FILES = {_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}


def _module(dotted: str) -> str:
    """`dsconv_surgery.a.b` as a key of FILES: the longest part of it that is a file of ours."""
    parts = dotted.split(".")[1:]
    while parts and ".".join(parts) not in FILES:
        parts.pop()
    return ".".join(parts) or "__init__"


def _imports(name: str) -> list[str]:
    """Every module that one imports, in full; of `from x import y` both x.y and, where y is not a module, x."""
    found: list[str] = []
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def _ours(name: str) -> set[str]:
    return {_module(dotted) for dotted in _imports(name) if dotted.split(".")[0] == OURS}


def _calls(name: str) -> list[str]:
    """The last name of every call: `a.b.c(...)` is "c"."""
    functions = [node.func for node in ast.walk(TREES[name]) if isinstance(node, ast.Call)]
    return [f.attr if isinstance(f, ast.Attribute) else f.id for f in functions if isinstance(f, ast.Attribute | ast.Name)]


def test_every_folder_has_a_place_in_the_direction() -> None:
    assert {_top(name) for name in FILES} - {"__init__"} == set(LEVEL)


@pytest.mark.parametrize("name", sorted(set(FILES) - {"__init__"}))
def test_imports_follow_the_direction_between_folders(name: str) -> None:
    """Anywhere in the file, function bodies included."""
    for other in _ours(name) - {"__init__"}:
        if _top(other) != _top(name):
            assert LEVEL[_top(other)] > LEVEL[_top(name)], f"{name} imports {other}, against the direction of DIRECTION"


def test_imports_are_acyclic() -> None:
    """There is an order in which every module comes after those that it imports."""
    assert list(TopologicalSorter({name: _ours(name) for name in FILES}).static_order())


def test_only_two_modules_and_the_store_import_fx() -> None:
    users = {name for name in FILES if any(dotted.startswith("torch.fx") for dotted in _imports(name))}
    assert users == {
        "network.call_recorder",
        "network.graph_rewrite",
        "calibration.side_by_side",
        "calibration.activation_store",
    }


def test_only_surgery_edits_a_model() -> None:
    """`set_submodule` is called in one file, and nobody assigns to another module's `_modules`."""
    assert {name for name in FILES if "set_submodule" in _calls(name)} == {"surgery"}
    assert not any("add_module" in _calls(name) or "register_module" in _calls(name) for name in FILES)
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AugAssign) else []
            assert not any("_modules" in ast.unparse(target) for target in targets), name


def test_schemes_do_not_know_graphs() -> None:
    files = [name for name in FILES if name.split(".")[0] == "schemes"]
    assert len(files) > 5
    assert not any("network.discovery" in _ours(name) or "network.graph_rewrite" in _ours(name) for name in files)


def test_budget_does_not_import_torch() -> None:
    """Neither itself nor through what it imports, unless for types alone."""
    for name in ("budget", "planning.rules", "planning.tables", "planning.knapsack", "network.geometry"):
        typing_only = {
            id(inner)
            for node in ast.walk(TREES[name])
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            for inner in ast.walk(node)
        }
        nodes = [n for n in ast.walk(TREES[name]) if isinstance(n, ast.Import | ast.ImportFrom) and id(n) not in typing_only]
        assert not any("torch" in ast.unparse(node) for node in nodes), name


def test_public_names_are_all_and_each_is_imported_when_used() -> None:
    """`__all__`, the names for type checkers and the names that `__getattr__` knows are the same."""
    (block,) = [node for node in TREES["__init__"].body if isinstance(node, ast.If)]
    names = [alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert list(dsconv_surgery.__all__) == sorted(dsconv_surgery.__all__) == sorted(names) == sorted(dsconv_surgery._MODULES)
    for name in dsconv_surgery.__all__:
        assert getattr(dsconv_surgery, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = dsconv_surgery.nothing


@pytest.mark.parametrize("statement", ["import dsconv_surgery", "from dsconv_surgery.cli.commands import app"])
def test_the_package_and_the_command_line_do_not_load_torch(statement: str) -> None:
    code = f"import sys\n{statement}\nassert not {{'torch', 'scipy', 'tensorly', 'matplotlib'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)


def test_public_names_do_not_load_what_few_calls_need() -> None:
    code = "import sys\nfrom dsconv_surgery import *\nassert not {'scipy', 'tensorly', 'matplotlib', 'PIL'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)


def test_only_few_modules_write_files() -> None:
    """Writing calls, and `open` with a mode that writes, are in the files that may."""
    for name in set(FILES) - WRITERS:
        for node in ast.walk(TREES[name]):
            if not isinstance(node, ast.Call):
                continue
            text = ast.unparse(node.func)
            last = text.rsplit(".", 1)[-1]
            if last == "open":
                pytest.fail(f"{name} opens a file: {ast.unparse(node)}")
            if last in WRITING_METHODS - {"replace"} or text == "os.replace":
                pytest.fail(f"{name} writes a file: {ast.unparse(node)}")
    assert "safetensors.torch.save(" in FILES["checkpoint"].read_text()


def test_nothing_is_unpickled() -> None:
    """No module imports pickle, and torch.load runs with weights_only."""
    for name, tree in TREES.items():
        assert not any(dotted.startswith("pickle") for dotted in _imports(name)), name
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert "weights_only=True" in ast.unparse(node), name


@pytest.mark.parametrize("name", dsconv_surgery.__all__)
def test_a_public_name_has_a_docstring_with_an_example(name: str) -> None:
    """The example is there, and parses as Python."""
    doc = inspect.getdoc(getattr(dsconv_surgery, name)) or ""
    lines = [line.strip() for line in doc.splitlines()]
    code = [line[4:] for line in lines if line.startswith((">>> ", "... "))]
    if name == "Plan":  # data: what makes one has the example, its verbs have theirs
        code = [line.strip()[4:] for line in (dsconv_surgery.Plan.replace.__doc__ or "").splitlines() if line.strip().startswith(">>> ")]
    assert doc.endswith(".") or code
    assert code, f"{name} shows no example"
    ast.parse("\n".join(code))


@pytest.mark.parametrize("name", sorted(FILES))
def test_no_module_is_long(name: str) -> None:
    """A file that can be read at a sitting: 300 lines."""
    assert len(FILES[name].read_text().splitlines()) <= 300


def test_few_functions_are_long() -> None:
    """At most six functions have more than 40 lines of code; docstrings do not count."""
    long = []
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                if body and body[-1].end_lineno - body[0].lineno + 1 > 40:  # type: ignore[operator]
                    long.append(f"{name}.{node.name}")
    assert len(long) <= 6, long


@pytest.mark.parametrize("name", sorted(FILES))
def test_every_module_says_what_it_is(name: str) -> None:
    if name != "__main__":
        assert len(ast.get_docstring(TREES[name]) or "") > 20
