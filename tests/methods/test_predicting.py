"""Predictions for raw images: by what a module knows of its data, in any process, for any kind of image."""

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from PIL import Image
from toy_trainer import trainer

import lightning_sparse_cl as scl
from lightning_sparse_cl.demos import toy_tasks

CLASSES = ["ant", "bee", "cat", "dog"]


@pytest.fixture
def photos(tmp_path):
    """Images of all sizes, grey and RGB, in the folders of a data set."""
    random, folder = np.random.RandomState(0), tmp_path / "photos"
    for part, count in (("train", 12), ("test", 3)):
        for c, name in enumerate(CLASSES):
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                shape = (*random.randint(6, 30, 2), 3)[: 2 if i == 0 else 3]
                pixels = np.clip(random.normal(50 * (c + 1), 10, shape), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{i}.png")
    return folder


@pytest.fixture
def trained(photos):
    pl.seed_everything(0, verbose=False)
    data = scl.SplitImageFolder(str(photos), num_tasks=2, size=10, batch_size=8)
    (t := trainer(epochs=3)).fit(model := scl.EsaCL(scl.SmallCNN(4), scl.DERpp(20, 8, forward="joint")), data)
    return t, model, data


def assert_same(found, wanted):
    """Sums of other batches are rounded otherwise."""
    found = list(found)
    assert [p[::2] for p in found] == [p[::2] for p in wanted]
    assert [p[1] for p in found] == pytest.approx([p[1] for p in wanted], abs=1e-5)


def images_of(photos):
    return [str(p) for p in sorted((photos / "test").rglob("*.png"))]


def test_raw_images_go_the_way_that_training_images_went(trained, photos):
    t, model, data = trained
    stored = torch.cat([x for loader in data.test_dataloader() for x, _ in loader])
    assert torch.equal(model.prepare_images(images_of(photos)), data.prepare(stored, augment=False))
    labels = torch.cat([part for loader in t.predict(model, data) for part in loader])
    found = model.predict_images(images_of(photos), batch_size=5)
    assert [p.name for p in found] == [CLASSES[label] for label in labels.tolist()]
    assert [p.task for p in found] == [label // 2 for label in labels.tolist()]
    assert len(set(labels.tolist())) > 1 and all(0.25 < p.probability <= 1 for p in found)


def test_a_checkpoint_alone_predicts_the_same_in_a_fresh_process(trained, photos, tmp_path):
    t, model, _ = trained
    t.save_checkpoint(tmp_path / "last.ckpt")
    script = """
import json, sys
import lightning_sparse_cl as scl
module = scl.ContinualModule.load_from_checkpoint(sys.argv[1])
print(json.dumps([type(module).__name__, module.predict_images(sys.argv[2:])]))
"""
    command = [sys.executable, "-c", script, str(tmp_path / "last.ckpt"), *images_of(photos)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(scl.__file__).parents[1])
    assert done.returncode == 0, done.stderr[-2000:]
    name, there = json.loads(done.stdout.splitlines()[-1])
    assert name == "EsaCL"
    assert_same(map(tuple, there), model.predict_images(images_of(photos)))


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_know_the_data_too(trained, photos, twin):
    _, model, _ = trained
    assert twin(model).predict_images(images_of(photos)) == model.predict_images(images_of(photos))


def test_a_kind_of_image_does_not_matter(trained, photos):
    _, model, _ = trained
    paths = images_of(photos)
    opened = [Image.open(p) for p in paths]
    tensors = [torch.from_numpy(np.array(p.convert("RGB"))).permute(2, 0, 1) for p in opened]
    wanted = model.predict_images(paths)
    assert model.predict_images(opened) == wanted == model.predict_images(tensors)
    assert_same(model.predict_images(paths[0]), wanted[:1])
    assert_same(model.predict_images(opened[0]), wanted[:1])
    assert model.predict_images([]) == []
    small = [p.convert("RGB").resize((10, 10), Image.Resampling.BILINEAR) for p in opened]
    assert model.predict_images(torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) for p in small])) == wanted


