"""Hooks for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn


@contextmanager
def input_hooks(model: nn.Module, hooks: Mapping[str, Callable[[nn.Module, Any], None]]) -> Iterator[None]:
    """Inside the block, calls each hook with the module named and its inputs, before the module runs."""
    with ExitStack() as stack:
        for name, hook in hooks.items():
            stack.enter_context(model.get_submodule(name).register_forward_pre_hook(hook))
        yield
