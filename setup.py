"""Makes the wheel smaller than the repository: the shipped network in half precision, images and weights in xz.

Rounding the weights changes some of the network's 8-bit weights by one step. An editable installation, as `make setup`
makes it, uses the files of the repository.
"""

import gzip
import lzma
from pathlib import Path

from safetensors import safe_open
from safetensors.numpy import save
from setuptools import setup
from setuptools.command.build_py import build_py

PAIRS = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 0, "lp": 1, "pb": 1}  # of bytes: float16


class BuildSmaller(build_py):
    """Copies the packages, and then rewrites the large files in the copy."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        package = Path(self.build_lib) / "illama"
        for path in package.glob("datasets/*/*.gz"):
            smaller = lzma.compress(gzip.decompress(path.read_bytes()), preset=9 | lzma.PRESET_EXTREME)
            path.with_suffix(".xz").write_bytes(smaller)
            path.unlink()
        for path in package.glob("weights/*/model.safetensors"):
            path.with_name(f"{path.name}.xz").write_bytes(lzma.compress(to_half(path), filters=[PAIRS]))
            path.unlink()


def to_half(path: Path) -> bytes:
    """Returns a .safetensors file with its float32 tensors rounded to float16."""
    with safe_open(path, "np") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118 - it is no dict
    halves = {name: each.astype("float16") if each.dtype == "float32" else each for name, each in tensors.items()}
    return save(halves, metadata)


setup(cmdclass={"build_py": BuildSmaller})
