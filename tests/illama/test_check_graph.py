"""Every ONNX file from outside is accepted, or refused in one line, before a runtime opens it."""

import copy
import random
import time

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from support import write_linear_bundle

from deploy.runtimes.onnxruntime_engine import OnnxRuntimeEngine
from illama.errors import MAX_MESSAGE, UserError
from illama.graph.check_graph import check_graph
from illama.graph.reader import load_graph


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A small classifier, logits = pixels x w."""
    weights = np.random.default_rng(0).normal(size=(12, 3))
    return write_linear_bundle(tmp_path_factory.mktemp("linear") / "bundle", weights, 2, ["a", "b", "c"]) / "model.onnx"


def value(name, shape, dtype=TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, dtype, shape)


def external(**where):
    """Moves the weights out of the file; ``where``: entries of the reference to them."""

    def edit(model, path):
        data = model.graph.initializer[0].raw_data
        (path.parent / "model.onnx.data").write_bytes(data)
        (path.parent.parent / "outside").write_bytes(data)
        onnx.external_data_helper.set_external_data(model.graph.initializer[0], location="model.onnx.data")
        del model.graph.initializer[0].external_data[:]
        model.graph.initializer[0].ClearField("raw_data")
        for key, text in {"location": "model.onnx.data", **where}.items():
            model.graph.initializer[0].external_data.add(key=key, value=text)

    return edit


def without_data(model, path):
    external()(model, path)
    (path.parent / "model.onnx.data").unlink()


def linked_data(model, path):
    without_data(model, path)
    (path.parent / "model.onnx.data").symlink_to("../outside")


def cycle(model, _):
    model.graph.node[0].input[0] = "x"
    model.graph.node.append(helper.make_node("Neg", ["flat"], ["x"]))


def nodes(*made):
    return lambda model, _: model.graph.node.extend(made)


def deep_subgraph(model, _):
    graph = helper.make_graph([helper.make_node("Neg", ["flat"], ["x"])], "g", [], [value("x", [None, 12])])
    for _ in range(20):
        graph = (
            helper.make_graph(
                [helper.make_node("If", ["c"], ["x"], then_branch=graph, else_branch=graph)],
                "g",
                [],
                [value("x", [None])],
            )
            if len(graph.SerializeToString()) < 10_000
            else graph
        )
    model.graph.node.append(helper.make_node("If", ["c"], ["y"], then_branch=graph, else_branch=graph))


def recursion(model, _):
    call = helper.make_node("F", ["x"], ["y"], domain="own")
    model.functions.append(helper.make_function("own", "F", ["x"], ["y"], [call], [helper.make_opsetid("own", 1)]))
    model.opset_import.append(helper.make_opsetid("own", 1))
    model.graph.node.append(helper.make_node("F", ["flat"], ["z"], domain="own"))


def huge_value(shape, *before):
    """A value of 2^40 elements, whose shape is a constant or is computed from one by the nodes ``before``."""

    def edit(model, _):
        model.graph.initializer.append(numpy_helper.from_array(np.array(shape), "shape"))
        name = "shape"
        for kind in before:
            model.graph.node.append(helper.make_node(kind, [name] * (2 if kind == "Mul" else 1), [f"{name}x"]))
            name += "x"
        model.graph.node.append(helper.make_node("ConstantOfShape", [name], ["huge"]))

    return edit


def tiled(model, _):
    model.graph.initializer.append(numpy_helper.from_array(np.array([1, 2**30]), "repeats"))
    model.graph.node.append(helper.make_node("Tile", ["flat", "repeats"], ["huge"]))


def split_by_sizes(model, _):
    model.graph.initializer.append(numpy_helper.from_array(np.array([6, 6]), "sizes"))
    model.graph.node.append(helper.make_node("Split", ["flat", "sizes"], ["x", "y", "z"], axis=1))


def field(edit):
    return lambda model, _: edit(model)


def claimed(**fields):
    def edit(model, _):
        for name, content in fields.items():
            target = model.graph.initializer[0]
            target.dims[:] = content if name == "dims" else target.dims
            if name != "dims":
                setattr(target, name, content)

    return edit


FAULTS = {
    "node without outputs": nodes(helper.make_node("Neg", ["flat"], [])),
    "node with an empty output": nodes(helper.make_node("Neg", ["flat"], [""])),
    "cycle": cycle,
    "value computed twice": nodes(helper.make_node("Neg", ["images"], ["flat"])),
    "node named twice": nodes(helper.make_node("Neg", ["flat"], ["x"], name="head/MatMul")),
    "constant named twice": field(lambda model: model.graph.initializer.append(model.graph.initializer[0])),
    "no input": field(lambda model: model.graph.input.pop()),
    "two inputs": field(lambda model: model.graph.input.append(value("more", [1]))),
    "no output": field(lambda model: model.graph.output.pop()),
    "output that nothing computes": field(lambda model: setattr(model.graph.output[0], "name", "x")),
    "string input": field(lambda model: model.graph.input[0].CopyFrom(value("images", [1, 3], TensorProto.STRING))),
    "input without a shape": field(lambda model: model.graph.input[0].CopyFrom(value("images", None))),
    "a split into more parts than it says": nodes(helper.make_node("Split", ["flat"], ["x", "y", "z"], num_outputs=2)),
    "a split into more parts than sizes": split_by_sizes,
    "no images": field(lambda model: model.graph.input[0].CopyFrom(value("images", [0, 3, 2, 2]))),
    "terabytes claimed": claimed(dims=[2**20, 2**20]),
    "negative size": claimed(dims=[-12, -3]),
    "unknown dtype": claimed(data_type=77),
    "string constant": claimed(data_type=TensorProto.STRING),
    "other dtype": claimed(data_type=TensorProto.DOUBLE),
    "shapes that do not fit": claimed(dims=[3, 12]),
    "wrong output type": field(lambda model: model.graph.output[0].CopyFrom(value("logits", [1, 3], TensorProto.INT8))),
    "unknown operator": nodes(helper.make_node("Nonsense", ["flat"], ["x"])),
    "huge value": huge_value([2**20, 2**20]),
    "huge list": huge_value([2**40]),
    "huge value of a computed shape": huge_value([2**10, 2**10], "Mul"),
    "huge value of a copied shape": huge_value([2**20, 2**20], "Identity"),
    "huge tile": tiled,
    "control flow": deep_subgraph,
    "recursive function": recursion,
    "no operator set": field(lambda model: model.ClearField("opset_import")),
    "no graph": field(lambda model: model.ClearField("graph")),
    "data above the folder": external(location="../outside"),
    "data at an absolute path": external(location="/etc/passwd"),
    "data in another file": external(location="model.onnx"),
    "data that is linked": linked_data,
    "data that is missing": without_data,
    "data beyond the end": external(offset="64"),
    "data before the start": external(offset="-8"),
    "data of terabytes": external(length=str(2**42)),
    "data too short": external(length="8"),
    "data at no number": external(offset="0x10"),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_a_bad_file_is_refused_in_one_line(fault, file, tmp_path):
    (tmp_path / "bundle").mkdir()
    path, model = tmp_path / "bundle" / "model.onnx", onnx.load(file)
    fault(model, path)
    path.write_bytes(model.SerializeToString())
    for opened in (check_graph, load_graph, OnnxRuntimeEngine):
        with pytest.raises(UserError, match=r"model\.onnx") as error:
            opened(path)
        assert len(str(error.value)) <= MAX_MESSAGE and "\n" not in str(error.value)


def test_external_data_beside_the_file_is_read(file, tmp_path):
    model = onnx.load(file)
    external(offset="0", length="144")(model, tmp_path / "model.onnx")
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    images = np.random.default_rng(1).normal(size=(2, 3, 2, 2)).astype(np.float32)
    expected = OnnxRuntimeEngine(file).infer(images)
    np.testing.assert_array_equal(OnnxRuntimeEngine(tmp_path / "model.onnx").infer(images), expected)


def test_other_paths_are_refused(tmp_path):
    (tmp_path / "empty.onnx").touch()
    (tmp_path / "loop.onnx").symlink_to("loop.onnx")
    for name in ("missing.onnx", "empty.onnx", "loop.onnx", ".", "nul\0.onnx", "long" * 100):
        with pytest.raises(UserError):
            check_graph(tmp_path / name)


def test_custom_operators_and_opset_23_attention_are_accepted(tmp_path):
    qkv = [helper.make_node("Identity", ["images"], [name]) for name in ("q", "k", "v")]
    attention = helper.make_node("Attention", ["q", "k", "v"], ["y"], name="a")
    custom = helper.make_node("Anything", ["y"], ["logits"], domain="com.example")
    ends = [value("images", ["b", 2, 4, 8])], [value("logits", ["b", 2, 4, 8])]
    graph = helper.make_graph([*qkv, attention, custom], "g", *ends)
    imports = [helper.make_opsetid("", 23), helper.make_opsetid("com.example", 1)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=11), tmp_path / "model.onnx")
    values = {each.name: each for each in load_graph(tmp_path / "model.onnx").graph[3].outputs}
    assert list(values["y"].shape)[1:] == [2, 4, 8]


def test_the_number_of_images_may_be_inferred(tmp_path):
    """As in ``x.view(-1, classes)``, and ``x.view(x.size(0), -1)``."""
    sizes = [numpy_helper.from_array(np.array(each), name) for each, name in (([-1, 24], "flat"), ([-1], "rest"))]
    nodes = [
        helper.make_node("Reshape", ["images", "flat"], ["rows"]),
        helper.make_node("Shape", ["rows"], ["batch"], start=0, end=1),
        helper.make_node("Concat", ["batch", "rest"], ["both"], axis=0),
        helper.make_node("Reshape", ["rows", "both"], ["logits"]),
    ]
    graph = helper.make_graph(nodes, "g", [value("images", ["b", 2, 3, 4])], [value("logits", ["b", 24])], sizes)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), tmp_path / "model.onnx")
    assert OnnxRuntimeEngine(tmp_path / "model.onnx").infer(np.ones((5, 2, 3, 4), np.float32)).shape == (5, 24)


def test_mutated_files_are_read_or_refused(file, tmp_path):
    """Random bytes, cuts and repetitions: no exception but UserError, and none takes long."""
    data, path, draw = file.read_bytes(), tmp_path / "model.onnx", random.Random(0)
    counts, start = [0, 0], time.perf_counter()
    for number in range(300):
        broken = bytearray(data)
        for _ in range(draw.choice((1, 2, 8))):
            at = draw.randrange(len(broken))
            broken[at : at + draw.choice((0, 1, 4))] = draw.randbytes(draw.choice((0, 1, 4)))
        path = tmp_path / f"{number}.onnx"
        path.write_bytes(broken)
        try:
            OnnxRuntimeEngine(path)
            counts[0] += 1
        except UserError:
            counts[1] += 1
        path.unlink()
    assert min(counts) > 20 and time.perf_counter() - start < 10


def test_a_file_is_checked_again_only_after_a_change(file, tmp_path):
    path, model = tmp_path / "model.onnx", onnx.load(file)
    path.write_bytes(model.SerializeToString())
    assert check_graph(path) is check_graph(path)
    broken = copy.deepcopy(model)
    broken.graph.node.pop()
    path.write_bytes(broken.SerializeToString())
    with pytest.raises(UserError):
        check_graph(path)
