"""A name -> member table whose errors list what is known."""

from collections.abc import Iterator
from typing import Generic, TypeVar

from .errors import LDMQError

T = TypeVar("T")


class Registry(Generic[T]):
    """Members of one extension point, by name.

    A second, different member under one name and an unknown name are both errors; names come back sorted.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._members: dict[str, T] = {}

    def add(self, name: str, member: T) -> T:
        """Add `member`. Raises LDMQError (registry unchanged) if `name` is taken by something else."""
        if self._members.get(name, member) is not member:
            raise LDMQError(f"{self.kind} {name!r} is already registered; choose another name")
        self._members[name] = member
        return member

    def __getitem__(self, name: str) -> T:
        if name not in self._members:
            raise LDMQError(f"unknown {self.kind} {name!r}; known: {', '.join(self)}")
        return self._members[name]

    def __contains__(self, name: object) -> bool:
        return name in self._members

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._members))

    def items(self) -> list[tuple[str, T]]:
        """(name, member) pairs in sorted order."""
        return [(name, self._members[name]) for name in self]
