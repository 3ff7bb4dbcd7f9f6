"""A bounded store of values that are costly to make, and to keep."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")


class LeastRecentlyUsed(Generic[Key, Value]):
    """Makes a value for each key, and keeps those that were used last.

    Args:
        capacity: total size of the values that are kept; a larger value is kept alone.
        make: returns the value of a key.
        close: frees a value. It is called before the next value is made, so that at most ``capacity`` exist.
        size: returns the size of a key's value; each counts as one if not given.

    Raises:
        ValueError: ``capacity`` is below 1.
    """

    def __init__(
        self,
        capacity: float,
        make: Callable[[Key], Value],
        close: Callable[[Value], None],
        size: Callable[[Key], int] = lambda key: 1,
    ) -> None:
        if capacity < 1:
            raise ValueError(f"the capacity must be at least 1, not {capacity}")
        self.capacity, self._make, self._close, self._size = capacity, make, close, size
        self._values: OrderedDict[Key, Value] = OrderedDict()  # the least recently used first

    def __getitem__(self, key: Key) -> Value:
        """Returns the value of a key, and makes it if it is not kept."""
        if key not in self._values:
            room = self.capacity - self._size(key)
            while self._values and sum(map(self._size, self._values)) > room:
                self._close(self._values.popitem(last=False)[1])
            self._values[key] = self._make(key)
        self._values.move_to_end(key)
        return self._values[key]

    def discard(self, key: Key) -> None:
        """Frees the value of a key, if it is kept."""
        if key in self._values:
            self._close(self._values.pop(key))
