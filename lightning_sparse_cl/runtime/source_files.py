"""The runtime's source, to be compiled elsewhere."""

from __future__ import annotations

import os
from pathlib import Path

from lightning_sparse_cl.kernels.build import HEADERS
from lightning_sparse_cl.whole_file import whole_file

HERE = Path(__file__).parent


def write_runtime(folder: str | os.PathLike) -> list[Path]:
    """Write the runtime's source into a folder: ``spnet.h`` and ``spnet.cpp``, C++17 without dependencies.

    ``c++ -std=c++17 -O3 -march=native -pthread -c spnet.cpp`` compiles it. Beside them are ``example.c`` and
    ``example.py``, programs that say what images show, and a ``CMakeLists.txt``.
    """
    source = (HERE / "spnet.cpp").read_text()
    for header in (HEADERS / "convolve.h", HERE / "plan.h"):
        source = source.replace(f'#include "{header.name}"', header.read_text())
    Path(folder).mkdir(parents=True, exist_ok=True)
    texts = {name: (HERE / name).read_text() for name in ("spnet.h", "example.c", "example.py", "CMakeLists.txt")}
    texts["spnet.cpp"] = source
    for file, text in texts.items():
        with whole_file(Path(folder, file)) as part:
            part.write_text(text)
    return [Path(folder, file) for file in texts]
