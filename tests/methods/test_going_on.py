"""A trained module learns further tasks in Python: whatever Trainer, copy, file or data they come with."""

import copy
import pickle

import pytest
import torch
from toy_trainer import trainer

import lightning_sparse_cl as scl

FIRST, LATER = [[0, 1], [2, 3]], [[4, 5], [6, 7]]


def digits(tasks, **options):
    return scl.SplitDigits(tasks=tasks, batch_size=32, **options)


def esacl():
    return scl.EsaCL(scl.SmallCNN(4), scl.DERpp(60, 16), sparsity=0.5, selection=scl.LossSelection(1, 1))


def learnt(module=None, tasks=FIRST, **options):
    torch.manual_seed(0)
    module = module or esacl()
    trainer(scl.RandomState(), scl.ContinualEvaluation()).fit(module, digits(tasks, **options))
    return module


def go_on(module, data, *callbacks, **options):
    evaluation = scl.ContinualEvaluation()
    trainer(scl.RandomState(), evaluation, *callbacks, **options).fit(module, data)
    return evaluation.matrices["task_il"].R


def saved_and_loaded(module, folder):
    torch.manual_seed(0)
    fitted = esacl()
    t = trainer(scl.RandomState(), scl.ContinualEvaluation())
    t.fit(fitted, digits(FIRST))
    t.save_checkpoint(folder / "end.ckpt")
    again = esacl()
    again.go_on_from(folder / "end.ckpt")
    return again


