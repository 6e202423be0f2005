"""Tasks of any sizes: which class is where, what repeated classes share, and what is refused."""

import itertools

import fake_data
import pytest
import torch
import yaml
from toy_trainer import trainer

import lightning_sparse_cl as scl
from lightning_sparse_cl.__main__ import main


def ready(data):
    data.prepare_data()
    data.setup()
    return data


def rows(images):
    return sorted(image.numpy().tobytes() for image in images)


def test_equal_tasks_are_the_same_bits_however_they_are_said():
    order = scl.SplitDigits(class_order=3).class_order
    pairs = [order[i : i + 2] for i in range(0, 10, 2)]
    splits = [
        ready(scl.SplitDigits(**kwargs))
        for kwargs in (
            {"class_order": 3},
            {"num_tasks": 5, "class_order": order},
            {"base": 2, "increment": 2, "class_order": 3},
            {"sizes": [2] * 5, "class_order": 3},
            {"tasks": pairs},
            {"tasks": [[str(c) for c in pair] for pair in pairs]},
        )
    ]
    for split in splits:
        assert split.fingerprints == splits[0].fingerprints and split.class_names == [str(c) for c in order]
        assert split.class_order == order and split.num_tasks == 5
        for train, sets in {True: split.train_sets, False: split.test_sets}.items():
            images, labels = scl.DigitsSource().read(train)
            labels = torch.tensor(order).argsort()[labels]
            for t, task in enumerate(sets):
                assert torch.equal(task.inputs, images[labels // 2 == t])
                assert torch.equal(task.labels, labels[labels // 2 == t])


@pytest.mark.parametrize(
    ("way", "sizes"),
    [
        ({"base": 4, "increment": 2}, [4, 2, 2, 2]),
        ({"base": 1, "increment": 9}, [1, 9]),
        ({"sizes": [1, 5, 4]}, [1, 5, 4]),
        ({"sizes": [1] * 10}, [1] * 10),
        ({"sizes": (10,)}, [10]),
        ({"num_tasks": 10}, [1] * 10),
    ],
    ids=str,
)
def test_sizes_follow_the_class_order(way, sizes):
    split = ready(scl.SplitDigits(class_order=1, val_fraction=0.2, **way))
    assert [len(classes) for classes in split.classes] == sizes
    assert list(itertools.chain(*split.classes)) == list(range(10))
    images, labels = scl.DigitsSource().read(train=True)
    for task, classes in zip(split.train_sets, split.classes, strict=True):
        for c in classes:
            assert rows(task.inputs[task.labels == c]) == rows(images[labels == split.class_order[c]])
            assert split.class_names[c] == str(split.class_order[c])


def test_repeated_classes_share_their_training_samples_and_have_all_their_test_samples():
    with pytest.warns(UserWarning, match="SplitDigits: 6 of 10 classes are in no task and left out: '1', '2', '4'"):
        split = ready(scl.SplitDigits(tasks=[[9, 3], ["7", 9], [0, 3, 9]]))
    assert split.class_names == ["9", "3", "7", "0"] and split.num_classes == 4
    assert split.classes == [[0, 1], [0, 2], [0, 1, 3]]
    for train, sets in {True: split.train_sets, False: split.test_sets}.items():
        images, labels = scl.DigitsSource().read(train)
        for c, name in enumerate(split.class_names):
            parts = [d.inputs[d.labels == c] for d in sets if (d.labels == c).any()]
            all_ = images[labels == int(name)]
            assert len(parts) == {"9": 3, "3": 2}.get(name, 1)
            if train:
                assert rows(torch.cat(parts)) == rows(all_) and torch.equal(parts[0], all_[:: len(parts)])
                assert max(map(len, parts)) - min(map(len, parts)) <= 1
            else:
                assert all(torch.equal(part, all_) for part in parts)
    joint = ready(scl.SplitDigits(tasks=[[9, 3], ["7", 9], [0, 3, 9]], joint=True))
    assert rows(joint.train_sets[0].inputs) == rows(torch.cat([d.inputs for d in split.train_sets]))
    assert (joint.num_tasks, len(joint.test_sets), joint.num_classes) == (1, 3, 4)


def test_numbers_are_names_where_names_are_numbers_and_else_labels(tmp_path):
    fake_data.write_image_folder(tmp_path / "words", classes=3)
    split = ready(scl.SplitImageFolder(str(tmp_path / "words"), tasks=[["class_2", 0], [1]]))
    assert split.class_names == ["class_2", "class_0", "class_1"]
    images, ids = torch.randint(256, (40, 1, 4, 4), dtype=torch.uint8), torch.arange(40) % 4 + 7
    split = ready(scl.SplitTensors((images, ids), (images, ids), tasks=[[10, 7], [8, 9]], batch_size=8))
    assert split.class_names == ["10", "7", "8", "9"]
    assert torch.equal(split.train_sets[0].inputs, images[(ids == 10) | (ids == 7)])


def test_superclasses_stay_and_other_sizes_work_beside_them(tmp_path, monkeypatch):
    fake_data.write_cifar100(tmp_path, monkeypatch)
    assert len(ready(scl.SplitCIFAR100(20, str(tmp_path), superclasses=True)).classes) == 20
    split = ready(scl.SplitCIFAR100(root=str(tmp_path), base=50, increment=10))
    assert [len(c) for c in split.classes] == [50, 10, 10, 10, 10, 10]
    with pytest.raises(ValueError, match=r"superclasses=True, base=50, increment=10\): superclasses make 20 tasks"):
        scl.SplitCIFAR100(superclasses=True, base=50, increment=10)


FEW = torch.zeros(7, 1, 4, 4, dtype=torch.uint8), torch.tensor([0, 1, 0, 0, 0, 0, 0])


@pytest.mark.parametrize(
    ("way", "message"),
    [
        ({"num_tasks": 4}, "10 classes divide into 1, 2, 5 or 10 tasks; unequal ones are given by sizes"),
        (
            {"num_tasks": 5, "sizes": [5, 5]},
            r"\(num_tasks=5, sizes=\[5, 5\]\): tasks are given by one of num_tasks, base",
        ),
        ({"sizes": [5, 5], "tasks": [[1]]}, r"\(sizes=\[5, 5\], tasks=\[\[1\]\]\): tasks are given by one of"),
        ({"base": 4}, r"\(base=4\): base and increment go together"),
        ({"base": 4, "increment": 4}, r"base=4, increment=4\): the 6 classes after .* increments of 1, 2, 3 or 6$"),
        ({"base": 10, "increment": 1}, r"base=10\): of 10 classes the first task has at least 1 and leaves at least 1"),
        ({"sizes": [5, 4]}, r"sizes=\[5, 4\]\): .* number of classes, at least 1 and 10 in all, not 9$"),
        ({"sizes": [0, 10]}, r"sizes=\[0, 10\]\): .* at least 1 and 10 in all$"),
        ({"sizes": []}, r"sizes=\[\]\): .* at least 1 and 10 in all"),
        ({"tasks": []}, r"tasks=\[\]\): a list of tasks, each a list of classes"),
        ({"tasks": [["1"], []]}, r"tasks\[1\]=\[\]\): a task is a list of at least one class"),
        ({"tasks": ["1", "2"]}, r"tasks\[0\]='1'\): a task is a list"),
        ({"tasks": [["1"], ["cat"]]}, r"tasks\[1\]=\['cat'\]\): no class is called 'cat'; give a name: '0', '1'"),
        ({"tasks": [[10]]}, r"tasks\[0\]=\[10\]\): no class is called 10; give a name: '0'"),
        ({"tasks": [[True]]}, r"no class is called True"),
        ({"tasks": [[3, "3"]]}, r"tasks\[0\]=\[3, '3'\]\): class '3' is in the task twice"),
        ({"tasks": [[3], [4]], "class_order": 1}, r"class_order=1\): tasks have an order of their own"),
    ],
    ids=str,
)
def test_what_is_wrong_is_named_in_one_line(way, message):
    with pytest.raises(ValueError, match=message) as error:
        ready(scl.SplitDigits(**way))
    assert str(error.value).startswith("SplitDigits(") and "\n" not in str(error.value)


def test_tasks_must_be_given_where_there_is_no_usual_number_and_shares_must_not_be_empty():
    with pytest.raises(ValueError, match=r"^SplitTensors\(\): tasks are given by one of num_tasks"):
        scl.SplitTensors(FEW, FEW)
    with pytest.raises(ValueError, match=r"^SplitTensors\(tasks=...\): class '1' has 1 training samples for 2 tasks"):
        ready(scl.SplitTensors(FEW, FEW, tasks=[[0, 1], [1]]))


@pytest.mark.parametrize(
    ("written", "sizes"),
    [
        ({"num_tasks": None, "sizes": [4, 2, 2, 2]}, [4, 2, 2, 2]),
        ({"num_tasks": None, "base": 6, "increment": 4}, [6, 4]),
        ({"num_tasks": None, "tasks": [[9, "3"], [0]]}, [2, 1]),
    ],
    ids=str,
)
@pytest.mark.parametrize("file", [True, False], ids=["YAML", "command line"])
def test_configurations_and_the_command_line_take_them(written, sizes, file, tmp_path):
    where = tmp_path / "data.yaml"
    where.write_text(yaml.safe_dump({"data": {"class_path": "SplitDigits", "init_args": written}}))
    args = [f"--data.init_args.{key}={yaml.safe_dump(value, default_flow_style=True).split(chr(10))[0]}"
            for key, value in written.items()]  # fmt: skip
    cli = main(
        ["fit", "-c", "split_digits/er", *(["-c", str(where)] if file else args), "--schedule.epochs=1",
         "--trainer.limit_train_batches=1", f"--trainer.default_root_dir={tmp_path}", "--trainer.logger=false"]
    )  # fmt: skip
    assert [len(classes) for classes in cli.datamodule.classes] == sizes
    assert cli.model.head.out_features == sum(sizes)


@pytest.mark.parametrize(
    "make",
    [
        lambda: scl.ContinualModule(scl.SmallCNN(8), scl.ER(100, 16)),
        lambda: scl.ContinualModule(scl.SmallCNN(8), scl.DERpp(100, 16)),
        lambda: scl.EsaCL(scl.SmallCNN(8), scl.DERpp(100, 16), sparsity=0.5),
        lambda: scl.SparCL(
            scl.SmallCNN(8), scl.DERpp(100, 16), scl.TaskAwareDynamicMasking(0.5, 1), scl.DynamicDataRemoval(0.3, 1, 1)
        ),
    ],
    ids=["ER", "DER++", "EsaCL", "SparCL"],
)
def test_one_class_per_task(make):
    torch.manual_seed(0)
    evaluation = scl.ContinualEvaluation()
    trainer(evaluation, epochs=4).fit(make(), scl.SplitDigits(sizes=[1] * 10, batch_size=16))
    R = evaluation.matrices["task_il"].R
    assert (R.tril()[torch.ones(10, 10).tril().bool()] == 1).all()  # there is one answer
    assert evaluation.matrices["class_il"].R[-1].mean() > 0.2  # twice what guessing gives
