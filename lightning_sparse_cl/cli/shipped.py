"""The configurations that come with the package."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

FOLDERS = (Path(__file__).parents[1] / "configs", Path(__file__).parents[2] / "configs")
"""Where they lie: in an installed package, and in a checkout."""
OPTIONS = ("-c", "--config")
"""That name a configuration."""


def configs() -> dict[str, Path]:
    """Every configuration by name, ``split_digits/esacl`` for example."""
    folder = next((f for f in FOLDERS if f.is_dir()), FOLDERS[0])
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))}


def find(name: str) -> str:
    """The file of a configuration: ``name`` itself if it is one, else the shipped one of this name.

    ``configs/split_digits/esacl.yaml`` is ``split_digits/esacl`` too, so that commands in headers and documents work
    from any folder.
    """
    if Path(name).is_file():
        return name
    key = name.removeprefix("configs/").removesuffix(".yaml")
    return str(configs().get(key, name))


def run_name(args: Sequence[str]) -> str | None:
    """``esacl, efficient``: what a run with these arguments is called, by the names of its configuration files.

    If it has none, or that of another run, which is called ``config.yaml``, None.
    """
    words = [word.partition("=") for word in args]
    given = [
        value if equals else "".join(args[i + 1 : i + 2])
        for i, (option, equals, value) in enumerate(words)
        if option in OPTIONS
    ]
    names = [Path(name).stem for name in given]
    return ", ".join(names) if names and "config" not in names else None


def command(args: list[str]) -> None:
    """``sparsecl configs``: list them; ``sparsecl configs copy DIR``: copy them to a folder.

    Raises:
        ValueError: if the arguments are others, or a file is there already; nothing is copied then.
    """
    if not args:
        for name, path in configs().items():
            print(f"{name:45} {path.read_text().splitlines()[0].removeprefix('# ')}")
        return
    if args[0] != "copy" or len(args) != 2:
        raise ValueError(
            f"configs {' '.join(args)}: 'sparsecl configs' lists them, 'sparsecl configs copy DIR' copies them"
        )
    targets = {path: Path(args[1], f"{name}.yaml") for name, path in configs().items()}
    if there := [str(target) for target in targets.values() if target.exists()]:
        raise ValueError(f"configs copy: {there[0]} is there already ({len(there)} in all); nothing was copied")
    for path, target in targets.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    print(f"{len(targets)} configurations copied to {args[1]}")
