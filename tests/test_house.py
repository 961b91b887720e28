"""The walls of the house: who may import whom, and what `import keras_vit` costs."""

import ast
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "keras_vit"
FILES = sorted(PACKAGE.rglob("*.py"))
BACKENDS = {"tensorflow", "jax", "torch"}
BACKEND_USERS = (
    "data/pipeline.py", "data/textgraph.py", "data/augment.py", "data/ops.py", "training/", "explain/gradcam.py", "hub/",
    "main.py", "console.py",
)  # fmt: skip
LEVEL_0 = ("layers", "errors", "checkpoints", "data/pixels", "version")
LEVEL_1 = (*LEVEL_0, "zoo")
# What each room may import of the package; the first that fits counts
ALLOWED = {
    "layers": ("layers", "errors"),
    "errors": (),
    "version": (),
    "checkpoints": ("checkpoints", "errors", "data/pixels"),
    "data/pixels": ("errors",),
    "zoo": LEVEL_0,
    "models/vit": (*LEVEL_1, "models"),
    "models": (*LEVEL_1, "models/vit", "data/text"),
    "data/text": ("errors", "checkpoints", "data/textgraph"),
    "data": (*LEVEL_1, "data"),
    "training": (*LEVEL_1, "data", "training", "evaluation"),
    "evaluation": (*LEVEL_1, "data", "evaluation"),
    "explain": (*LEVEL_1, "data", "explain"),
    "dense": (*LEVEL_1, "dense"),
    "hub": (*LEVEL_1, "data", "explain/cost", "hub"),
    "__init__": ("",),
    "configs": ("",),
    "main": ("",),
    "teachers": ("",),
    "console": ("",),
}  # fmt: skip


def room(path):
    return path.relative_to(PACKAGE).with_suffix("").as_posix()


def inside(name, rooms):
    return any(name == each or name.startswith(f"{each}/") or each == "" for each in rooms)


def imports(path):
    """Dotted names that a file imports, at its top or in a function; `from a import b` counts as a.b where that is a module."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                below = ROOT / node.module.replace(".", "/") / alias.name
                yield f"{node.module}.{alias.name}" if below.with_suffix(".py").exists() or below.is_dir() else node.module


@pytest.mark.parametrize("path", FILES, ids=room)
def test_a_file_imports_only_what_its_level_allows(path):
    rule = next(allowed for prefix, allowed in ALLOWED.items() if inside(room(path), [prefix]))
    for name in imports(path):
        if name.partition(".")[0] == "keras_vit":
            target = name.removeprefix("keras_vit").lstrip(".").replace(".", "/") or "__init__"
            assert inside(target, rule), f"{room(path)} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=room)
def test_only_named_files_import_a_backend(path):
    file = path.relative_to(PACKAGE).as_posix()
    if not file.startswith(BACKEND_USERS):
        assert not {name.partition(".")[0] for name in imports(path)} & BACKENDS


def test_benchmarks_and_tests_stay_outside_the_wheel():
    assert "include = keras_vit*" in (ROOT / "setup.cfg").read_text()


def test_importing_keras_vit_imports_nothing_heavy_beyond_keras():
    child = """
import sys, keras
before = set(sys.modules)
import keras_vit
new = {name.partition(".")[0] for name in set(sys.modules) - before}
heavy = {"tensorflow", "jax", "torch", "tensorflow_datasets", "tensorflow_hub", "tf_keras", "sklearn", "scipy", "absl"} & new
assert not heavy, heavy
"""
    environment = {**os.environ, "KERAS_BACKEND": "numpy"}
    done = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_no_file_can_run_foreign_code():  # [S1]
    banned = {"eval", "exec", "pickle", "marshal", "dill", "cloudpickle", "shelve", "extractall", "unpack_archive"}
    for path in (*FILES, *sorted((ROOT / "export").glob("*.py"))):
        tree = ast.parse(path.read_text())
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert "os.system" not in {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}, path
        names |= {name.partition(".")[0] for name in imports(path)}
        assert not names & banned, (path, names & banned)
        for node in ast.walk(tree):
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                assert isinstance(node.value, ast.Constant) and node.value.value is False, path
            if isinstance(node, ast.keyword) and node.arg == "safe_mode":
                raise AssertionError(f"{path}: safe_mode is Keras's to decide")
