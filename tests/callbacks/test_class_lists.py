"""Lists of classes fit where they are shown, and say as much as fits."""

import io

import pytest
from PIL import Image
from rich.console import Console

from lightning_sparse_cl.callbacks.class_lists import class_lines, class_lists
from lightning_sparse_cl.callbacks.picture import draw_matrices
from lightning_sparse_cl.callbacks.tables import print_tested

LONG = "a very long name of a class that has no room beside any other one in a line of eighty columns"


def lines_of(classes, width=80, tasks=None):
    return class_lines(class_lists(classes, tasks), width, len)


def test_few_tasks_have_a_line_each():
    classes = [["cat", "dog"], [str(i) for i in range(100)], [LONG, "x"], ["two\nlines"]]
    first, second, third, fourth = lines_of(classes)
    assert first == "1: cat, dog" and fourth == "4: two lines"
    assert second.startswith("2: 0, 1, 2, ") and second.endswith(", ...") and 74 < len(second) <= 80
    assert third.startswith("3: a very long") and third.endswith("...") and len(third) == 80
    assert lines_of(classes, tasks=[3]) == ["4: two lines"]


def test_tasks_of_the_same_classes_are_one_line():
    assert lines_of([["a", "b"]] * 5) == ["every task: a, b"]
    assert lines_of([["a", "b"]]) == ["1: a, b"]


@pytest.mark.parametrize("tasks", [11, 100, 1000])
def test_many_tasks_share_lines(tasks):
    lines = lines_of([[f"class {3 * t + i}" for i in range(3)] for t in range(tasks)])
    assert max(map(len, lines)) <= 80 and len(lines) <= 50
    entries = "; ".join(lines).split("; ")
    assert len(entries) == min(tasks, 100) and entries[0].endswith(": class 0, class 1, ...")


def test_names_of_any_script_stay_in_80_columns():
    console = Console(width=80, file=io.StringIO())
    figures = {f"{s}/{f}": 1.0 for s in ("class_il", "task_il") for f in ("acc", "task_0")}
    print_tested(figures, console, classes=[["犬" * 30, "猫" * 30, "[bold]"]])
    (line,) = (line for line in console.file.getvalue().splitlines() if "犬" in line)
    assert line == f"1: {'犬' * 30}, ..."


@pytest.mark.parametrize("tasks", [1, 5, 20, 21])
def test_a_picture_has_room_for_the_classes_of_few_tasks(tasks, tmp_path):
    R = {"Class-IL": [[0.5] * tasks] * tasks}
    draw_matrices(R, tmp_path / "without.png")
    draw_matrices(R, tmp_path / "with.png", [[f"name {t}", LONG] for t in range(tasks)])
    without, named = (Image.open(tmp_path / f"{name}.png") for name in ("without", "with"))
    assert named.width == without.width and (named.height > without.height) == (tasks <= 20)
    below = named.crop((0, without.height - 15, named.width, named.height))
    assert (below.getextrema()[0][0] == 255) == (tasks > 20)  # something is written there
