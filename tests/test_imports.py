"""What importing costs, and who may import whom."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lightning_sparse_cl"


PATHS = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}
"""The package's modules by name."""


def imports(path):
    """Every module that a file imports, wherever in it: in functions and for type checkers, too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name}: a relative import"
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from {name if name in PATHS else node.module for name in names}


def test_no_module_imports_another_in_a_circle():
    graph = {name: [other for other in imports(path) if other in PATHS] for name, path in PATHS.items()}
    assert len(graph) > 50 and graph["lightning_sparse_cl.acceleration.network"]
    TopologicalSorter(graph).prepare()  # a CycleError names the modules


def test_kernels_import_nothing_of_the_package_but_themselves():
    kernels = f"{PACKAGE.name}.kernels"
    for name, path in PATHS.items():
        if name.startswith(kernels):
            bad = [m for m in imports(path) if m.startswith(PACKAGE.name) and not m.startswith(kernels)]
            assert not bad, f"{name} imports {bad}"


PLAIN = ["optim", "sparsity", "metrics", "backbones", "objectives", "kernels", "acceleration", "runtime", "allocator"]


@pytest.mark.parametrize("plain", PLAIN)
def test_plain_torch_packages_do_not_import_lightning(plain):
    found = {name: path for name, path in PATHS.items() if name.split(".")[1:2] == [plain]}
    assert found
    for name, path in found.items():
        bad = [m for m in imports(path) if m.split(".")[0] == "lightning" or "callbacks" in m or "methods" in m]
        assert not bad, f"{name} imports {bad}"


def test_callbacks_do_not_import_methods():
    for path in (PACKAGE / "callbacks").glob("*.py"):
        assert not [m for m in imports(path) if "methods" in m]


def test_the_console_script_ends_with_status_zero(tmp_path):
    script = Path(sys.executable).parent / "sparsecl"
    config = PACKAGE.parent / "configs" / "split_digits" / "finetune.yaml"
    short = ["--schedule.epochs=1", "--trainer.limit_train_batches=2", "--model.init_args.backbone=SmallMLP"]
    command = [script, "fit", "-c", config, *short]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Class-IL accuracy" in done.stdout and "SparseCLI" not in done.stdout + done.stderr


def test_importing_is_quick_and_leaves_no_trace(tmp_path):
    script = """
import os, sys, time, warnings
import lightning.pytorch.cli, torch
def settings():
    return os.getcwd(), torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled(), list(warnings.filters)
before, modules = settings(), set(sys.modules)
state, threads = torch.get_rng_state(), torch.get_num_threads()
start = time.process_time()  # others may be busy
import lightning_sparse_cl.__main__
seconds = time.process_time() - start
assert before == settings()
assert torch.equal(state, torch.get_rng_state()) and threads == torch.get_num_threads()
assert not os.listdir(".")
assert not {"sklearn", "matplotlib", "scipy", "pandas", "PIL"} & (set(sys.modules) - modules)
print(seconds)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, capture_output=True)
    assert float(done.stdout) < 1.0
