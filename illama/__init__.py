"""iLLaMA: a causal vision transformer built from LLaMA's parts (arXiv 2404.06773)."""

from illama import timm_models as _timm_models  # registers illama_tiny and the other sizes with timm
from illama.config import ModelConfig
from illama.model import ILLaMA

__all__ = ["ILLaMA", "ModelConfig"]
del _timm_models
