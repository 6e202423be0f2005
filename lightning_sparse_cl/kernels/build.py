"""Compiles C++ for this machine when it is first needed, and keeps the result for later runs."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("sparse.cpp")
HEADERS = SOURCE.parent
INSTRUCTIONS = {  # torch's name for this CPU's (or ATEN_CPU_CAPABILITY's) instructions, and the compilers' options
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma"],
    "AVX2": ["-mavx2", "-mfma"],
}


KINDS = {"p": ctypes.c_void_p, "n": ctypes.c_int64, "d": ctypes.c_double}
SIGNATURES = {  # how many pointers, integers and doubles
    "sparse_convolve": "npppppppnp",
    "sparse_correlate": "npppppp",
    "gather": "ppnp",
    "scatter": "ppnp",
    "build_lists": "pp" + "n" * 7 + "p" * 6,
    "place": "p" + "n" * 9 + "p",
    "norm_forward": "pppppnddppppp",
    "norm_backward": "p" * 8 + "n" + "p" * 4,
    "multiply_adds": "n",
    "lanes": "",
    "side": "nnnn",
    "block": "nnd",
}
NUMBERS = {"lanes": ctypes.c_int64, "side": ctypes.c_int64, "block": ctypes.c_int64}  # what functions return


class KernelsUnavailable(RuntimeError):
    """The sparse kernels cannot run on this machine; the message says why, and what helps."""


@cache
def library() -> ctypes.CDLL:
    """The compiled kernels.

    Raises:
        KernelsUnavailable: see :func:`compiled`.
    """
    path = compiled(SOURCE)
    try:
        found = ctypes.CDLL(str(path))
        for name, types in SIGNATURES.items():
            function = getattr(found, name)
            function.argtypes, function.restype = [KINDS[t] for t in types], NUMBERS.get(name)
    except (OSError, AttributeError) as error:
        path.unlink(missing_ok=True)  # compiled anew next time
        raise KernelsUnavailable(f"sparse kernels: {path} cannot be loaded ({error}); it is removed") from error
    return found


def compiled(source: Path, torch_threads: bool = True) -> Path:
    """Compile a C++ file with the kernels' headers, against torch, and return the shared library.

    If not ``torch_threads``, it is compiled without torch, and has threads of its own.

    The compiler is ``$CXX``, else ``c++``, ``g++`` or ``clang++``, whichever is found first; ``$CXXFLAGS`` are added to
    its options. The library is kept in ``$LIGHTNING_SPARSE_CL_CACHE``, else in ``~/.cache/lightning_sparse_cl``, under
    a name that changes with the source, the compiler, torch and the CPU.

    Raises:
        KernelsUnavailable: if there is no compiler, or it fails.
    """
    command = [*_compiler(), *_flags(torch_threads)]
    files = [source, *sorted({*HEADERS.glob("*.h"), *source.parent.glob("*.h")})]
    text = " ".join(command) + "".join(p.read_text() for p in files) + torch.__version__ + platform.machine()
    name = f"{source.stem}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    for folder in _folders():
        path = next(filter(_whole, folder.glob(f"{name}-*.so")), None)
        if path is None:
            try:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                if folder.stat().st_uid != os.getuid():  # it belongs to another user
                    continue
                path = _compile(command, source, folder, name)
            except OSError:  # a folder that cannot be written to
                continue
        return path
    raise KernelsUnavailable("sparse kernels: no folder to compile into; set LIGHTNING_SPARSE_CL_CACHE to one")


@cache
def lanes() -> int:
    """How many lanes a vector has."""
    return int(library().lanes())


def call(name: str, *arguments: Tensor | ctypes.Array[ctypes.c_int64] | int | float | None) -> None:
    """Call a kernel; tensors are passed as pointers. Nothing is checked."""
    getattr(library(), name)(*[a.data_ptr() if isinstance(a, Tensor) else a for a in arguments])


@cache
def numbers(*values: int) -> ctypes.Array[ctypes.c_int64]:
    """An array of int64 for a kernel."""
    return (ctypes.c_int64 * len(values))(*values)


def _compiler() -> list[str]:
    own = shlex.split(os.environ.get("CXX", ""))
    if own and not shutil.which(own[0]):
        raise KernelsUnavailable(f"sparse kernels: CXX={os.environ['CXX']!r}: there is no such compiler")
    for command in (own, ["c++"], ["g++"], ["clang++"]):
        if command and shutil.which(command[0]):
            return command
    raise KernelsUnavailable("sparse kernels: no C++ compiler was found; install g++ or clang++, or name one in CXX")


def _flags(torch_threads: bool = True) -> list[str]:
    torch_folder = Path(torch.__file__).parent
    include, libraries = torch_folder / "include", torch_folder / "lib"
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    always = [
        *("-O3", "-std=c++20", "-shared", "-fPIC", "-fno-math-errno", "-ffp-contract=fast", f"-I{HEADERS}"),
        *(INSTRUCTIONS.get(torch.backends.cpu.get_cpu_capability(), []) if x86 else ["-mcpu=native"]),
        *shlex.split(os.environ.get("CXXFLAGS", "")),
    ]
    if not torch_threads:
        return [*always, "-pthread"]
    return [
        *always,
        *([] if platform.system() == "Darwin" else ["-fopenmp"]),
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        "-DSPNET_TORCH",
        *(f"-I{include}", f"-I{include / 'torch' / 'csrc' / 'api' / 'include'}"),
        *(f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-ltorch_cpu", "-lc10"),
    ]


def _folders() -> list[Path]:
    own = os.environ.get("LIGHTNING_SPARSE_CL_CACHE")
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "lightning_sparse_cl"
    return [Path(own)] if own else [home, Path(tempfile.gettempdir()) / f"lightning_sparse_cl-{os.getuid()}"]


def _whole(path: Path) -> bool:
    """Whether a library is as it was compiled: its name ends with a checksum, as loading a damaged one would crash."""
    return path.stem.endswith(_digest(path))


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _compile(command: list[str], source: Path, folder: Path, name: str) -> Path:
    """Compile into a new file, then move it into place at once: another process may be doing the same."""
    print(f"Compiling the sparse kernels for this CPU into {folder} ...", flush=True)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=folder) as work:
        made = Path(work, "made.so")
        order = [command[0], str(source), *command[1:], "-o", str(made)]
        done = subprocess.run(order, capture_output=True, text=True)
        if done.returncode:
            fault = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[-300:])
            raise KernelsUnavailable(f"sparse kernels: {command[0]} failed ({fault.strip()})")
        path = folder / f"{name}-{_digest(made)}.so"
        os.replace(made, path)
    print(f"Compiled in {time.perf_counter() - start:.0f} s.", flush=True)
    return path
