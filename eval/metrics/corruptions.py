"""The 15 corruptions of ImageNet-C at their 5 severities (Hendrycks and Dietterich, arXiv 1903.12261), at any size.

They are those of imagecorruptions, in the fork that is maintained (imagecorruptions-imaug): the original code, with
the frost pictures in the package, and working with NumPy 2. The original package has not changed since 2020;
albumentations and torchvision have no such set with these strengths.

ImageNet-C's strengths are set for images of 224 pixels. What has an extent in pixels there (blurs, weather, elastic
waves) is done at 224 pixels here too, whatever the size of the image, and so covers the same share of the picture;
that is where images larger than 224 pixels are corrupted in any case, as they are when ImageNet-C's files are
enlarged. What changes pixels one by one (noise, brightness, contrast), by a share of the size (pixelate) or in blocks
of 8 (JPEG) is done at the image's own size. At 28 pixels the result is neither ImageNet-C nor CIFAR-10-C, whose noise
is milder: it compares models with each other, and not with published tables.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset
from torchvision.transforms import v2

from eval.metrics.corruption_names import CORRUPTIONS, SEVERITIES
from illama.data.datasets import Preprocessing, Sample
from illama.errors import UserError

REFERENCE_SIZE = 224
_EXTENT_IN_PIXELS = frozenset(
    ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "snow", "frost", "fog", "elastic_transform")
)
_TAKES_SEED = frozenset(("impulse_noise", "glass_blur"))


class CorruptedImages(Dataset[Sample]):
    """A split with every image brought to the network's size and corrupted there.

    An image's corruption depends on the seed, the corruption, the severity and the image's index alone, so any
    number of loader workers makes the same images.

    Args:
        images: the split.
        preprocessing: what frames the images; :func:`after_framing` is the transform for the rest.
        corruption: one of :data:`CORRUPTIONS`.
        severity: 1 to 5.

    Raises:
        UserError: another corruption or severity, or the library is not installed.
    """

    def __init__(
        self, images: Dataset[Sample], preprocessing: Preprocessing, corruption: str, severity: int, seed: int = 0
    ) -> None:
        check_corruption(corruption, severity)
        self.images, self.corruption, self.severity, self.seed = images, corruption, severity, seed
        self._frame = v2.Compose([_as_pil, *preprocessing.framing()])

    def __len__(self) -> int:
        return len(self.images)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Sample:
        image, label = self.images[index]
        place = (self.seed, CORRUPTIONS.index(self.corruption), self.severity, index)
        seed = int(np.random.SeedSequence(place).generate_state(1)[0])
        return corrupt(self._frame(image), self.corruption, self.severity, seed), label


def after_framing(preprocessing: Preprocessing) -> v2.Transform:
    """The transform of images that :class:`CorruptedImages` has brought to the network's size already."""
    return v2.Compose(preprocessing.to_input())


def check_corruption(corruption: str, severity: int) -> None:
    """UserError unless there is such a corruption, such a severity, and the library that makes it."""
    if corruption not in CORRUPTIONS:
        raise UserError(f"unknown corruption {corruption!r}: choose from {', '.join(CORRUPTIONS)}")
    if severity not in SEVERITIES:
        raise UserError(f"severity must be 1 to 5, not {severity}")
    _functions()


def corrupt(image: Image.Image, corruption: str, severity: int, seed: int) -> Image.Image:
    """A square image, grey or RGB, corrupted; the same size and mode. NumPy's global generator is left as it was."""
    size, mode = image.size, image.mode
    if corruption in _EXTENT_IN_PIXELS:
        image = image.convert("RGB")  # of a grey image the library would blur single rows
    if corruption in _EXTENT_IN_PIXELS or image.width > REFERENCE_SIZE:
        image = image.resize((REFERENCE_SIZE, REFERENCE_SIZE), Image.Resampling.BICUBIC)
    more = {"seed": seed} if corruption in _TAKES_SEED else {}
    with _seeded(seed):
        pixels = _functions()[corruption](image, severity, **more)
    result = Image.fromarray(np.uint8(pixels)).convert(mode)
    return result if result.size == size else result.resize(size, Image.Resampling.BICUBIC)


def _functions() -> dict[str, Any]:
    try:
        import imagecorruptions  # only here, since it is an extra, and numba takes a while
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
