"""Pairs joined into groups: what is a copy of a copy is in the group too."""

from __future__ import annotations

from collections.abc import Iterable


def groups_of(count: int, pairs: Iterable[tuple[int, int]]) -> list[list[int]]:
    """The groups of two or more of the numbers below `count`, each in ascending order."""
    parent = list(range(count))

    def root(number: int) -> int:
        while parent[number] != number:
            parent[number] = parent[parent[number]]
            number = parent[number]
        return number

    for left, right in pairs:
        first, last = sorted((root(left), root(right)))
        parent[last] = first
    found: dict[int, list[int]] = {}
    for number in range(count):
        found.setdefault(root(number), []).append(number)
    return [group for group in found.values() if len(group) > 1]
