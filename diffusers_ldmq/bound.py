"""Functions in the place of methods: of one object, or of those objects of a class that carry a flag."""

import functools
import weakref
from collections.abc import Callable
from typing import Any

FLAG = "_has_ways_of_its_own"


class Bound:
    """`function` with `owner` as its first argument, to stand in the owner's own attributes. The owner is held weakly:
    a cycle would keep its weights until the garbage collector runs. Copies and pickles of the owner get one of their
    own."""

    __slots__ = ("function", "owner")

    def __init__(self, function: Callable[..., Any], owner: Any) -> None:
        self.function, self.owner = function, weakref.ref(owner)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the function gives."""
        return self.function(self.owner(), *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Bound":
        owner = self.owner()
        return Bound(self.function, memo.get(id(owner), owner))

    def __reduce__(self) -> tuple[Any, ...]:
        return Bound, (self.function, self.owner())


def override(kind: Any, name: str, function: Callable[..., Any]) -> None:
    """Let objects of the class `kind` that carry FLAG do `function` where others do what the class does. Harmless when
    done again, and where the class has no such method."""
    usual = getattr(kind, name, None)
    if usual is None or hasattr(usual, "usual"):
        return

    @functools.wraps(usual)  # others look into a method's signature for what they may pass on
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return (function if FLAG in vars(self) else usual)(self, *args, **kwargs)

    vars(method)["usual"] = usual
    setattr(kind, name, method)


def usual(owner: Any, name: str) -> Callable[..., Any]:
    """What the owner's class does, for the owner."""
    found = getattr(type(owner), name)
    return functools.partial(getattr(found, "usual", found), owner)
