"""The networks. Importing this package registers illama_nano, illama_tiny, ... with timm."""

from illama.models import registry as _registry
from illama.models.config import ModelConfig
from illama.models.illama import ILLaMA

__all__ = ["ILLaMA", "ModelConfig"]
del _registry
