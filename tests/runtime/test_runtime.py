"""The runtime without Python: compiled alone, with sanitizers, and asked for the classes of image files."""

from __future__ import annotations

import os
import platform
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from exported import NETWORKS, data_of, network, signed, trained

import lightning_sparse_cl as scl
from lightning_sparse_cl.runtime.description import layers_of
from lightning_sparse_cl.runtime.file import SUMMED_FROM, spnet_bytes

X86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="other instructions")
SANITIZED = ["-O2", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
MUTATIONS = int(os.environ.get("SPNET_MUTATIONS", 20_000))
FUZZ = """
#include <cstdio>
#include <cstring>
#include <vector>
#include "spnet.h"
// Files one behind the other, each after its size: opens and runs them
int main(int, char** a) {
  FILE* f = std::fopen(a[1], "rb");
  spnet_threads(2);
  long opened = 0, all = 0;
  for (uint64_t size; std::fread(&size, 8, 1, f) == 1; all++) {
    std::vector<uint8_t> bytes(size);
    if (std::fread(bytes.data(), 1, size, f) != size) return 3;
    spnet* n;
    if (spnet_read(bytes.data(), size, &n) != SPNET_OK) continue;
    int64_t s[3];
    spnet_shape(n, s);
    spnet_name(n, 0), spnet_name(n, 1 << 20), spnet_metadata(n);
    if (s[0] * s[1] * s[2] < 1 << 14 && spnet_outputs(n) < 1 << 14) {
      std::vector<float> x(3 * s[0] * s[1] * s[2], 0.5f), y(3 * spnet_outputs(n));
      spnet_run(n, x.data(), 3, 0, y.data()), spnet_run(n, x.data(), 1, 1, y.data()), opened++;
    }
    spnet_close(n);
  }
  std::printf("%ld of %ld\\n", opened, all);
}
"""


def compiler(name: str) -> str:
    if shutil.which(name) is None:
        pytest.skip(f"there is no {name}")
    return name


def built(folder: Path, cc: str, cxx: str, options: list[str]) -> Path:
    """The example program."""
    scl.write_runtime(folder)
    warn = ["-Wall", "-Wextra", "-Werror"]
    subprocess.run([cc, "-std=c99", *warn, *options, "-c", "example.c"], cwd=folder, check=True)
    subprocess.run([cxx, "-std=c++17", *warn, *options, "-c", "spnet.cpp"], cwd=folder, check=True)
    subprocess.run([cxx, *options, "example.o", "spnet.o", "-pthread", "-o", "example"], cwd=folder, check=True)
    return folder / "example"


@pytest.mark.parametrize(
    ("cc", "cxx", "options"),
    [
        ("gcc", "g++", ["-O1"]),
        pytest.param("gcc", "g++", ["-O3", "-march=native"], marks=pytest.mark.slow),
        pytest.param("gcc", "g++", ["-O2", "-mavx2", "-mfma"], marks=[pytest.mark.slow, X86]),
        pytest.param("gcc", "g++", SANITIZED, marks=pytest.mark.slow),
        pytest.param("clang", "clang++", ["-O2"], marks=pytest.mark.slow),
        pytest.param("clang", "clang++", SANITIZED, marks=pytest.mark.slow),
        pytest.param("aarch64-linux-gnu-gcc", "aarch64-linux-gnu-g++", ["-O2", "-static"], marks=pytest.mark.slow),
    ],
)
def test_a_c_program_says_the_same_classes(cc: str, cxx: str, options: list[str], tmp_path: Path) -> None:
    emulated = [compiler("qemu-aarch64")] if cc.startswith("aarch64") and platform.machine() != "aarch64" else []
    program = [*emulated, str(built(tmp_path, compiler(cc), compiler(cxx), options))]
    module, data = trained()
    scl.export_model(module, tmp_path / "model.spnet")
    stored = torch.cat([d.inputs for d in data.test_sets])[::7]
    files = []
    for i, image in enumerate(stored):
        files.append(f"{i}.pgm")
        (tmp_path / files[-1]).write_bytes(b"P5\n# drawn by hand\n8 8 #\n255\n" + image.numpy().tobytes())
    done = subprocess.run([*program, "model.spnet", *files], cwd=tmp_path, capture_output=True, text=True, check=True)
    wanted = [f"{file}: {found.name}" for file, found in zip(files, module.predict_images(stored), strict=True)]
    assert done.stdout.splitlines() == wanted and not done.stderr
    (tmp_path / "bad.pgm").write_bytes(b"P5 9 8 255\n")
    done = subprocess.run([*program, "model.spnet", "bad.pgm"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "an image of 8x8 pixels and 1 channels is expected" in done.stderr
    (tmp_path / "cut.spnet").write_bytes((tmp_path / "model.spnet").read_bytes()[:-8])
    done = subprocess.run([*program, "cut.spnet", "0.pgm"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "it is cut, or too long" in done.stderr


OUTPUTS = """
#include <stdio.h>
#include <stdlib.h>
#include "spnet.h"
// Which vectors are used, and the outputs for floats from a file
int main(int n, char** a) {
  spnet* network;
  int64_t s[3];
  if (n != 4 || spnet_open(a[1], &network) != SPNET_OK) return 1;
  int count = atoi(a[3]);
  spnet_shape(network, s);
  size_t all = (size_t)(count * s[0] * s[1] * s[2]), outputs = (size_t)(count * spnet_outputs(network));
  float *x = malloc(4 * all), *y = malloc(4 * outputs);
  FILE* f = fopen(a[2], "rb");
  if (fread(x, 4, all, f) != all || spnet_run(network, x, count, 0, y) != SPNET_OK) return 2;
  puts(spnet_instructions());
  for (size_t i = 0; i < outputs; i++) printf("%.9g\\n", y[i]);
  free(x), free(y), fclose(f), spnet_close(network);
}
"""
KINDS = {  # how to compile, and how to run
    "avx512": ("", ["-O1"], []),
    "avx2": ("", ["-O1"], []),
    "plain": ("", ["-O1"], []),
    "NEON": ("aarch64-linux-gnu-", ["-O2", "-static"], ["qemu-aarch64"]),
    "a CPU without AVX-512": ("", ["-O1", "-static"], ["qemu-x86_64", "-cpu", "Haswell"]),
    "a CPU without AVX": ("", ["-O1", "-static"], ["qemu-x86_64", "-cpu", "Nehalem"]),
}


@X86
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_vectors_computes_the_same(kind: str, tmp_path: Path) -> None:
    prefix, options, run = KINDS[kind]
    for tool in (f"{prefix}g++", *run[:1]):
        compiler(tool)
    scl.write_runtime(tmp_path)
    (tmp_path / "outputs.c").write_text(OUTPUTS)
    subprocess.run([f"{prefix}gcc", *options, "-c", "outputs.c"], cwd=tmp_path, check=True)
    subprocess.run([f"{prefix}g++", "-std=c++17", *options, "-c", "spnet.cpp"], cwd=tmp_path, check=True)
    order = [f"{prefix}g++", *options, "outputs.o", "spnet.o", "-pthread", "-o", "outputs"]
    subprocess.run(order, cwd=tmp_path, check=True)
    used = set()
    for name in NETWORKS:
        net, shape = network(name)
        scl.export_model(net, tmp_path / "model.spnet", shape)
        for count in (1, 5, 33):
            x = torch.randn(count, *shape)
            (tmp_path / "x").write_bytes(x.numpy().tobytes())
            done = subprocess.run(
                [*run, "./outputs", "model.spnet", "x", str(count)],
                cwd=tmp_path, capture_output=True, text=True, check=True,
                env=os.environ | ({"SPNET_INSTRUCTIONS": kind} if not run else {}),
            )  # fmt: skip
            first, *numbers = done.stdout.split()
            used.add(first)
            wanted = net(x).detach().flatten()
            torch.testing.assert_close(torch.tensor([float(n) for n in numbers]), wanted, rtol=1e-4, atol=1e-5)
    has = {f"avx{k}" for k in ("2", "512") if f"AVX{k}" in torch.backends.cpu.get_cpu_capability()} | {"plain"}
    if not run:
        assert used == ({kind} if kind in has or "avx512" in has else {"plain"})
    else:
        assert used == ({"avx2"} if kind == "a CPU without AVX-512" else {"plain"})


@pytest.mark.slow
def test_cmake_and_python_alone(tmp_path: Path) -> None:
    """A shared library, which Python calls without torch or this package."""
    compiler("cmake")
    scl.write_runtime(tmp_path)
    for order in (["-B", "build", "-DBUILD_SHARED_LIBS=ON"], ["--build", "build"]):
        subprocess.run(["cmake", *order], cwd=tmp_path, check=True, capture_output=True)
    module, data = trained()
    scl.export_model(module, tmp_path / "model.spnet")
    stored, files = torch.cat([d.inputs for d in data.test_sets])[::20], []
    for i, image in enumerate(stored):
        files.append(f"{i}.pgm")
        (tmp_path / files[-1]).write_bytes(b"P5\n8 8\n255\n" + image.numpy().tobytes())
    (library,) = (tmp_path / "build").glob("libspnet.*")
    alone = [sys.executable, "-I", "-S", "example.py", str(library), "model.spnet", *files]
    wanted = [f"{file}: {found.name}" for file, found in zip(files, module.predict_images(stored), strict=True)]
    for order in (["build/example", "model.spnet", *files], alone):
        done = subprocess.run(order, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert done.stdout.splitlines() == wanted
    (tmp_path / "cut.pgm").write_bytes(b"P5 8 8 255\n" + bytes(10))
    done = subprocess.run([*alone[:6], "cut.pgm"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "an image of 8x8 pixels and 1 channels is expected" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("cxx", ["g++", "clang++"])
def test_sanitizers_report_nothing_of_hostile_files(cxx: str, tmp_path: Path) -> None:
    scl.write_runtime(tmp_path)
    (tmp_path / "fuzz.cpp").write_text(FUZZ)
    options = ["-std=c++17", "-march=native", *SANITIZED, "-pthread", "-o", "fuzz"]
    subprocess.run([compiler(cxx), *options, "fuzz.cpp", "spnet.cpp"], cwd=tmp_path, check=True)
    rng = random.Random(0)
    whole = [data_of(name) for name in ("pre-activation", "averages", "SmallMLP", "dilation, groups")]
    net, shape = network("SmallCNN")
    whole += [spnet_bytes(layers_of(net, shape), shape, values=kind) for kind in ("int8", "bfloat16")]
    with (tmp_path / "files").open("wb") as out:
        for _ in range(MUTATIONS):
            body = bytearray(rng.choice(whole))
            for _ in range(rng.choice([1, 1, 2, 4])):
                at = rng.randrange(SUMMED_FROM, min(len(body), 1200))
                body[at] = rng.choice([body[at] ^ 1 << rng.randrange(8), 0, 1, 127, 255, rng.randrange(256)])
            found = signed(bytes(body)) if rng.random() < 0.95 else bytes(body)
            out.write(len(found).to_bytes(8, "little") + found)
    done = subprocess.run([tmp_path / "fuzz", "files"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    opened, every = (int(n) for n in done.stdout.split(" of "))
    assert every == MUTATIONS and opened > MUTATIONS // 20
