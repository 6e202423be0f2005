"""Which classes each task has, in a few lines of a given width."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from lightning_sparse_cl.callbacks.blocks import blocks, labels

MOST_LINES, MOST_ENTRIES, FEW = 10, 100, 2
"""The most tasks that get a line each; for more tasks, the most entries, and names per entry."""


def class_lists(classes: Sequence[Sequence[str]], tasks: Iterable[int] | None = None) -> dict[str, list[str]]:
    """The names of each task's classes, by the task's number in tables, counted from 1.

    With more than 100 tasks, neighbouring ones share an entry, "1-2".

    Args:
        classes: names of each task's classes.
        tasks: the tasks to list, counted from 0. If None, all.
    """
    listed = list(range(len(classes)) if tasks is None else tasks)
    if len(listed) < len(classes):
        return {str(task + 1): list(classes[task]) for task in listed}
    found = zip(labels(len(classes), MOST_ENTRIES), blocks(len(classes), MOST_ENTRIES), strict=True)
    return {label: list(dict.fromkeys(name for task in block for name in classes[task])) for label, block in found}


def class_lines(lists: Mapping[str, Sequence[str]], width: float, measure: Callable[[str], float]) -> list[str]:
    """Lines "1: cat, dog" of at most ``width``; names without room become "...".

    If all tasks have the same classes, they get one line; more than ten tasks share lines, with two names each.

    Args:
        lists: what :func:`class_lists` has returned.
        width: largest width of a line.
        measure: function that gives the width of a text.
    """
    named = {label: [" ".join(name.split()) for name in names] for label, names in lists.items()}
    first, *others = named.values()
    if others and all(set(names) == set(first) for names in others):
        return [_fitted("every task: ", first, len(first), width, measure)]
    if len(named) <= MOST_LINES:
        return [_fitted(f"{label}: ", names, len(names), width, measure) for label, names in named.items()]
    lines = [""]
    for entry in (_fitted(f"{label}: ", names, FEW, width, measure) for label, names in named.items()):
        joined = f"{lines[-1]}; {entry}" if lines[-1] else entry
        if measure(joined) <= width:
            lines[-1] = joined
        else:
            lines.append(entry)
    return lines


def _fitted(start: str, names: Sequence[str], most: int, width: float, measure: Callable[[str], float]) -> str:
    for shown in range(min(most, len(names)), 0, -1):
        text = start + ", ".join(names[:shown]) + ", ..." * (shown < len(names))
        if measure(text) <= width:
            return text
    text = start + names[0]
    while measure(f"{text}...") > width and len(text) > len(start):
        text = text[:-1]
    return f"{text}..."