def test_networks_for_grey_images_take_colour():
    data = scl.SplitDigits(num_tasks=5, batch_size=32)
    trainer(epochs=1).fit(model := scl.ContinualModule(scl.SmallMLP([8])), data)
    grey = data.test_sets[0].inputs[:4]
    colour = [Image.fromarray(image[0].numpy()).convert("RGB") for image in grey]
    assert model.predict_images(grey) == model.predict_images(colour)
    assert torch.equal(model.prepare_images(grey.repeat(1, 3, 1, 1)), model.prepare_images(grey))


def test_each_tasks_subnetwork_is_asked():
    pl.seed_everything(0, verbose=False)
    data = toy_tasks()
    trainer(epochs=6).fit(
        model := scl.ContinualDST(scl.SmallMLP([16]), growth=scl.SET(0.5, dense=["head.weight"])), data
    )
    images = torch.cat([d.inputs for d in data.test_sets])
    found = model.predict_images(images)
    logits = model.eval()(data.prepare(images, augment=False))
    assert [p.name for p in found] == [str(i) for i in logits.argmax(1).tolist()]
    assert [p.probability for p in found] == pytest.approx(logits.softmax(1).amax(1).tolist(), rel=1e-4)
    assert {p.task for p in found} == {int(p.name) // 2 for p in found} and len({p.task for p in found}) > 1


def test_a_class_of_several_tasks_belongs_to_none():
    trainer(epochs=1).fit(model := scl.ContinualModule(scl.SmallMLP([8])), scl.PermutedDigits(2, batch_size=64))
    assert {p.task for p in model.predict_images(torch.zeros(3, 1, 8, 8, dtype=torch.uint8))} == {None}


def test_what_is_known_grows_with_a_second_fit():
    model = scl.ContinualModule(scl.SmallMLP([8]))
    trainer(epochs=1).fit(model, toy_tasks(num_tasks=3))
    first = model.data_description
    trainer(epochs=1).fit(model, toy_tasks(num_tasks=2))
    assert len(first.classes) == 3 and len(model.data_description.classes) == 5


def test_testing_other_data_does_not_change_what_is_known(tmp_path):
    model = scl.ContinualModule(scl.SmallMLP([8]))
    trainer(epochs=1).fit(model, toy_tasks())
    known = model.data_description
    (t := trainer(epochs=1)).test(model, scl.SplitDigits(num_tasks=5), verbose=False)
    t.save_checkpoint(tmp_path / "x.ckpt")
    assert scl.ContinualModule.load_from_checkpoint(tmp_path / "x.ckpt").data_description == known


def test_what_cannot_be_predicted_is_told(tmp_path):
    model = scl.ContinualModule(scl.SmallMLP([8]))
    image = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match="train it"):
        model.predict_images(image)

    class Own(scl.ImageTransform):
        pass

    trainer(epochs=1).fit(model, toy_tasks(transform=Own([0.5], [0.5])))
    with pytest.raises(ValueError, match="give transform="):
        model.predict_images(image)
    assert len(model.predict_images(image, transform=Own([0.5], [0.5]))) == 2
    trainer(epochs=1).fit(model, toy_tasks())
    (broken := tmp_path / "broken.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"broken\.png"):
        model.predict_images([broken])
    with pytest.raises(ValueError, match="image 0: uint8 of shape"):
        model.predict_images(torch.zeros(2, 1, 9, 9))


def test_float_images_are_taken_as_they_are():
    images, labels = torch.randn(80, 1, 8, 8), torch.arange(80) % 4
    data = scl.SplitTensors((images, labels), (images, labels), num_tasks=2, batch_size=10)
    trainer(epochs=1).fit(model := scl.ContinualModule(scl.SmallMLP([8])), data)
    assert torch.equal(model.prepare_images(images[:3]), images[:3])
    with pytest.raises(ValueError, match=r"torch\.float32 \(1, 8, 8\)"):
        model.predict_images(torch.zeros(1, 1, 8, 8, dtype=torch.uint8))
