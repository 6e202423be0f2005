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
REPOSITORY = re.search(r'^Repository = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
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


def test_it_is_short_and_needs_no_sideways_scrolling():
    assert COMMANDS and SNIPPETS
    lines = README.splitlines()
    assert len(lines) <= 150
    for line in lines:
        if line.startswith("|"):
            assert len(re.sub(r"\[(.*?)\]\(.*?\)", r"\1", line)) <= 100, line


def test_pictures_lead_to_the_repository():
    """By absolute links, which the page of a package index shows, too."""
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", README)
    assert pictures
    for picture in pictures:
        assert picture.startswith(f"{REPOSITORY}/raw/main/"), picture
        assert (ROOT / picture.removeprefix(f"{REPOSITORY}/raw/main/")).exists(), picture


def test_tables_are_those_of_the_results():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import result_tables

    shown = ""
    for page in result_tables.PAGES:
        text = page.read_text()
        assert result_tables.render(text) == text, "run python benchmarks/result_tables.py"
        shown += text
    assert all(f"<!-- table: {name} -->" in shown for name in result_tables.COLUMNS)
    for _, file, page in result_tables.PAPERS.values():
        assert (ROOT / "lightning_sparse_cl" / file).exists() and (ROOT / "docs" / "methods" / f"{page}.md").exists()


def test_measured_flops_agree_with_the_closed_formula():
    """Of runs on Split CIFAR-10 with TDM, DDR and DGM; a different plan for every row."""
    rows = json.loads((ROOT / "benchmarks" / "results" / "sparcl.json").read_text())["rows"]
    for row in rows:
        counted, formula = row["FLOPs as in the tables"]["median"], row["closed formula"]["median"]
        assert counted == pytest.approx(formula, rel=1e-3), row["method"]
    assert sum("SparCL" in row["method"] for row in rows) == 3
