"""The documentation's examples run, do what they say, and are as short as they should be."""

import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from toy_trainer import trainer

import lightning_sparse_cl as scl
from lightning_sparse_cl.demos import PlainClassifier, toy_tasks
from lightning_sparse_cl.nests import rows

DOCS = Path(__file__).parents[1] / "docs"


def example(page, name):
    """A class that a page defines, and in how many lines."""
    snippets = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.S)
    snippet = next(s for s in snippets if f"class {name}(" in s)
    namespace = {"__name__": page}
    exec(compile(snippet, page, "exec"), namespace)
    lines = snippet[snippet.index(f"class {name}(") :].strip().splitlines()
    return namespace[name], len(lines)


def test_synflow_prunes_exactly_and_conserves_the_flow():
    SynFlow, lines = example("your_own.md", "SynFlow")
    assert lines <= 20
    model = PlainClassifier()
    trainer(SynFlow(0.9, dense=[]), epochs=1).fit(model, toy_tasks(num_tasks=1))
    alive = scl.Masks.of(model).alive
    total = sum(m.numel() for m in alive.values())
    assert sum(int(m.sum()) for m in alive.values()) == round(0.1 * total)
    assert all(m.any() for m in alive.values())  # no layer collapses, which is what the rounds are for


def test_packnet_like_freezes_what_a_task_has_kept():
    PackNetLike, lines = example("your_own.md", "PackNetLike")
    assert lines <= 25
    seen = []

    class Look(scl.TaskCallback):
        def on_after_task_end(self, trainer, pl_module, task):
            weight, frozen = pl_module.net[3].weight, scl.Masks.of(pl_module).frozen["net.3.weight"]
            seen.append((frozen.clone(), weight.detach().clone()))

    model = PlainClassifier()
    trainer(PackNetLike(0.75), Look(), epochs=1).fit(model, toy_tasks())
    for (before, values), (after, later) in pairwise(seen):
        assert torch.equal(later[before], values[before]) and (after | ~before).all()
    n = seen[0][0].numel()
    free = [int((~frozen).sum()) for frozen, _ in seen]
    assert free[0] == n - round(0.25 * n) and free[1] == free[0] - round(0.25 * free[0])


def test_er_ace_like_leaves_old_classes_alone():
    ERACELike, lines = example("your_own.md", "ERACELike")
    assert lines <= 25
    objective = ERACELike(30, 8)
    trainer(epochs=1).fit(scl.SparCL(scl.SmallCNN(4), objective, removal=scl.DynamicDataRemoval(0.0)), toy_tasks())
    logits = torch.randn(4, 6, requires_grad=True)
    objective.current_loss(logits, torch.tensor([4, 5, 4, 5])).sum().backward()
    assert not logits.grad[:, :4].any() and logits.grad[:, 4:].all()


@pytest.mark.parametrize("page", ["drop_in.md", "predict.md", "deployment.md"])
def test_snippets_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.S)
    assert snippets
    for snippet in snippets:
        exec(compile(snippet, page, "exec"), {"__name__": page})


@pytest.mark.parametrize("page", sorted(p.name for p in DOCS.glob("*.md")))
def test_links_lead_somewhere(page):
    for path in re.findall(r"\]\(([\w./]+)\)", (DOCS / page).read_text()):
        assert (DOCS / path).exists(), path


def test_what_the_page_on_data_shows_is_taken():
    snippets = re.findall(r"```python\n(import .*?)```", (DOCS / "data.md").read_text(), re.S)
    made = [part for snippet in snippets for part in re.split(r"^(?=data = )", snippet, flags=re.M)]
    namespace, taken = {}, 0
    for part in made:
        exec(compile(part, "data.md", "exec"), namespace)
        if part.startswith("data = "):
            namespace["data"].setup()
            namespace["data"].prepare(rows(namespace["data"].train_sets[0][0][0], None))
            taken += 1
    assert taken == 8
