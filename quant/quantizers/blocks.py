"""The transformer blocks of a network, to be run one after another."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor, nn

BlockCall = Callable[[nn.Module, Tensor], Tensor]
"""Runs a block on its input, with its other arguments (mask and positions), which are the same for all images."""


def blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Returns the transformer blocks of a network with their names, in order."""
    named = {name: module for name, module in model.named_modules() if re.search(r"(^|\.)blocks\.\d+$", name)}
    first = next(iter(named), "").rpartition(".")[0]  # excludes the blocks of a decoder, which come later
    return [(name, module) for name, module in named.items() if name.rpartition(".")[0] == first]


class _ReachedError(Exception):
    """The first block was reached."""


@torch.no_grad()
def block_inputs(model: nn.Module, batches: Sequence[Tensor]) -> tuple[list[Tensor], list[BlockCall]]:
    """Returns the first block's inputs for each batch, (images, N, width), and how each block is called."""
    calls: list[BlockCall] = []
    first: list[Tensor] = []

    def note(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        calls.append(lambda block, inputs: block(inputs, *arguments[1:], **keywords))

    def note_first(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        first.append(arguments[0])
        raise _ReachedError

    found = [block for _, block in blocks(model)]
    with ExitStack() as hooks:
        for block in found:
            hooks.enter_context(block.register_forward_pre_hook(note, with_kwargs=True))
        model(batches[0][:1])
    with found[0].register_forward_pre_hook(note_first):
        for images in batches:
            with suppress(_ReachedError):
                model(images)
    return first, calls
