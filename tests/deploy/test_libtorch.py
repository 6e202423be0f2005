"""The way for what the runtime does not know: a C++ program with libtorch runs what was exported."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from exported import network
from torch import nn

import lightning_sparse_cl as scl

PROGRAM = """
#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <cstdio>
int main(int, char** a) {
  torch::inductor::AOTIModelPackageLoader loader(a[1]);
  auto images = at::linspace(-1, 1, 2 * 3 * 16 * 16).view({2, 3, 16, 16});
  auto found = loader.run({images})[0].contiguous();
  for (int64_t i = 0; i < found.numel(); i++) std::printf("%.9g\\n", found.data_ptr<float>()[i]);
}
"""


@pytest.mark.slow
def test_a_program_with_libtorch(tmp_path: Path) -> None:
    if shutil.which("c++") is None:
        pytest.skip("there is no C++ compiler")
    net, shape = network("SmallCNN")
    net = nn.Sequential(net, nn.GELU()).eval()  # which no runtime layer computes
    with pytest.raises(ValueError, match="GELU"):
        scl.export_model(net, tmp_path / "model.spnet", shape)
    scl.export_model(net, tmp_path / "model.pt2", shape)
    program = torch.export.load(tmp_path / "model.pt2")
    torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "compiled.pt2"))
    (tmp_path / "program.cpp").write_text(PROGRAM)
    folder = Path(torch.__file__).parent
    includes = [f"-I{folder / 'include'}", f"-I{folder / 'include' / 'torch' / 'csrc' / 'api' / 'include'}"]
    libraries = [f"-L{folder / 'lib'}", f"-Wl,-rpath,{folder / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    order = ["c++", "-std=c++20", abi, *includes, "program.cpp", "-Wl,--no-as-needed", *libraries, "-o", "program"]
    subprocess.run(order, cwd=tmp_path, check=True)
    done = subprocess.run(["./program", "compiled.pt2"], cwd=tmp_path, check=True, capture_output=True, text=True)
    found = torch.tensor([float(line) for line in done.stdout.split()]).view(2, -1)
    with torch.no_grad():
        wanted = net(torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, *shape))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
