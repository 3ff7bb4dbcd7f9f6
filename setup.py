"""Makes the wheel smaller than the repository: the shipped network in half precision, the images in xz instead of gzip.

Rounding the weights changes some of the network's 8-bit weights by one step. An editable installation, as `make setup`
makes it, uses the files of the repository.
"""

import gzip
import json
import lzma
import math
import struct
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildSmaller(build_py):
    """Copies the packages, and then rewrites the large files in the copy."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        package = Path(self.build_lib) / "illama"
        for path in package.glob("datasets/*/*.gz"):
            path.with_suffix(".xz").write_bytes(lzma.compress(gzip.decompress(path.read_bytes()), preset=9))
            path.unlink()
        for path in package.glob("weights/*/model.safetensors"):
            path.write_bytes(to_half(path.read_bytes()))


def to_half(content: bytes) -> bytes:
    """Returns the content of a .safetensors file with its float32 tensors in float16."""
    (size,) = struct.unpack("<Q", content[:8])
    header, data, parts, start = json.loads(content[8 : 8 + size]), content[8 + size :], [], 0
    for name, tensor in header.items():
        if name == "__metadata__":
            continue
        part = data[slice(*tensor["data_offsets"])]
        if tensor["dtype"] == "F32":
            count = math.prod(tensor["shape"])
            part = struct.pack(f"<{count}e", *struct.unpack(f"<{count}f", part))
            tensor["dtype"] = "F16"
        tensor["data_offsets"] = [start, start + len(part)]
        start += len(part)
        parts.append(part)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"".join(parts)


setup(cmdclass={"build_py": BuildSmaller})
