"""Schedules as pure functions of the step, so that a resumed run needs no state."""

from __future__ import annotations

import math
from typing import Literal

SoftMaskSchedule = Literal["none", "constant", "linear"]


def soft_mask_alpha(schedule: SoftMaskSchedule, step: int, cutoff_step: int) -> float:
    """Returns the soft mask's alpha at a training step (arXiv 2404.06773, section 3.6).

    Until ``cutoff_step`` it is 1 for ``constant``, and falls linearly from 1 to 0 for ``linear``. From there on, and
    always for ``none``, it is 0.
    """
    if schedule == "none" or step >= cutoff_step:
        return 0.0
    return 1.0 if schedule == "constant" else 1.0 - step / cutoff_step


def cosine_with_warmup(step: int, total_steps: int, warmup_steps: int, peak: float, floor: float = 1e-6) -> float:
    """Returns the learning rate at a step. It rises linearly to ``peak``, then falls to ``floor`` by half a cosine."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return floor + 0.5 * (peak - floor) * (1 + math.cos(math.pi * min(1.0, progress)))
