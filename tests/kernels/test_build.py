"""The kernels are compiled when they are needed, and it is said when they cannot be."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_sparse_cl.kernels import KernelsUnavailable, build


def test_without_a_compiler_there_is_a_clear_error(monkeypatch, tmp_path):
    monkeypatch.setenv("LIGHTNING_SPARSE_CL_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    build.library.cache_clear()
    try:
        with pytest.raises(KernelsUnavailable, match="no C\\+\\+ compiler"):
            build.library()
        (tmp_path / "c++").write_text("#!/bin/sh\necho 'error: no' >&2\nexit 1\n")
        (tmp_path / "c++").chmod(0o755)
        with pytest.raises(KernelsUnavailable, match=r"failed .*error: no"):
            build.library()
        assert not list(tmp_path.glob("*.so"))
    finally:
        build.library.cache_clear()


@pytest.mark.slow  # it compiles all kernels
def test_a_damaged_library_is_compiled_anew(monkeypatch, tmp_path):
    monkeypatch.setenv("LIGHTNING_SPARSE_CL_CACHE", str(tmp_path))
    flags = [*build._flags(), "-O0"]
    monkeypatch.setattr(build, "_flags", lambda *_: flags)
    build.library.cache_clear()
    try:
        build.library()
        (made,) = tmp_path.glob("*.so")
        whole = made.read_bytes()
        made.unlink()  # the loaded one lives on
        made.write_bytes(whole[: len(whole) // 2])
        build.library.cache_clear()
        assert build.library().lanes() in (4, 8, 16)
        assert whole in [path.read_bytes() for path in tmp_path.glob("*.so")]
    finally:
        build.library.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_other_instructions_pass_the_same_tests(capability):
    env = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    tests = Path(__file__).parents[1]
    files = [tests / "kernels" / "test_patterns.py", tests / "acceleration" / "test_networks.py"]
    subprocess.run([sys.executable, "-m", "pytest", "-q", *files], env=env, check=True)
