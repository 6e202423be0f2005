"""Writes docs/guide/foreign_modules.md from what the tests saw: ``python tests/foreign/table.py seen.xml``.

``seen.xml`` is made by ``pytest -m foreign --junitxml=seen.xml``.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

HEAD = """# Modules of other packages

What happens when each policy is used on modules of other packages, with random weights and data, tiny configurations
and three epochs of four batches on the CPU. The tests write this page:

```bash
pip install -e ".[foreign]"
pytest -m foreign --junitxml=seen.xml
python tests/foreign/table.py seen.xml
```

**yes** means all of this:

* The fit runs. At its end and in its checkpoint every masked weight has exactly the zeros asked for (80 %; SNFS divides
  them among layers).
* Masks have moved if the policy moves them. What a gradient mask holds stayed bit for bit.
* What requires no gradient (the base under LoRA, BYOL's target) has no mask.
* `FlopsCounter` and `MemoryFootprint` counted the training, and left it bit for bit as it was.

**refused** and **not counted** come with a note, in which POLICY stands for the name of the policy. The last table says
which part of the trained parameters the default masks. The others are the first and the last layer, shortcuts, biases,
norms and embeddings.

The last run was with

"""
COLUMNS = 5
"""Policies that stand in one table."""


def read(path: Path) -> tuple[dict[str, dict[str, str]], list[str], list[str]]:
    """What was seen, by module and policy; the packages; the tests that failed."""
    seen: dict[str, dict[str, str]] = {}
    packages, failed = [], []
    for test in ElementTree.parse(path).iter("testcase"):
        found = {p.get("name", ""): p.get("value", "") for p in test.iter("property")}
        if test.find("failure") is not None or test.find("error") is not None:
            failed.append(test.get("name", ""))
        if "module" not in found:
            continue
        if found["package"] not in packages:
            packages.append(found["package"])
        seen.setdefault(found["module"], {})[found["policy"]] = found.get("saw", "not run")
    return seen, packages, failed


def table(rows: list[list[str]]) -> str:
    """Rows of Markdown, the first being the head."""
    lines = [" | ".join(row) for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]]]
    return "\n".join(f"| {line} |" for line in lines)


class Notes:
    """The messages of a run, each once."""

    def __init__(self) -> None:
        self.words: list[str] = []

    def cell(self, policy: str, saw: str) -> str:
        """What stands in the table for what was seen."""
        if saw == "counted" or saw.endswith("in masks"):
            return "yes"
        if saw == "not run":
            return saw
        is_refused = saw.startswith("refused: ")
        note = saw.removeprefix("refused: ")
        for name in policy.split(", "):
            note = note.replace(name, "POLICY")
        if not is_refused:
            note = note.partition(": ")[2]  # without the module's name
        if note not in self.words:
            self.words.append(note)
        return f"{'refused' if is_refused else 'not counted'} [{self.words.index(note) + 1}](#notes)"


def page(seen: dict[str, dict[str, str]], packages: list[str]) -> str:
    """The whole page."""
    policies = list(dict.fromkeys(policy for of in seen.values() for policy in of))
    notes, tables = Notes(), []
    for at in range(0, len(policies), COLUMNS):
        part = policies[at : at + COLUMNS]
        rows = [["module", *part]]
        rows += [[module, *(notes.cell(p, of.get(p, "not run")) for p in part)] for module, of in seen.items()]
        tables.append(table(rows))
    rows = [["module", "masked"]]
    for module, of in seen.items():
        rows += [[module, saw.split()[0]] for saw in of.values() if saw.endswith("in masks")][:1]
    tables.append(table(rows))
    words = "\n".join(f"{i}. {note}" for i, note in enumerate(notes.words, 1))
    names = list(dict.fromkeys(["torch", "lightning", *packages]))
    versions = "\n".join(f"- {name} {version(name).partition('+')[0]}" for name in names)
    return f"{HEAD}{versions}\n\n" + "\n\n".join(tables) + f"\n\n## Notes\n\n{words}\n"


if __name__ == "__main__":
    seen, packages, failed = read(Path(sys.argv[1]))
    if failed:
        sys.exit(f"{len(failed)} tests failed, first {failed[0]}; the page is left as it was")
    Path(__file__).parents[2].joinpath("docs", "guide", "foreign_modules.md").write_text(page(seen, packages))
