"""The snippets of the documentation run, its commands parse, its links lead somewhere, and the site builds cleanly."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from toy_trainer import shortened, trainer

import lightning_sparse_cl as scl
from lightning_sparse_cl import __main__ as command_line
from lightning_sparse_cl.cli import compare, export, lightning_cli, predict, profile, shipped, sweep
from lightning_sparse_cl.demos import PlainClassifier, toy_tasks
from lightning_sparse_cl.nests import rows
from lightning_sparse_cl.sweeping import Space

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.rglob("*.md")), *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"))]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
TEXTS = dict(zip(NAMES, (page.read_text() for page in PAGES)))


def fenced(text, language):
    """The code blocks of a language, each with the line before it."""
    return re.findall(rf"^([^\n]*)\n```{language}\n(.*?)^```", "\n" + text, re.MULTILINE | re.DOTALL)


def example(page, name):
    """A class that a page defines, and in how many lines."""
    snippet = next(s for _, s in fenced(TEXTS[f"docs/{page}"], "python") if f"class {name}(" in s)
    namespace = {"__name__": "page"}
    exec(compile(snippet, page, "exec"), namespace)
    lines = snippet[snippet.index(f"class {name}(") :].strip().splitlines()
    return namespace[name], len(lines)


def test_synflow_prunes_exactly_and_conserves_the_flow():
    SynFlow, lines = example("extend/policy.md", "SynFlow")
    assert lines <= 20
    model = PlainClassifier()
    trainer(SynFlow(0.9, dense=[]), epochs=1).fit(model, toy_tasks(num_tasks=1))
    alive = scl.Masks.of(model).alive
    total = sum(m.numel() for m in alive.values())
    assert sum(int(m.sum()) for m in alive.values()) == round(0.1 * total)
    assert all(m.any() for m in alive.values())  # no layer collapses, which is what the rounds are for


def test_packnet_like_freezes_what_a_task_has_kept():
    PackNetLike, lines = example("extend/method.md", "PackNetLike")
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


def test_a_method_of_parts_prunes_and_freezes():
    PruneAndFreeze, _ = example("extend/method.md", "PruneAndFreeze")
    module = PruneAndFreeze(scl.SmallCNN(4), objective=scl.ER(memory=20, replay_batch_size=4))
    trainer(epochs=1).fit(module, toy_tasks())
    frozen = scl.Masks.of(module).frozen
    assert frozen and all(m.any() and not m.all() for m in frozen.values())


def test_er_ace_like_leaves_old_classes_alone():
    ERACELike, lines = example("extend/objective.md", "ERACELike")
    assert lines <= 25
    objective = ERACELike(30, 8)
    trainer(epochs=1).fit(scl.SparCL(scl.SmallCNN(4), objective, removal=scl.DynamicDataRemoval(0.0)), toy_tasks())
    logits = torch.randn(4, 6, requires_grad=True)
    objective.current_loss(logits, torch.tensor([4, 5, 4, 5])).sum().backward()
    assert not logits.grad[:, :4].any() and logits.grad[:, 4:].all()


def test_what_the_page_on_data_shows_is_taken():
    snippets = [s for before, s in fenced(TEXTS["docs/start/own_data.md"], "python") if "fragment" not in before]
    made = [part for snippet in snippets for part in re.split(r"^(?=data = )", snippet, flags=re.M)]
    namespace, taken = {}, 0
    for part in made:
        exec(compile(part, "own_data.md", "exec"), namespace)
        if part.startswith("data = "):
            namespace["data"].setup()
            namespace["data"].prepare(rows(namespace["data"].train_sets[0][0][0], None))
            taken += 1
    assert taken == 8


WITH_SNIPPETS = [name for name in NAMES if name != "README.md" and fenced(TEXTS[name], "python")]


@pytest.mark.parametrize("name", WITH_SNIPPETS)
def test_snippets_run(name, tmp_path, monkeypatch):
    """From top to bottom, as they are read; what cannot run says why."""
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "page"}
    for before, snippet in fenced(TEXTS[name], "python"):
        if not re.fullmatch(r"<!-- fragment: .+ -->", before):
            exec(compile(snippet, name, "exec"), namespace)


RUN = re.search(r"run by a test -->\n```bash\n(.*?)```", TEXTS["docs/guide/command_line.md"], re.DOTALL)[1].splitlines()
"""Commands that test_overlays_run runs."""


def commands():
    """Each command line of this package that a page shows, without what stands around it.

    Left out are those that other tests run: those of README and RUN, and those that only name a configuration.
    """
    found = {}
    for name in NAMES:
        blocks = fenced(TEXTS[name], "bash") if name != "README.md" else ()
        for block in (block for before, block in blocks if "fragment" not in before):
            for line in block.replace("\\\n", " ").splitlines():
                if (match := re.search(r"(?:^|&& |srun |-m )(?:sparsecl|lightning_sparse_cl) (.*)", line)) is not None:
                    found.setdefault(match[1], name)
    found = {
        line: name
        for line, name in found.items()
        if not re.fullmatch(r"fit -c \S+", line) and f"sparsecl {line}" not in RUN
    }
    return [pytest.param(line, id=f"{name}: {line}") for line, name in found.items()]


@pytest.mark.parametrize("line", commands())
def test_commands_parse(line, tmp_path, monkeypatch):
    """By the parser that runs them. Nothing is trained, and no checkpoint is read."""
    monkeypatch.chdir(tmp_path)
    for config, run in (("derpp", "runs/EsaCL-DERpp-SplitDigits/version_0"), ("wsn", "RUN")):
        Path(run).mkdir(parents=True)
        shutil.copy(ROOT / "configs" / "split_digits" / f"{config}.yaml", Path(run, "config.yaml"))
    args = shlex.split(line, comments=True)
    if args[0] == "configs":
        shipped.command(args[1:])
        return
    if args[0] == "compare":
        compare._settings(compare._parse(args[1:]).tune_on)
        return
    if args[0] == "sweep":
        for spaces, found in zip(("space.yaml", "search.yaml"), fenced(TEXTS["docs/guide/sweeping.md"], "yaml")):
            Path(spaces).write_text(found[1])
        files, entries, rest = sweep._sorted(args[1:])
        space = Space.of(entries)
        assert space.drawn(space.points(files, rest))
        return
    if predict.is_meant(args):
        predict._parse(args[1:])
        return
    parsed = []
    monkeypatch.setattr(lightning_cli, "read_checkpoint", lambda path, **_: None)
    monkeypatch.setattr(command_line.SparseCLI, "instantiate_classes", lambda cli: parsed.append(cli.subcommand))
    monkeypatch.setattr(command_line.SparseCLI, "_run_subcommand", lambda cli, name: None)
    monkeypatch.setattr(export, "read_checkpoint", lambda path, **_: parsed.append("export") or {})
    try:
        if export.is_meant(args):
            with pytest.raises(ValueError, match="does not say how its network was built"):  # past the parser
                export.command(args[1:])
        else:
            command_line.main(profile.in_run(args))
    except SystemExit as done:  # of --print_config
        assert done.code in (0, None)
        parsed.append(args[0])
    assert parsed == [args[0]]


@pytest.mark.parametrize("line", RUN)
def test_overlays_run(line):
    command_line.main(
        [
            *shlex.split(line)[1:],
            *shortened(line),
            f"--schedule.epochs={2 if 'cl_lsg' in line else 1}",
            "--trainer.accelerator=cpu",
            "--trainer.limit_train_batches=2",
        ]
    )


def test_configurations_that_are_named_exist():
    named = re.compile(r"(?:-c |configs/)(?:configs/)?([a-z_]+[0-9]*(?:_[a-z]+)*/[a-z_0-9]+)(?:\.yaml)?[`\s)\"]")
    shown = {(config, name) for name, text in TEXTS.items() for config in named.findall(text)}
    assert len(shown) > 50
    assert not {(config, name) for config, name in shown if config not in shipped.configs()}


def classes(node):
    """Every ``class_path`` of a configuration."""
    if isinstance(node, dict):
        yield from [node["class_path"]] if "class_path" in node else []
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from classes(child)


def test_yaml_is_valid_and_names_classes_that_exist():
    blocks = [
        (name, block) for name, text in TEXTS.items() for _, block in fenced(text, "yaml") if "--8<--" not in block
    ]
    assert blocks
    for name, block in blocks:
        for path in classes(yaml.safe_load(block)):
            assert hasattr(scl, path) or path.startswith(("torch.", "yourmodule.")), (name, path)
    (overlay,) = (yaml.safe_load(block) for name, block in blocks if name == "README.md")
    assert overlay == yaml.safe_load((ROOT / "configs" / "esacl" / "without_sa.yaml").read_text())


def anchors(text):
    """What the headings of a page are called in links."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    text = re.sub(r"^```.*?^```", "", TEXTS[name], flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^()\s]+)\)", text):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_tables_are_whole(name):
    for block in re.findall(r"(?:^\|.*\n)+", re.sub(r"^```.*?^```", "", TEXTS[name], flags=re.M | re.S), re.MULTILINE):
        cells = {re.sub(r"\\\|", "", line).count("|") for line in block.splitlines()}
        assert len(cells) == 1, block.splitlines()[0]


def test_every_public_name_is_in_the_reference_once():
    shown = [n for name in NAMES for n in re.findall(r"^::: lightning_sparse_cl\.(\w+)$", TEXTS[name], re.MULTILINE)]
    assert sorted(shown) == sorted(scl.__all__)


def test_every_page_of_a_method_has_all_parts():
    parts = ["paper's algorithm", "Our readings", "Configuration", "What we measured", "What the paper prints"]
    for page in set((DOCS / "methods").glob("*.md")) - {DOCS / "methods" / "index.md"}:
        assert all(f"\n## {'The ' * part.startswith('paper')}{part}\n" in page.read_text() for part in parts), page
    described = "".join(page.read_text() for page in (DOCS / "methods").glob("*.md"))
    for file in ("methods", "objectives"):
        for method in (ROOT / "lightning_sparse_cl" / file).glob("*.py"):
            if re.search(r"et al\.|&.*\d{4}", method.read_text().split("\n", 1)[0]):
                assert f"{file}/{method.name}" in described, method


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    pytest.importorskip("material")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    built = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    )
    assert built.returncode == 0, built.stderr
    site = (tmp_path / "reference" / "callbacks" / "index.html").read_text()
    assert ":class:" not in site and "SparseGrowth" in site
