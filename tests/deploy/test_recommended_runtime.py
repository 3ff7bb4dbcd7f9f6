"""The runtime of a file on this CPU: the faster one, measured when the file is first opened, and kept."""

import json
import time
from dataclasses import replace

import numpy as np
import pytest
from support import write_linear_bundle

from deploy.runtimes.cpu_runtime import FASTEST, CpuLatency, cpu_runtime
from deploy.runtimes.onnxruntime_engine import OnnxRuntimeEngine
from deploy.runtimes.open_engine import open_engine
from deploy.runtimes.openvino_engine import OpenVinoEngine
from deploy.runtimes.recommended_runtime import RuntimeChoice, recommend_runtime
from illama.errors import UserError


@pytest.fixture
def bundle(tmp_path):
    return write_linear_bundle(tmp_path / "int8", np.ones((768, 3)), 16, ["a", "b", "c"])


def measured(bundle, fastest, **changes):
    """What the toolkit keeps about a file that takes half the time in one runtime."""
    path = bundle / "model.onnx"
    milliseconds = {name: 1.0 if name == fastest else 2.0 for name in ("onnxruntime", "openvino")}
    return replace(CpuLatency.of(path, milliseconds), **changes)


@pytest.mark.parametrize("fastest", ["onnxruntime", "openvino"])
def test_the_runtime_that_was_measured_to_be_faster_is_chosen(bundle, fastest):
    measured(bundle, fastest).keep(bundle / "model.onnx")
    choice = recommend_runtime(bundle)
    assert (choice.file, choice.runtime) == (bundle / "model.onnx", fastest)
    assert "1 ms" in choice.reason and "2 ms" in choice.reason
    assert open_engine(bundle).runtime.startswith(fastest)


def test_measured_at_first_use_and_kept(bundle, monkeypatch):
    slower = {"onnxruntime": OnnxRuntimeEngine, "openvino": OpenVinoEngine}
    opened = []
    for name, kind in slower.items():
        infer = kind.infer

        def slowed(self, images, infer=infer, name=name):
            opened.append(name)
            time.sleep(0.02 if name == "openvino" else 0.0)
            return infer(self, images)

        monkeypatch.setattr(kind, "infer", slowed)
    assert cpu_runtime(bundle / "model.onnx") == "onnxruntime" and set(opened) == set(slower)
    opened.clear()
    assert cpu_runtime(bundle / "model.onnx") == "onnxruntime" and not opened
    [kept] = json.loads((bundle / FASTEST).read_text())
    assert kept["milliseconds"]["openvino"] > 20 > kept["milliseconds"]["onnxruntime"]


def test_measured_again_if_it_was_another_cpu_file_or_version(bundle):
    path = bundle / "model.onnx"
    for changes in ({"device": "another"}, {"threads": 1000}, {"modified_ns": 1}, {"versions": {"openvino": "1"}}):
        measured(bundle, "openvino", **changes).keep(path)
    cpu_runtime(path)
    *others, new = json.loads((bundle / FASTEST).read_text())
    assert len(others) == 4 and new["milliseconds"].keys() == {"onnxruntime", "openvino"}
    assert CpuLatency.of(path, new["milliseconds"]) == CpuLatency(**new)
    (bundle / FASTEST).write_text("[")
    cpu_runtime(path)
    assert len(json.loads((bundle / FASTEST).read_text())) == 1


def test_a_runtime_with_wrong_answers_is_not_chosen(bundle, monkeypatch, capsys):
    def refuse(engine, file):
        if isinstance(engine, OnnxRuntimeEngine):
            raise UserError("wrong")

    monkeypatch.setattr("deploy.runtimes.cpu_runtime.verify", refuse)
    assert cpu_runtime(bundle / "model.onnx") == "openvino"
    assert "onnxruntime: wrong" in capsys.readouterr().err
    assert recommend_runtime(bundle).runtime == "openvino"


def test_the_users_choice_takes_precedence(bundle):
    measured(bundle, "openvino").keep(bundle / "model.onnx")
    assert recommend_runtime(bundle, "onnxruntime").runtime == "onnxruntime"
    with pytest.raises(UserError, match=r"model\.safetensors"):
        recommend_runtime(bundle, "torch")
    (bundle / "model.onnx").unlink()
    with pytest.raises(UserError, match=r"model\.onnx"):
        recommend_runtime(bundle)


def test_a_choice_is_read_as_it_was_written(bundle, tmp_path):
    choice = recommend_runtime(bundle)
    choice.write(tmp_path)
    assert RuntimeChoice.read(tmp_path) == RuntimeChoice(tmp_path / "model.onnx", choice.runtime, choice.reason)
