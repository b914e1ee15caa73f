"""The rules of docs/design.md that a reader cannot see at a glance: who imports whom, and what is never written."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = sorted((ROOT / "gdd_fast").rglob("*.py"))
KERNELS = sorted((ROOT / "kernels").glob("*.py"))
SOURCES = [*PACKAGE, *KERNELS]

COMMANDS = ("train", "sample", "evaluate", "pretrain", "prepare", "convert", "export", "info", "analyze")
# From the bottom up. A module imports from its own layer and those below; the first layer stands beside them all.
LAYERS = (
    (
        "config",
        "errors",
        "files",
        "cli",
        "backend",
        "extension_sources",
        "kernels",
        "device",
        "signals",
        "settings",
        "ranks",
    ),
    ("bundled", "data", "interop"),
    ("ops",),
    ("layers",),
    ("models",),
    ("interop.hub", "interop.edm_pickle"),
    ("sampling",),
    ("engine", "acceleration", "metrics", "report"),
    ("webpage",),
    ("training",),
    ("distill",),
    ("interop.diffusers",),
    COMMANDS,
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}

# Modules that need a library which is no requirement of ours, and may not be there.
OPTIONAL = {"gdd_fast.interop.diffusers"}

# What these need of training belongs below both.
NOT_TRAINING = (
    "sample",
    "evaluate",
    "export",
    "webpage",
    "analyze",
    "sampling",
    "engine",
    "acceleration",
    "metrics",
    "report",
)

# The only file that may replace NaN: as the public code does, where `--nonfinite replace` asks for that.
SCRUBBERS = {"gdd_fast/training/optimizer.py"}

# The only files that may take a pickle apart, each by an unpickler that executes nothing.
UNPICKLERS = {"gdd_fast/models/files/pickle_reader.py", "gdd_fast/data/cifar.py"}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def by_file(paths):
    return pytest.mark.parametrize("path", paths, ids=name_of)


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imported(path: Path) -> Iterator[str]:
    """Full names of everything imported anywhere in the file, inside functions too."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(parts[: len(parts) - node.level]) if node.level else []
            module = ".".join([*base, node.module] if node.module else base)
            yield from (f"{module}.{alias.name}" for alias in node.names)


def dotted(node: ast.expr) -> str:
    """`a.b.c` of an attribute or name; empty for other expressions."""
    return ast.unparse(node) if isinstance(node, ast.Attribute | ast.Name) else ""


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    return ((dotted(node.func), node) for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call))


def layer_of(module: str) -> str | None:
    """The layer of a module, named from the package down; two files of interop have layers of their own."""
    parts = module.split(".")
    return next((name for name in (".".join(parts[:2]), parts[0]) if name in RANK), None)


def test_every_module_has_a_layer():
    top = {path.relative_to(ROOT / "gdd_fast").parts[0].removesuffix(".py") for path in PACKAGE}
    assert top - {"__init__"} <= RANK.keys()


def test_every_folder_with_modules_is_a_package():
    """find_packages leaves a folder without __init__.py out of the wheel; kernels/ must have none (see kernels.py)."""
    assert {path.parent for path in PACKAGE} == {path.parent for path in PACKAGE if path.name == "__init__.py"}
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not [path for path in (ROOT / "kernels").iterdir() if path.is_dir() and path.name != "__pycache__"]


@by_file([path for path in PACKAGE if path != ROOT / "gdd_fast" / "__init__.py"])
def test_imports_go_one_way(path):
    layer = layer_of(".".join(path.relative_to(ROOT / "gdd_fast").with_suffix("").parts))
    for name in imported(path):
        package, _, rest = name.partition(".")
        target = layer_of(rest)
        if package == "gdd_fast" and target is not None:
            assert RANK[target] <= RANK[layer], f"{name_of(path)} ({layer}) imports {name} from a layer above"
            assert target not in COMMANDS or target == layer, f"{name_of(path)} imports the command {name}"


