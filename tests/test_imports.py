"""The package's shape, over its syntax trees: who imports whom, who may touch what, and that public names are explained."""

from __future__ import annotations

import ast
import inspect
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import dsconv_surgery

PACKAGE = Path(dsconv_surgery.__file__).parent
OURS = "dsconv_surgery"

# Which of our modules each may import; `schemes` is the folder's front, its files are listed by folder and name.
# fmt: off
MAY_IMPORT = {
    "__init__": {
        "budget", "checkpoint", "decide", "finetune", "graph", "history", "images", "pipeline", "plan", "recipe", "report", "schemes",
        "separable", "surgery", "sweep",
    },
    "__main__": {"cli"},
    "cli": {"budget", "checkpoint", "graph", "measure", "pipeline", "recipe", "report", "sources", "sweep", "text"},
    "sources": {"text"},
    "recipe": {"budget", "decide", "finetune", "geometry", "history", "images", "measure", "pipeline", "report", "surgery", "text"},
    "finetune": {"batches", "distill", "history", "measure", "optimise", "plan", "ranks", "training"},
    "training": {"batches", "cache", "distill", "files", "history", "measure", "norms", "optimise", "plan", "ranks"},
    "batches": {"history"},
    "optimise": {"plan", "schemes"},
    "distill": {"measure"},
    "history": {"text"},
    "ranks": set(),
    "files": set(),
    "sweep": {"budget", "decide", "geometry", "images", "measure", "pipeline", "plan", "text"},
    "checkpoint": {"files", "pipeline", "plan", "schemes", "surgery", "text"},
    "pipeline": {"budget", "decide", "geometry", "history", "images", "measure", "plan", "report", "surgery"},
    "report": {"budget", "feed", "geometry", "graph", "images", "measure", "plan", "schemes", "surgery", "text"},
    "decide": {
        "budget", "cache", "clock", "geometry", "graph", "images", "measure", "options", "plan", "ranks", "rules", "schemes",
        "sensitivity", "surgery", "text", "workings",
    },
    "surgery": {"geometry", "graph", "images", "layers", "measure", "norms", "options", "plan", "reconstruct", "schemes", "text"},
    "norms": {"feed", "images", "ranks"},
    "reconstruct": {"feed", "images", "moments", "plan", "ranks", "schemes", "walk"},
    "options": {"budget", "clock", "geometry", "graph", "schemes", "sensitivity", "workings"},
    "workings": {"budget", "cache", "curves", "geometry", "graph", "schemes", "sensitivity"},
    "curves": set(),
    "sensitivity": {"cache", "feed", "graph", "images", "measure", "ranks", "schemes", "walk"},
    "clock": {"cache", "geometry", "measure", "ranks", "schemes"},
    "cache": {"files"},
    "walk": {"feed", "graph", "images", "layers", "measure", "moments", "schemes"},
    "feed": {"images"},
    "moments": {"geometry", "images", "ranks", "schemes"},
    "plan": {"budget", "geometry", "graph", "measure", "schemes", "text"},
    "rules": {"budget", "geometry", "knapsack"},
    "knapsack": set(),
    "budget": {"geometry"},
    "graph": {"geometry", "layers", "measure"},
    "layers": set(),
    "separable": {"geometry", "schemes"},
    "measure": set(),
    "geometry": set(),
    "text": set(),
    "images": {"cache", "ranks"},
    "schemes": {"geometry", "schemes._least_squares", "schemes._objective", "schemes._protocol"}
    | {f"schemes.{name}" for name in ("bottleneck", "channel", "cp", "depthwise", "spatial", "tucker")},
    "schemes._als": set(),
    "schemes._least_squares": {"geometry", "schemes._objective", "schemes._protocol"},
    "schemes._low_rank": set(),
    "schemes._objective": set(),
    "schemes._protocol": {"geometry", "schemes._objective"},
    "schemes.bottleneck": {"geometry", "schemes._low_rank", "schemes._objective", "schemes._protocol"},
    "schemes.channel": {"geometry", "schemes._low_rank", "schemes._objective", "schemes._protocol"},
    "schemes.cp": {"geometry", "schemes._als", "schemes._objective", "schemes._protocol"},
    "schemes.depthwise": {"geometry", "schemes._low_rank", "schemes._objective", "schemes._protocol"},
    "schemes.spatial": {"geometry", "schemes._low_rank", "schemes._objective", "schemes._protocol"},
    "schemes.tucker": {"geometry", "schemes._objective", "schemes._protocol"},
}
# fmt: on
WRITERS = {"cache", "checkpoint", "cli", "files", "history", "report", "sources", "sweep", "training", "walk"}
WRITING_METHODS = {
    "chmod", "dump", "mkdir", "mkstemp", "rename", "replace", "rmdir", "save", "save_file", "save_model", "savefig", "touch", "unlink",
    "write_bytes", "write_text",
}  # fmt: skip


def _name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return "schemes" if parts == ("schemes", "__init__") else ".".join(parts)


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


def test_every_module_is_in_the_table() -> None:
    """A new file needs a line that says what it may import."""
    assert set(FILES) == set(MAY_IMPORT)


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_module_imports_only_what_it_may(name: str) -> None:
    """Imports run one way, as DESIGN.md says; the table names every arrow there is, and none that is not used."""
    assert _ours(name) == MAY_IMPORT[name]


def test_imports_are_acyclic() -> None:
    """There is an order in which every module comes after those that it imports."""
    order = list(TopologicalSorter({name: _ours(name) for name in FILES}).static_order())
    assert order.index("geometry") < order.index("graph") < order.index("plan") < order.index("decide") < order.index("report")
    assert order.index("moments") < order.index("walk") < order.index("reconstruct") < order.index("surgery") < order.index("report")
    assert order.index("report") < order.index("pipeline") < order.index("checkpoint") < order.index("cli")


def test_only_graph_and_walk_import_fx() -> None:
    users = {name for name in FILES if any(dotted.startswith("torch.fx") for dotted in _imports(name))}
    assert users == {"graph", "walk"}


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
    assert not any("graph" in _ours(name) for name in files)


def test_budget_does_not_import_torch() -> None:
    """Neither itself nor through what it imports, unless for types alone."""
    for name in ("budget", "rules", "knapsack", "geometry"):
        typing_only = {
            id(inner)
            for node in ast.walk(TREES[name])
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            for inner in ast.walk(node)
        }
        nodes = [n for n in ast.walk(TREES[name]) if isinstance(n, ast.Import | ast.ImportFrom) and id(n) not in typing_only]
        assert not any("torch" in ast.unparse(node) for node in nodes), name


@pytest.mark.parametrize("name", ["measure", "text", "geometry"])
def test_the_ground_floor_imports_nothing_of_ours(name: str) -> None:
    assert _ours(name) == set()


def test_public_names_are_all() -> None:
    """What can be seen in the package and is not a module is exactly `__all__`, sorted."""
    modules = {name for name, value in vars(dsconv_surgery).items() if inspect.ismodule(value)}
    seen = {name for name in vars(dsconv_surgery) if not name.startswith("_")} - modules
    assert seen == set(dsconv_surgery.__all__)
    assert list(dsconv_surgery.__all__) == sorted(dsconv_surgery.__all__)


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
    assert "save_file" in _calls("checkpoint")


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


@pytest.mark.parametrize("name", sorted(FILES))
def test_every_module_says_what_it_is(name: str) -> None:
    if name != "__main__":
        assert ast.get_docstring(TREES[name])
