"""What the README shows, runs; what it prints as results, was measured."""

import json
import re
import sys
from pathlib import Path

import pytest
from toy_trainer import shortened

from lightning_sparse_cl.__main__ import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^(?:pip install.* && )?sparsecl (.*-c .*)$", README, flags=re.MULTILINE)
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(command):
    arguments = [str(ROOT / a) if a.startswith("configs/") else a for a in command.split()]
    main(
        [
            *arguments,
            *shortened(command),
            f"--schedule.epochs={2 if 'cl_lsg' in command else 1}",
            "--trainer.accelerator=cpu",
            "--trainer.limit_train_batches=2",
        ]
    )


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippets(snippet):
    exec(compile(snippet.replace("epochs=5", "epochs=1"), "README.md", "exec"), {"__name__": "readme"})


def test_paths_and_tables():
    assert COMMANDS and SNIPPETS
    for path in re.findall(r"\]\(([\w./]+)\)", README):
        assert (ROOT / path).exists(), path
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import result_tables

    shown = ""
    for page in result_tables.PAGES:
        text = page.read_text()
        assert result_tables.render(text) == text, "run python benchmarks/result_tables.py"
        shown += text
    assert all(f"<!-- table: {name} -->" in shown for name in result_tables.COLUMNS)


def test_measured_flops_agree_with_the_closed_formula():
    """Of runs on Split CIFAR-10 with TDM, DDR and DGM; a different plan for every row."""
    rows = json.loads((ROOT / "benchmarks" / "results" / "sparcl.json").read_text())["rows"]
    for row in rows:
        counted, formula = row["FLOPs as in the tables"]["median"], row["closed formula"]["median"]
        assert counted == pytest.approx(formula, rel=1e-3), row["method"]
    assert sum("SparCL" in row["method"] for row in rows) == 3