@by_file(
    [
        path
        for path in PACKAGE
        if layer_of(".".join(path.relative_to(ROOT / "gdd_fast").with_suffix("").parts)) in NOT_TRAINING
    ]
)
def test_sampling_and_evaluating_do_not_import_training(path):
    for name in imported(path):
        assert not name.startswith(("gdd_fast.training", "gdd_fast.distill")), f"{name_of(path)} imports {name}"


def test_no_file_name_twice():
    """Where a thing is, its file's name says."""
    names = [path.stem for path in PACKAGE if not path.stem.startswith("__")]
    assert sorted(names) == sorted(set(names))


@by_file(KERNELS)
def test_kernels_know_nothing_of_the_package(path):
    for name in imported(path):
        assert not name.startswith("gdd_fast"), f"{name_of(path)} imports {name}"
    for name, node in calls(path):
        assert not name.startswith("torch.library."), f"{name_of(path)}:{node.lineno}"


@by_file(SOURCES)
def test_triton_and_the_kernels_folder_are_imported_where_they_may_be(path):
    in_kernels = path.parent == ROOT / "kernels"
    for name in imported(path):
        root = name.split(".")[0]
        if not in_kernels:
            assert root not in ("kernels", "triton"), f"{name_of(path)} imports {name}: use gdd_fast.kernels"


@by_file(SOURCES)
def test_nothing_in_a_file_is_executed(path):
    for name, node in calls(path):
        where = f"{name_of(path)}:{node.lineno}: {name}"
        options = {keyword.arg: keyword.value for keyword in node.keywords}
        if name == "torch.load":
            safe = options.get("weights_only")
            assert isinstance(safe, ast.Constant) and safe.value is True, f"{where} without weights_only=True"
        assert name not in ("eval", "exec", "globals", "__import__"), where
        assert "allow_pickle" not in options or ast.unparse(options["allow_pickle"]) == "False", where
        assert "cpp_extension.load" not in name, f"{where} builds at run time"
    if name_of(path) not in UNPICKLERS:
        readers = ("load", "loads", "Unpickler", "*")
        banned = {f"{module}.{reader}" for module in ("pickle", "_pickle", "dill", "cloudpickle") for reader in readers}
        used = {dotted(node) for node in ast.walk(tree_of(path)) if isinstance(node, ast.Attribute)}
        assert not banned & (used | set(imported(path))), f"{name_of(path)} unpickles"


@by_file(SOURCES)
def test_no_error_is_hidden(path):
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Attribute):
            scrubs = node.attr in ("nan_to_num", "nan_to_num_")
            assert not scrubs or name_of(path) in SCRUBBERS, f"{name_of(path)}:{node.lineno}"
        if isinstance(node, ast.ExceptHandler):
            broad = node.type is None or dotted(node.type) in ("Exception", "BaseException")
            silent = all(isinstance(statement, ast.Pass | ast.Continue) for statement in node.body)
            assert not (broad and silent), f"{name_of(path)}:{node.lineno} swallows every error"


@by_file(SOURCES)
def test_no_setting_is_read_at_import(path):
    """Environment variables count when a function runs, so a program can set them after its imports."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)

    def outside_functions(node: ast.AST) -> Iterator[ast.AST]:
        yield node
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, functions):
                yield from outside_functions(child)

    for node in outside_functions(tree_of(path)):
        if isinstance(node, ast.Attribute):
            assert dotted(node) not in ("os.environ", "os.getenv"), f"{name_of(path)}:{node.lineno}"


def test_importing_is_light():
    """`import gdd_fast` does not import torch; importing every module imports neither triton nor a GPU context."""
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in PACKAGE]
    modules = [module.removesuffix(".__init__") for module in modules if module not in OPTIONAL]
    code = (
        "import importlib, sys, gdd_fast\n"
        "assert 'torch' not in sys.modules and gdd_fast.__version__\n"
        "for name in sys.argv[1:]: importlib.import_module(name)\n"
        "import torch\n"
        "assert 'triton' not in sys.modules, 'triton'\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code, *modules], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
