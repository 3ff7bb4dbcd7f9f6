"""Data sets, image decoding, preprocessing and augmentation."""
