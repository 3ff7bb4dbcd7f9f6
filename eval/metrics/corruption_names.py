"""Names and severities of ImageNet-C's corruptions. Imports nothing slow, so that ``--help`` answers at once."""

BLURS = ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur")
_NOISES, _WEATHERS = ("gaussian_noise", "shot_noise", "impulse_noise"), ("snow", "frost", "fog", "brightness")
_DIGITAL = ("contrast", "elastic_transform", "pixelate", "jpeg_compression")
CORRUPTIONS = (*_NOISES, *BLURS, *_WEATHERS, *_DIGITAL)
SEVERITIES = (1, 2, 3, 4, 5)
