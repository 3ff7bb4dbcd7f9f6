"""The recommended runtime: the fastest one in the report beside the bundle, if the report is of this kind of CPU."""

import json

import numpy as np
import onnx
import pytest
from sample_report import make_report, make_row
from support import write_linear_bundle

from deploy.runtimes.open_engine import cpu_runtime
from deploy.runtimes.recommended_runtime import RuntimeChoice, recommend_runtime
from illama.bundle import sha256
from illama.errors import UserError
from illama.hardware import describe_machine


@pytest.fixture
def bundle(tmp_path):
    return write_linear_bundle(tmp_path / "int8", np.ones((768, 3)), 16, ["a", "b", "c"])


def write_report(folder, fastest, **changes):
    """A report in which one runtime takes half the time of the other two for int8/model.onnx."""
    report = make_report()
    report.machine = {**describe_machine(), **changes}
    measured = {"int8/model.onnx": sha256(folder / "int8" / "model.onnx")}
    report.rows = [
        make_row(f"int8, {runtime}", 93.0, 1.0 if runtime == fastest else 2.0, runtime_id=runtime, sha256=measured)
        for runtime in ("onnxruntime", "openvino", "torch")
    ] + [make_row("fp32, onnxruntime", 93.0, 0.1), make_row("int8, tensorrt", 93.0, 0.1, engine="x", engine_bytes=1)]
    (folder / "report.json").write_text(json.dumps(report.to_json()))


@pytest.mark.parametrize("fastest", ["onnxruntime", "openvino"])
def test_the_fastest_runtime_of_the_report_is_chosen(bundle, fastest):
    write_report(bundle.parent, fastest)
    choice = recommend_runtime(bundle)
    assert (choice.file, choice.runtime) == (bundle / "model.onnx", fastest)
    assert "report.json" in choice.reason


def test_a_report_of_another_cpu_or_none_leaves_the_default(bundle):
    default = cpu_runtime(bundle / "model.onnx")
    other = "onnxruntime" if default == "openvino" else "openvino"
    assert recommend_runtime(bundle).runtime == default
    for changes in ({"cpu": "another"}, {"cores": 1000}):
        write_report(bundle.parent, other, **changes)
        assert recommend_runtime(bundle).runtime == default
    write_report(bundle.parent, other)
    model = onnx.load(bundle / "model.onnx")
    model.doc_string = "made again"
    onnx.save(model, bundle / "model.onnx")
    assert recommend_runtime(bundle).runtime == default
    (bundle.parent / "report.json").write_text("[")
    assert recommend_runtime(bundle).runtime == default


def test_the_users_choice_takes_precedence(bundle):
    write_report(bundle.parent, "openvino")
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
