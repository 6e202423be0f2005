"""timm and transformers as backbones of the methods: what is pruned, what is counted, what is frozen, what is kept."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.optim import SGD
from toy_trainer import trainer

import lightning_sparse_cl as scl
from lightning_sparse_cl.sparsity import Masks

pytestmark = pytest.mark.foreign
LORA = {"peft_type": "LORA", "r": 8, "target_modules": ["qkv"]}
BERT = {
    "model_type": "bert", "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 64, "max_position_embeddings": 16,
}  # fmt: skip
DEPTH, WIDTH, TOKENS = 3, 192, 65


def vit(**kwargs: Any) -> scl.Timm:
    """ViT-tiny of three blocks on 32x32 pixels: 64 patches and the class token."""
    pytest.importorskip("timm")
    return scl.Timm("vit_tiny_patch16_224", options={"patch_size": 4, "depth": DEPTH}, **kwargs)


def images(**kwargs: Any) -> scl.SplitTensors:
    generator, y = torch.Generator().manual_seed(0), torch.arange(64) % 4
    x = torch.randint(100, (64, 3, 32, 32), generator=generator, dtype=torch.uint8)
    x[:, 0, :16] += (50 * y).byte().view(-1, 1, 1)
    return scl.SplitTensors((x, y), (x, y), 2, batch_size=16, **kwargs)


def texts() -> scl.SplitTensors:
    y = torch.arange(64) % 4
    ids = torch.randint(10, (64, 12), generator=torch.Generator().manual_seed(0)) + 10 * y[:, None]
    x = {"ids": ids, "mask": torch.arange(12) < 4 + torch.arange(64)[:, None] % 8}
    return scl.SplitTensors((x, y), (x, y), 2, batch_size=16)


def learner(backbone: Any, **kwargs: Any) -> scl.ContinualModule:
    return scl.ContinualModule(backbone, scl.DERpp(20, 8), optimizer=partial(SGD, lr=0.01), **kwargs)


METHODS: dict[str, Callable[[Any], scl.ContinualModule]] = {
    "SparCL": lambda backbone: scl.SparCL(
        backbone, scl.DERpp(20, 8), scl.TaskAwareDynamicMasking(0.9, 1), scl.DynamicDataRemoval(0.1, 1, 1)),
    "EsaCL": lambda backbone: scl.EsaCL(backbone, scl.DERpp(20, 8), 0.9),
    "ContinualDST": scl.ContinualDST,
    "SNIP": lambda backbone: learner(backbone, policies=[scl.SNIP(0.9)]),
    "RigL": lambda backbone: learner(backbone, policies=[scl.RigL(0.9, interval=2)]),
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_attention_and_mlp_of_a_vit_are_pruned_exactly(method: str) -> None:
    pl.seed_everything(0, verbose=False)
    module, flops = METHODS[method](vit()), scl.FlopsCounter()
    trainer(scl.ContinualEvaluation(), flops, scl.RandomState(), epochs=2).fit(module, images())
    pruned = {name for name in Masks.of(module) if "patch_embed" not in name}
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert pruned == {f"backbone.model.blocks.{b}.{layer}.weight" for b in range(DEPTH) for layer in layers}
    weights = [module.get_parameter(name) for name in pruned]
    counts = [(int(w.count_nonzero()), w.numel()) for w in weights]
    if method == "SparCL":  # TDM grows some between prunings
        assert all(0.09 * number < alive < 0.11 * number for alive, number in counts)
    elif method != "ContinualDST":  # whose tasks have different weights
        assert all(abs(alive - 0.1 * number) <= 1 for alive, number in counts)
        assert abs(sum(alive - 0.1 * number for alive, number in counts)) <= 1


def test_flops_of_a_vit_are_those_counted_by_hand() -> None:
    module, flops = learner(vit()), scl.FlopsCounter()
    trainer(flops, epochs=1).fit(module, images())
    of_block = TOKENS * (4 + 8) * WIDTH**2 + 2 * TOKENS**2 * WIDTH  # qkv and proj, the MLP; attention
    patches, head = 64 * 48 * WIDTH, WIDTH * 4
    forward = 2 * (DEPTH * of_block + patches + head)
    found = flops.summary()
    assert found["training"] == 3 * forward * found["forward"]  # the way back counts twice, as in the papers


def test_kernels_change_nothing_but_the_time() -> None:
    results = []
    for kernels in (False, True):
        pl.seed_everything(0, verbose=False)
        module, evaluation = METHODS["SparCL"](vit()), scl.ContinualEvaluation()
        if kernels:
            module.policies.append(scl.SparseAcceleration(measure=False))
        trainer(evaluation, scl.RandomState(), epochs=1).fit(module, images())
        results.append(module.state_dict())
    for name, dense in results[0].items():
        if torch.is_tensor(dense) and dense.is_floating_point():
            torch.testing.assert_close(results[1][name], dense, atol=2e-3, rtol=1e-2, msg=name)


def test_adapters_alone_are_trained_and_masked() -> None:
    pytest.importorskip("peft")
    pl.seed_everything(0, verbose=False)
    module = learner(vit(adapters=LORA), policies=[scl.SNIP(0.5, dense=[])])
    data = images()
    fitting = trainer(scl.ContinualEvaluation(), epochs=1)
    fitting.fit(module, data)
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in module.named_parameters() if "lora" in n or n.startswith("head")}
    assert all("lora" in name or name == "head.weight" for name in Masks.of(module)) and len(list(Masks.of(module))) > 1


def test_what_is_frozen_stays_and_patterns_train_a_part(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    for trained, moving in (([], []), (["layer4.*"], ["layer4"])):
        pl.seed_everything(0, verbose=False)
        module = learner(scl.Timm("resnet10t", trained=trained))
        fitting, data = trainer(epochs=1), images()
        before: dict[str, Tensor] = {}

        class Keep(pl.Callback):
            def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
                before.update({n: t.clone() for n, t in pl_module.backbone.state_dict().items()})  # noqa: B023

        fitting.callbacks.append(Keep())
        fitting.fit(module, data)
        moved = {n for n, t in module.backbone.state_dict().items() if not torch.equal(t, before[n])}
        assert moved if moving else not moved
        assert all(any(part in n for part in moving) for n in moved)


@pytest.mark.parametrize("kind", ["timm", "lora", "transformers"])
def test_a_checkpoint_makes_its_backbone_again(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("peft" if kind == "lora" else kind)
    pl.seed_everything(0, verbose=False)
    backbone = (
        scl.Transformers(config=BERT) if kind == "transformers" else vit(adapters=LORA if kind == "lora" else None)
    )
    module, data = learner(backbone), texts() if kind == "transformers" else images()
    fitting = trainer(scl.ContinualEvaluation(), epochs=1)
    fitting.fit(module, data)
    fitting.save_checkpoint(tmp_path / "a.ckpt")
    loaded = scl.ContinualModule.load_from_checkpoint(tmp_path / "a.ckpt")
    stored = data.test_sets[0].inputs
    assert loaded.predict_samples(stored) == module.predict_samples(stored)


def test_a_local_file_of_weights_and_the_normalisation_that_they_expect(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    known = timm.create_model("resnet10t", num_classes=0)
    torch.save(known.state_dict(), tmp_path / "weights.pth")
    backbone = scl.Timm("resnet10t", checkpoint_path=str(tmp_path / "weights.pth")).eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(backbone(x), known.eval()(x))
    transform = scl.Timm.transform("resnet10t")
    config = timm.get_pretrained_cfg("resnet10t")
    torch.testing.assert_close(transform(torch.full((1, 3, 2, 2), 255, dtype=torch.uint8))[0, :, 0, 0],
        (1 - torch.tensor(config.mean)) / torch.tensor(config.std))  # fmt: skip
    assert scl.Timm("resnet10t")(torch.randn(2, 5, 32, 32)).shape == (2, 512)  # as many channels as there are


def test_a_local_model_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    known = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(**BERT)).eval()
    known.save_pretrained(tmp_path)
    ids = torch.randint(50, (2, 6))
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]]).bool()
    for pool in ("mean", "first"):
        found = scl.Transformers(str(tmp_path), pool=pool).eval()({"ids": ids, "mask": mask})
        states = known(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        wanted = states[:, 0] if pool == "first" else torch.stack([states[0].mean(0), states[1, :2].mean(0)])
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("precision", ["bf16-true", "64-true", "bf16-mixed"])
@pytest.mark.parametrize("kind", ["vit", "resnet10t"])
def test_every_precision_of_lightning(kind: str, precision: Any) -> None:
    pytest.importorskip("timm")
    module = learner(vit() if kind == "vit" else scl.Timm("resnet10t"))
    trainer(epochs=1, precision=precision).fit(module, images())
    kinds = {p.dtype for p in module.backbone.parameters()}
    assert kinds == {{"bf16-true": torch.bfloat16, "64-true": torch.float64}.get(precision, torch.float32)}


REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: scl.Timm("no_such"), r"Timm\(name='no_such'\): timm has no such model"),
    (lambda: scl.Timm("test_vit")(torch.zeros(1, 3, 8, 8)), r"Timm\(name='test_vit'\): .*8"),
    (lambda: vit()(torch.zeros(1, 31)), r"it takes images \(B, C, H, W\)"),
    (lambda: scl.Timm("resnet10t", checkpoint_path="nowhere")(torch.zeros(1, 3, 32, 32)), "resnet10t.*nowhere"),
    (lambda: vit(trained=["neck.*"])(torch.zeros(1, 3, 32, 32)), r"'neck.\*' fits no parameter; they are cls_token"),
    (lambda: scl.Timm("resnet10t", trained="layer*"), r"trained='layer\*'\): a list of patterns"),
    (lambda: scl.Timm("resnet10t", adapters={"r": 8}), "a dict with a peft_type"),
    (lambda: vit(adapters={"peft_type": "LORAA"})(torch.zeros(1, 3, 32, 32)), "got the peft_type 'LORAA', and"),
    (
        lambda: scl.Transformers(config=BERT | {"model_type": "roberta"})(torch.full((1, 16), 7)),
        "texts of 16 tokens are too long for max_position_embeddings=16 of its config",
    ),
    (lambda: scl.Transformers(config=BERT)(torch.full((1, 4), 50)), "token id 50; vocab_size of its config is 50"),
    (lambda: scl.Transformers(config=BERT)(torch.zeros(1, 20).long()), "20 tokens; max_position_embeddings .* is 16"),
    (lambda: scl.Transformers(), "give path, or a config with a model_type"),
    (lambda: scl.Transformers(config=BERT, pool="sum"), "pool is 'mean' or 'first'"),
    (
        lambda: scl.Transformers(config={"model_type": "birt"})(torch.zeros(1, 4).long()),
        "Unrecognized model identifier",
    ),
    (
        lambda: scl.Transformers(config=BERT)((torch.zeros(1, 4),)),
        "it takes a tensor or a dict of tensors, got a tuple",
    ),
]


@pytest.mark.parametrize(("make", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_refusals_are_one_line(make: Callable[[], Any], message: str) -> None:
    pytest.importorskip("timm")
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