WAYS = {
    "the module itself": lambda module, folder: module,
    "a module that has answered": lambda module, folder: module.eval(),
    "a copy": lambda module, folder: copy.deepcopy(module),
    "a pickle": lambda module, folder: pickle.loads(pickle.dumps(module)),
    "a checkpoint": saved_and_loaded,
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_a_trained_module_goes_on_with_the_same_bits(way, tmp_path):
    module = learnt()
    rows = module.head.weight[:4].clone()
    further = WAYS[way](module, tmp_path)
    R = go_on(further, data := digits(LATER))
    assert data.names_of_tasks() == [["0", "1"], ["2", "3"], ["4", "5"], ["6", "7"]]
    assert R.isnan().tolist() == [[False] * 2 + [True] * 2] * 2 + [[False] * 4] * 2
    expected = learnt()
    assert torch.equal(rows, expected.head.weight[:4]), "it has learnt the same before"
    go_on(expected, digits(LATER))
    assert all(torch.equal(a, b) for a, b in zip(further.parameters(), expected.parameters(), strict=True))
    assert torch.equal(further.objective.memory.labels, expected.objective.memory.labels)
    assert further.objective.memory.logits.shape == (60, 8) and not further.objective.memory.logits.isnan().any()


def test_subnetworks_that_have_answered_go_on_with_the_same_bits():
    found = []
    for answers in (False, True):
        torch.manual_seed(0)
        inference = scl.TaskSubnetworks(full="share", inference=scl.LowestEntropy())
        module = learnt(scl.WSN(scl.SmallCNN(4), 0.3, inference))
        if answers:
            module.eval()(torch.zeros(2, 1, 8, 8))
        go_on(module, digits(LATER))
        found.append([*module.parameters(), *module.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_head_grows_and_rows_of_old_classes_stay_bit_for_bit():
    module = learnt()
    before = {name: value.clone() for name, value in module.state_dict().items() if torch.is_tensor(value)}

    class Look(scl.TaskCallback):
        def on_train_start(self, trainer, pl_module):
            now = pl_module.state_dict()
            assert pl_module.head.weight.shape[0] == 8
            for name, value in before.items():
                assert torch.equal(now[name][tuple(slice(n) for n in value.shape)], value), name
            memory = pl_module.objective.memory
            x = trainer.datamodule.prepare(memory.inputs[: len(memory)], augment=False)
            pl_module.eval()
            expected = pl_module.network(x)
            pl_module.train()
            assert torch.allclose(memory.logits[: len(memory), 4:], expected[:, 4:], atol=1e-5)
            looked.append(True)

    looked = []
    go_on(module, digits(LATER), Look())
    assert looked


def test_old_and_new_tasks_together_are_all_measured_and_only_the_new_are_learnt():
    module = learnt()
    epochs = []

    class Count(scl.TaskCallback):
        def on_train_epoch_start(self, trainer, pl_module):
            epochs.append(trainer.datamodule.task)

    R = go_on(module, digits(FIRST + LATER), Count())
    assert epochs == [2, 2, 3, 3]
    assert not R[3].isnan().any()


def test_further_domains_and_classes_that_come_again():
    torch.manual_seed(0)
    module = learnt()
    R = go_on(module, digits([[0, 5]]))  # 0 again, and a new one
    assert R.shape == (3, 3) and module.head.out_features == 5
    permuted = scl.ContinualModule(scl.SmallCNN(4), scl.ER(60, 16))
    trainer().fit(permuted, scl.PermutedDigits(2, batch_size=64))
    R = go_on(permuted, scl.PermutedDigits(3, batch_size=64))
    assert R.shape == (3, 3) and permuted.head.out_features == 10 and not R[2].isnan().any()


def test_the_same_trainer_goes_on_and_its_clock_too():
    module, evaluation, flops = esacl(), scl.ContinualEvaluation(), scl.FlopsCounter()
    t = trainer(scl.RandomState(), evaluation, flops)
    t.fit(module, digits(FIRST))
    steps, served = t.global_step, flops.counts["samples"]
    t.fit(module, digits(LATER))
    assert t.global_step > steps and flops.counts["samples"] > served
    assert t.datamodule.starts == [0, 2, 4, 6, 8] and evaluation.matrices["class_il"].R.shape == (4, 4)


def test_tasks_that_are_all_known_are_a_new_sequence():
    module = learnt()
    R = go_on(module, digits(FIRST))
    assert R.shape == (2, 2) and not R.isnan().any() and module.head.out_features == 4


def test_normalisation_stays_that_of_the_first_images():
    images, labels = scl.DigitsSource().read(True)
    few = [(images[labels == c], labels[labels == c]) for c in range(4)]
    old, new = ((torch.cat([few[a][i] for a in pair]) for i in (0, 1)) for pair in ((0, 1), (2, 3)))
    old, new = tuple(old), tuple(new)
    first, later = (scl.SplitTensors(part, part, num_tasks=1, batch_size=32) for part in (old, (new[0] // 2, new[1])))
    module = scl.ContinualModule(scl.SmallCNN(4))
    trainer().fit(module, first)
    trainer().fit(module, later)
    assert later.transform.normalisation() == first.transform.normalisation()


@pytest.mark.parametrize(
    "further, error",
    [
        (lambda: scl.SplitDigits(tasks=LATER, joint=True), "joint training learns all tasks at once"),
        (lambda: digits(LATER), "each of 2 tasks was to have an equal share"),
    ],
)
def test_what_needs_the_number_of_tasks_is_refused_at_once(further, error):
    module = learnt(scl.EsaCL(scl.SmallCNN(4), freeze="share", selection=scl.LossSelection(1, 1)))
    with pytest.raises(ValueError, match=error):
        go_on(module, further())


def test_a_module_whose_sequence_is_not_known_refuses_further_classes():
    module = learnt()
    module.remember_sequence(None)
    with pytest.raises(ValueError, match="EsaCL: it knows 4 classes, and the data have 8"):
        go_on(module, digits(FIRST + LATER))


def test_a_memory_too_small_for_the_further_classes_is_refused():
    module = learnt(scl.ContinualModule(scl.SmallCNN(4), scl.ICaRL(6, 4)))
    with pytest.raises(ValueError, match=r"ICaRL\(memory=6\): at least one exemplar per class, and there are 8"):
        go_on(module, digits(LATER))


@pytest.mark.parametrize("same_trainer", [True, False])
def test_checkpoints_of_the_first_run_are_left_alone(tmp_path, same_trainer):
    def saving():
        return scl.SequenceCheckpoint(tmp_path, monitor="task_il/acc", mode="max", every_n_epochs=1, save_last=True)

    def made():
        return trainer(scl.RandomState(), scl.ContinualEvaluation(), saving(), enable_checkpointing=True)

    module, t = esacl(), made()
    t.fit(module, digits(FIRST))
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.ckpt")}
    further = t if same_trainer else made()
    further.fit(module, digits(LATER))
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    kept = further.checkpoint_callback
    assert kept.best_model_path not in map(str, (tmp_path / name for name in before))
    assert torch.load(kept.best_model_path)["state_dict"]["head.weight"].shape[0] == 8
    assert torch.load(tmp_path / "last-v1.ckpt")["run"] != torch.load(tmp_path / "last.ckpt")["run"]


def test_validation_data_of_tasks_that_were_learnt_stay_set_aside():
    module = learnt(val_fraction=0.25)
    data = digits(FIRST + LATER, val_fraction=0.25)
    go_on(module, data)
    once = digits(FIRST + LATER, val_fraction=0.25)
    once.setup("fit")
    t = trainer(scl.ContinualEvaluation())
    t.validate(module, data, verbose=False)
    counts = [len(loader.sampler) for loader in t.validate_loop._combined_loader.flattened]
    assert counts == [len(held_out) for held_out in once._held_out] and min(counts) > 0


@pytest.mark.parametrize("already", [False, True])
def test_a_fit_that_is_stopped_inside_a_task_mixes_no_classes(already):
    class Stop(scl.TaskCallback):
        def on_train_batch_end(self, trainer, *_):
            raise RuntimeError("no memory left")

    module = learnt() if already else esacl()
    with pytest.raises(RuntimeError, match="no memory left"):
        go_on(module, digits(LATER if already else FIRST), Stop())
    known = 8 if already else 4
    with pytest.raises(ValueError, match=f"it knows {known} classes, and the data have {known + 2}"):
        go_on(module, digits([[8, 9]]))
    R = go_on(module, data := digits(FIRST))  # a new sequence of classes that it knows, under their labels
    assert R.shape == (2, 2) and data.classes == [[0, 1], [2, 3]]


def test_an_open_sequence_is_one_run_with_one_last_checkpoint(tmp_path):
    def pairs():
        for task in (*FIRST, [4]):
            data = digits([task])
            data.setup()
            yield data.train_sets[0], data.test_sets[0]

    def named(pair):
        return tuple([(image, f"class {label}") for image, label in data] for data in pair)

    saving = scl.SequenceCheckpoint(tmp_path, save_last=True)
    t = trainer(scl.RandomState(), saving, enable_checkpointing=True)
    torch.manual_seed(0)
    scl.learn(t, module := esacl(), data := scl.TaskStream(map(named, pairs()), batch_size=32))
    assert [path.name for path in tmp_path.glob("last*")] == ["last.ckpt"]
    assert data.num_tasks == 3
    assert torch.load(tmp_path / "last.ckpt")["state_dict"]["head.weight"].shape == module.head.weight.shape


def test_what_is_tested_is_known_by_its_images_first():
    module = scl.ContinualDST(scl.SmallCNN(4))
    data = scl.PermutedDigits(3, batch_size=64)
    R = go_on(module, data)
    for task in range(3):
        one = scl.TaskDatasets([data.train_sets[task]], [data.test_sets[task]], transform=data.transform, batch_size=64)
        t = trainer(scl.ContinualEvaluation())
        t.test(module, one, verbose=False)
        assert t.callback_metrics[f"task_il/task_{task}"].item() == pytest.approx(R[2, task].item())
    other = scl.RotatedDigits(2, batch_size=64)
    with pytest.raises(ValueError, match="tasks 1, 2 of the sequence all have the classes"):
        trainer(scl.ContinualEvaluation()).test(module, other, verbose=False)


def test_another_objective_cannot_go_on(tmp_path):
    module = learnt(scl.ContinualModule(scl.SmallCNN(4), scl.DERpp(60)))
    module.objective.__class__ = scl.DERppOneDraw
    with pytest.raises(ValueError, match="was learnt with DERpp, and cannot go on with DERppOneDraw"):
        go_on(module, digits(LATER))


def test_data_are_normalised_for_the_module_that_learns_them():
    old, new = (scl.SplitDigits(tasks=t) for t in (FIRST, LATER))
    for data in (old, new):
        data.setup()

    def sets(data, factor):
        return [[scl.SampleTensors(d.inputs // factor, d.labels) for d in s] for s in (data.train_sets, data.test_sets)]

    first, later = (scl.TaskDatasets(*sets(data, k), batch_size=32) for data, k in ((old, 1), (new, 2)))
    trainer().fit(esacl(), later)
    own = later.transform.normalisation()
    module = esacl()
    trainer().fit(module, first)
    trainer().fit(module, later)
    assert later.transform.normalisation() == first.transform.normalisation() != own
    trainer().fit(esacl(), later)
    assert later.transform.normalisation() == own


def test_a_further_task_without_images_is_refused():
    new = digits([[8, 9]])
    new.setup()
    image, label = new.train_sets[0][0]
    empty = scl.SampleTensors(image[None][:0], label[None][:0])
    labelled = scl.SampleTensors(new.test_sets[0].inputs, new.test_sets[0].labels + 8)

    class Own(scl.TaskDataModule):
        def load(self):
            return [empty], [labelled]

    with pytest.raises(ValueError, match="Own: task 0 has no training samples"):
        go_on(learnt(), Own())
