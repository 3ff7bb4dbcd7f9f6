"""Context managers that hide messages of libraries, and restore loggers and warning filters at the end."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

# Messages that every normal run gives: logger -> part of its message, and regular expressions of warnings.
_LOGS = {
    "torch.utils.cpp_extension": "No CUDA runtime is found",
    "torch.utils._pytree": "Calling register_constant() on Enum subclasses is deprecated",  # by torchao
}
_WARNINGS = (
    "Cannot find transformers package",  # by nvidia-modelopt, on import
    "transformers .* is not tested with current version of modelopt",  # likewise; it is not used
    r"`torch\.jit\.script` is deprecated",  # by nvidia-modelopt, on import
)


@contextmanager
def without_noise() -> Iterator[None]:
    """Hides the messages that PyTorch, torchao and nvidia-modelopt give on every normal run, and no others."""

    def drop(text: str, record: logging.LogRecord) -> bool:
        return text not in record.getMessage()

    filters = {name: partial(drop, text) for name, text in _LOGS.items()}
    for name, each in filters.items():
        logging.getLogger(name).addFilter(each)
    try:
        with warnings.catch_warnings():
            for message in _WARNINGS:
                warnings.filterwarnings("ignore", message)
            yield
    finally:
        for name, each in filters.items():
            logging.getLogger(name).removeFilter(each)


@contextmanager
def quiet(*loggers: str) -> Iterator[None]:
    """Hides all warnings, and the given loggers' records below ERROR."""
    levels = {name: logging.getLogger(name).level for name in loggers}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name in loggers:
                logging.getLogger(name).setLevel(logging.ERROR)
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
