"""Milliseconds of files in the runtime that is asked for, or in the fastest one."""

import numpy as np
import pytest
from support import write_linear_bundle

from eval.measure.file_times import RuntimeTimer
from illama.bundle import CPU_ONNX
from illama.errors import UserError

IMAGES = np.random.default_rng(0).normal(size=(2, 3, 16, 16)).astype(np.float32)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two files of the same inputs."""
    folder = tmp_path_factory.mktemp("files")
    found = {}
    for name, outputs in (("float", 8), ("small", 3)):
        weights = np.random.default_rng(1).normal(size=(768, outputs)).astype(np.float32)
        found[name] = write_linear_bundle(folder / name, weights, 16, [f"class{i}" for i in range(outputs)]) / CPU_ONNX
    return found


def test_times_are_those_of_the_files(files):
    timer = RuntimeTimer(IMAGES, "float", batch=2)
    times = timer(files)
    assert times.keys() == files.keys() and min(times.values()) > 0
    assert timer.runtime in ("onnxruntime", "openvino")


def test_a_runtime_that_cannot_run_a_file_is_an_error(files):
    with pytest.raises(UserError, match=r"(?i)tensorrt"):
        RuntimeTimer(IMAGES, "float", runtime="tensorrt")(files)
    with pytest.raises(UserError, match="float"):
        RuntimeTimer(IMAGES[:, :1], "float", runtime="onnxruntime")({"float": files["float"]})
