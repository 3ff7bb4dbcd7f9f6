"""iLLaMA: a causal vision transformer built from LLaMA's parts (arXiv 2404.06773)."""

from illama.models import registry as _registry  # registers illama_tiny and the other sizes with timm
from illama.models.config import ModelConfig
from illama.models.illama import ILLaMA

__all__ = ["ILLaMA", "ModelConfig"]
del _registry
