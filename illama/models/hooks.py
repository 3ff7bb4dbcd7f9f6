"""Hooks for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn


@contextmanager
def input_hooks(model: nn.Module, names: Iterable[str], hook: Callable[[str, Any], None]) -> Iterator[None]:
    """Inside the block, calls ``hook`` with the name of each module named and its inputs, before the module runs."""
    with ExitStack() as hooks:
        for name in names:
            module = model.get_submodule(name)
            hooks.enter_context(module.register_forward_pre_hook(lambda _, inputs, name=name: hook(name, inputs)))
        yield
