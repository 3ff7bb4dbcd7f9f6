"""The 15 corruptions of ImageNet-C at their 5 severities (Hendrycks and Dietterich, arXiv 1903.12261), at any size.

The implementation is the maintained fork of imagecorruptions, imagecorruptions-imaug: the original code, which works
with NumPy 2 and includes the frost pictures. The original package has not changed since 2020; albumentations and
torchvision have no set of corruptions with these strengths.

ImageNet-C's strengths are set for images of 224 pixels. Corruptions with an extent in pixels (blurs, weather, elastic
transforms) are applied at 224 pixels for images of any size, so that they cover the same share of the picture. All
corruptions of larger images are applied at 224 pixels too, as when ImageNet-C's files are enlarged. Corruptions of
single pixels (noise, brightness, contrast), by a share of the size (pixelate) or in blocks of 8 (JPEG) are applied at
the image's own size. At 28 pixels the result is neither ImageNet-C nor CIFAR-10-C, whose noise is weaker: use it to
compare models with each other, not with published tables.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset
from torchvision.transforms import v2

from eval.metrics.corruption_names import BLURS, CORRUPTIONS, SEVERITIES
from illama.data.datasets import Sample
from illama.data.preprocessing import Preprocessing, Transform
from illama.errors import UserError

REFERENCE_SIZE = 224
_EXTENT_IN_PIXELS = frozenset((*BLURS, "snow", "frost", "fog", "elastic_transform"))
_TAKES_SEED = frozenset(("impulse_noise", "glass_blur"))


class CorruptedImages(Dataset[Sample]):
    """A split whose images are resized and cropped to the network's size, and then corrupted.

    The corruption of an image depends only on the seed, the corruption, the severity and the image's index, not on the
    number of loader workers.

    Args:
        images: the split.
        preprocessing: resizes and crops the images; :func:`after_framing` is the rest of it.
        corruption: one of :data:`eval.metrics.corruption_names.CORRUPTIONS`.
        severity: 1 to 5.
        seed: random seed.

    Raises:
        UserError: there is no such corruption or severity, or the library is not installed.
    """

    def __init__(
        self, images: Dataset[Sample], preprocessing: Preprocessing, corruption: str, severity: int, seed: int = 0
    ) -> None:
        check_corruption(corruption, severity)
        self.images, self.corruption, self.severity, self.seed = images, corruption, severity, seed
        self._preprocessing = preprocessing

    def __len__(self) -> int:
        return len(self.images)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Sample:
        image, label = self.images[index]
        place = (self.seed, CORRUPTIONS.index(self.corruption), self.severity, index)
        seed = int(np.random.SeedSequence(place).generate_state(1)[0])
        return corrupt(self._preprocessing.frame(_as_pil(image)), self.corruption, self.severity, seed), label


def after_framing(preprocessing: Preprocessing) -> Transform:
    """Returns the transform for images that :class:`CorruptedImages` has resized and cropped."""
    return v2.Compose(preprocessing.tensor_steps())


def check_corruption(corruption: str, severity: int) -> None:
    """Raises UserError if there is no such corruption or severity, or the library is not installed."""
    if corruption not in CORRUPTIONS:
        raise UserError(f"unknown corruption {corruption!r}: choose from {', '.join(CORRUPTIONS)}")
    if severity not in SEVERITIES:
        raise UserError(f"--severities must be 1 to 5, not {severity}")
    _functions()


def corrupt(image: Image.Image, corruption: str, severity: int, seed: int) -> Image.Image:
    """Returns a square image, gray or RGB, corrupted, in its size and mode; restores NumPy's global generator."""
    size, mode = image.size, image.mode
    if corruption in _EXTENT_IN_PIXELS:
        image = image.convert("RGB")  # the library would blur single rows of a gray image
    if corruption in _EXTENT_IN_PIXELS or image.width > REFERENCE_SIZE:
        image = image.resize((REFERENCE_SIZE, REFERENCE_SIZE), Image.Resampling.BICUBIC)
    more = {"seed": seed} if corruption in _TAKES_SEED else {}
    with _seeded(seed):
        pixels = _functions()[corruption](image, severity, **more)
    result = Image.fromarray(np.uint8(pixels)).convert(mode)
    return result if result.size == size else result.resize(size, Image.Resampling.BICUBIC)


def _functions() -> dict[str, Any]:
    try:
        import imagecorruptions  # an optional extra, and numba is slow to import
    except ImportError as error:
        raise UserError(f"corruptions need the extra 'robustness' ({error}): pip install -e '.[robustness]'") from error
    return imagecorruptions.corruption_dict


def _as_pil(image: Any) -> Image.Image:
    image = image if isinstance(image, Image.Image) else v2.functional.to_pil_image(image)
    return image if image.mode == "L" else image.convert("RGB")


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(state)
