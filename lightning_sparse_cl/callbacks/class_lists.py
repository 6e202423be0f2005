"""Which classes each task has, in few lines of a given width."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from lightning_sparse_cl.callbacks.blocks import blocks, labels

MOST_LINES, MOST_ENTRIES, FEW = 10, 100, 2
"""Tasks with a line of their own each, entries where there are more tasks, and names in such an entry."""


def class_lists(classes: Sequence[Sequence[str]], tasks: Iterable[int] | None = None) -> dict[str, list[str]]:
    """The names of each task's classes by the task's number in tables, counted from 1.

    Above 100 tasks neighbouring ones are one entry, "1-2".

    Args:
        classes: names of each task's classes.
        tasks: those to list, counted from 0. If None, all.
    """
    listed = list(range(len(classes)) if tasks is None else tasks)
    if len(listed) < len(classes):
        return {str(task + 1): list(classes[task]) for task in listed}
    found = zip(labels(len(classes), MOST_ENTRIES), blocks(len(classes), MOST_ENTRIES), strict=True)
    return {label: list(dict.fromkeys(name for task in block for name in classes[task])) for label, block in found}


def class_lines(lists: Mapping[str, Sequence[str]], width: float, measure: Callable[[str], float]) -> list[str]:
    """Lines "1: cat, dog" of at most ``width``; names that have no room are "...".

    Tasks that all have the same classes are one line; more than ten tasks share lines, with two names each.

    Args:
        lists: of :func:`class_lists`.
        width: room for a line.
        measure: width of a text.
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
