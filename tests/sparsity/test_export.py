"""Sparse files give back the same bits, are smaller, and are refused when they are damaged."""

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from lightning_sparse_cl import ResNet18, load_sparse, save_sparse


def pruned(density, dtype=torch.float32):
    torch.manual_seed(0)
    network = nn.Sequential(ResNet18(8), nn.Linear(64, 10))
    network.eval()(torch.zeros(1, 3, 8, 8))
    network = network.to(dtype).to(memory_format=torch.channels_last)
    for p in network.parameters():
        if p.ndim > 1:
            p.data *= torch.rand(p.shape) < density
    network[0].stages[3][1].conv2.weight.data.zero_()
    return network


@pytest.mark.parametrize("layout", ["bitmask", "csr"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("density", [0.02, 0.25, 1.0])
def test_the_same_bits_come_back(tmp_path, layout, dtype, density):
    network = pruned(density, dtype)
    size = save_sparse(network, tmp_path / "x", layout)
    assert size == (tmp_path / "x").stat().st_size and not list(tmp_path.glob("*.part"))
    state = load_sparse(tmp_path / "x")
    assert state.keys() == network.state_dict().keys()
    for name, tensor in network.state_dict().items():
        assert state[name].dtype == tensor.dtype and state[name].shape == tensor.shape
        assert torch.equal(state[name], tensor)
    network.load_state_dict(state)


def test_sizes():
    """Bits cost 1/32 of a float weight; from 97 % sparsity on, 16-bit columns cost less."""
    network = nn.Linear(1024, 1024, bias=False)
    sizes = {}
    for density in (0.1, 0.02):
        network.weight.data.copy_(torch.randn(1024, 1024) * (torch.rand(1024, 1024) < density))
        for layout in ("bitmask", "csr"):
            sizes[layout, density] = save_sparse(network, "x", layout) / (4 * 2**20)
    assert sizes["bitmask", 0.1] == pytest.approx(0.1 + 1 / 32, abs=2e-3)
    assert sizes["csr", 0.1] == pytest.approx(0.15, abs=4e-3)
    assert sizes["csr", 0.02] < sizes["bitmask", 0.02]


def test_names_that_look_like_parts():
    zeros = torch.zeros(8, 8)
    save_sparse({"a": zeros, "a:b": torch.ones(2)}, "x")
    assert load_sparse("x").keys() == {"a", "a:b"}
    with pytest.raises(ValueError, match="'a:values' is the name of two parts"):
        save_sparse({"a": zeros, "a:values": torch.ones(2)}, "x")
    with pytest.raises(OSError, match="not written"):
        save_sparse({"a": zeros}, "missing/x")


def test_what_is_no_tensor_stays_out_and_tied_weights_come_back():
    layer = nn.Linear(8, 8)
    network = nn.Sequential(layer, layer)
    save_sparse(network.state_dict() | {"extra": {"seen": 3}}, "x")
    assert load_sparse("x").keys() == network.state_dict().keys()
    network.load_state_dict(load_sparse("x"))


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    save_sparse(pruned(0.2), path)
    whole = path.read_bytes()
    for cut in (0, 7, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"model\.safetensors.*truncated"):
            load_sparse(path)
    for at in range(9, len(whole), len(whole) // 60):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(ValueError, match=r"model\.safetensors.*(altered|not a file of save_sparse)"):
            load_sparse(path)
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="not a file of save_sparse"):
        load_sparse(path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_sparse(tmp_path / "none")
    with pytest.raises(ValueError, match="layout='coo'"):
        save_sparse(pruned(0.2), path, "coo")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    save_sparse(pruned(0.2), path)
    before = path.read_bytes()

    def full(*_):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("lightning_sparse_cl.sparsity.export.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_sparse(pruned(0.5), path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
