"""Functions in the place of an object's methods, without keeping the object alive."""

import inspect
import weakref
from collections.abc import Callable
from typing import Any


class Bound:
    """`function` with `owner` as its first argument. The owner holds this and is held weakly in return: a cycle would
    keep its weights until the garbage collector runs. Copies and pickles of the owner get one of their own."""

    __slots__ = ("function", "owner")

    def __init__(self, function: Callable[..., Any], owner: Any) -> None:
        self.function, self.owner = function, weakref.ref(owner)

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the method: pipelines look into it for what they may pass on."""
        whole = inspect.signature(self.function)
        return whole.replace(parameters=list(whole.parameters.values())[1:])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the function gives."""
        return self.function(self.owner(), *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Bound":
        owner = self.owner()
        return Bound(self.function, memo.get(id(owner), owner))

    def __reduce__(self) -> tuple[Any, ...]:
        return Bound, (self.function, self.owner())
