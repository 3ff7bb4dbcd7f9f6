"""iLLaMA: a causal vision transformer built from LLaMA's parts (arXiv 2404.06773).

The names below are imported on first use (PEP 562), so that ``import illama`` does not wait for PyTorch.
``import illama.models`` registers the networks with timm.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from illama.models import ILLaMA, ModelConfig

__all__ = ["ILLaMA", "ModelConfig"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from illama import models

        return getattr(models, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
