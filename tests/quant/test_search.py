"""Mixed-precision search: the exact optimum, the budget, and reproduction from its scheme file."""

import itertools
import json

import numpy as np
import onnx
import pytest
import torch
from support import SMALL, assert_one_line_error

from illama import ILLaMA
from illama.bundle import sha256
from illama.errors import UserError
from illama.graph.layer_times import layer_of_module, read_layer_times
from illama.options import SourceOptions, check_bounds
from quant.export.onnx_export import export_onnx
from quant.inputs import open_inputs
from quant.mixed_precision.budget import Budget
from quant.mixed_precision.knapsack import assign, total
from quant.mixed_precision.layer_effects import Effect, layers_of
from quant.mixed_precision.planner import Plan, Planner
from quant.mixed_precision.search_space import FormatChoice, SearchSpace, format_schemes, weight_bytes
from quant.quantizers.calibrate import calibrate
from quant.schemes.formats import TensorSpec
from quant.schemes.scheme import read_scheme, resolve, shipped_scheme, tensor_names
from quant.search import SearchOptions


@pytest.mark.parametrize("seed", range(12))
def test_the_assignment_is_the_optimum(seed):
    """Against all assignments of small tables, with values of magnitudes as different as KL divergences and bytes."""
    generator = np.random.default_rng(seed)
    sizes = generator.integers(1, 5, 5)
    minimise = {f"layer{i}": (10.0 ** generator.uniform(-7, -2, n)).tolist() for i, n in enumerate(sizes)}
    limited = {f"layer{i}": generator.integers(0, 10**6, n).astype(float).tolist() for i, n in enumerate(sizes)}
    every = [dict(zip(minimise, indices, strict=True)) for indices in itertools.product(*map(range, sizes))]
    for limit in np.quantile([total(limited, each) for each in every], [0.05, 0.3, 0.7]):
        best = min(total(minimise, each) for each in every if total(limited, each) <= limit)
        found = assign(minimise, (limited, float(limit)))
        assert total(limited, found) <= limit * (1 + 1e-6)
        assert total(minimise, found) == pytest.approx(best, rel=1e-6)


def test_the_limit_holds_and_ties_go_to_the_smaller_limited_sum():
    costs = {"a": [4.0, 1.0], "b": [2.0, 1.0]}
    assert assign({"a": [0.0, 1.0], "b": [0.0, 1.0]}, (costs, 1.9)) is None
    assert assign({"a": [1.0, 1.0], "b": [0.0, 0.0]}, (costs, 100.0)) == {"a": 1, "b": 1}
    assert assign({"a": [0.0, 1e-7], "b": [0.0, 1e-7]}, (costs, 100.0)) == {"a": 0, "b": 0}


def test_bytes_are_those_of_the_file(tmp_path):
    model = ILLaMA(SMALL).eval()
    scheme = format_schemes(["w4a8"])[0]
    plan = resolve(scheme, model).tensors
    export_onnx(calibrate(model, resolve(scheme, model), [torch.randn(4, 3, 32, 32)]), tmp_path / "model.onnx", "plain")
    graph = onnx.load(tmp_path / "model.onnx").graph
    stored = {tensor.name: len(tensor.raw_data) for tensor in graph.initializer}
    weights = {node.name: node.input[:2] for node in graph.node if node.op_type == "DequantizeLinear"}
    for layer in ("blocks.0.attn.qkv", "blocks.1.mlp.fc2", "patch_embed.proj"):
        found = sum(stored[name] for name in weights[f"{layer}/DequantizeLinear"])
        assert weight_bytes(model.get_submodule(layer), plan[f"{layer}.weight"]) == found, layer
    assert weight_bytes(model.head, None) == 4 * model.head.weight.numel()
    assert weight_bytes(model.head, TensorSpec("int6")) == model.head.weight.numel() + 4 * SMALL.num_classes


LAYERS = layers_of(tensor_names(ILLaMA(SMALL)))


@pytest.mark.parametrize(
    ("module", "layer"),
    [
        ("blocks.0.attn.qkv", "blocks.0.attn.qkv"),
        ("blocks.0.attn.qkv.input", "blocks.0.attn.qkv"),
        ("blocks.1.attn.core.qk", "blocks.1.attn.core.qk"),
        ("blocks.1.attn.core.k", "blocks.1.attn.core.qk"),
        ("blocks.1.attn.core", None),
        ("stack_1_q", None),
        ("blocks.0.norm1", None),
    ],
)
def test_modules_belong_to_layers(module, layer):
    assert layer_of_module(module, LAYERS) == layer


def test_layer_times_of_an_engine(tmp_path):
    rows = [
        {"count": 100},
        {"name": "blocks.0.attn.qkv/MatMul + blocks.0.attn.qkv/Add", "averageMs": 0.03, "medianMs": 0.02},
        {"name": "{ForeignNode[blocks.0.mlp.fc1/MatMul...blocks.0.mlp.fc3/MatMul]}", "averageMs": 0.4},
        {"name": "blocks.1.attn.core/Attention", "averageMs": 0.1},
        {"name": "Reformatting CopyNode for Input Tensor 0", "averageMs": 0.005},
    ]
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(rows))
    times = read_layer_times(path, LAYERS)
    assert times.layers == pytest.approx(
        {
            "blocks.0.attn.qkv": 0.02,
            "blocks.0.mlp.fc1": 0.2,
            "blocks.0.mlp.fc3": 0.2,
            "blocks.1.attn.core.qk": 0.05,
            "blocks.1.attn.core.pv": 0.05,
        }
    )
    assert times.rest == pytest.approx(0.005) and times.call == pytest.approx(0.525)
    path.write_text(json.dumps([{"name": "conv1", "averageMs": 1.0}]))
    with pytest.raises(UserError, match=r"profile\.json"):
        read_layer_times(path, LAYERS)
    path.write_text("{")
    with pytest.raises(UserError, match=r"profile\.json"):
        read_layer_times(path, LAYERS)


class FormulaPlanner(Planner):
    """A planner whose measurements are `factor` times the predictions."""

    factor = slow = 1.0

    def check(self, plan, path):
        lost = round(self.factor * plan.kl * 100 * 1e4)  # of a million images, so that a point is 10,000
        plan.effect = Effect(30.0, plan.kl, lost, 0, 10**6)
        plan.measured = {**plan.predicted, "drop": plan.effect.drop, "drop_at_most": plan.effect.drop_at_most}
        for kind in ("ms", "megabytes"):
            plan.measured[kind] *= self.factor
        plan.measured["slowdown"] *= self.slow
        self.known.append((plan.kl, plan.effect))


def _planner(budget, factor):
    layers = {
        f"layer{i}": [
            FormatChoice("float", {}, None, 0.0, 400, 0.4),
            FormatChoice("int8", {}, None, 1e-3 * (i + 1), 100, 0.1),
        ]
        for i in range(8)
    }
    whole = {"int8": (Effect(30.0, 0.036, 36_000, 0, 10**6), 0.036)}  # 3.6 points lost for 0.036 nats: 100 a nat
    planner = FormulaPlanner(None, SearchSpace(layers, whole, 1000, 1.0, {}, {}), None, budget)
    planner.factor = factor
    return planner


def _quantized(plan):
    return {int(layer[-1]) for layer, index in plan.chosen.items() if index}


def test_the_smallest_cost_under_a_limit_on_the_drop():
    plans, best = _planner(Budget("drop", 1.02), 1.0).search(5, None)
    assert plans == [best] and len(_quantized(best)) == 4  # 1 + 2 + 3 + 4 thousandths of a nat
    assert _quantized(best) == {0, 1, 2, 3} and best.predicted["drop"] == pytest.approx(1.0)
    assert best.predicted["ms"] == pytest.approx(1.0 + 4 * 0.4 + 4 * 0.1)


def test_the_smallest_drop_under_a_limit_on_a_cost():
    _, best = _planner(Budget("ms", 3.0), 1.0).search(5, None)
    assert _quantized(best) == {0, 1, 2, 3}  # 4.2 - 0.3 each
    _, best = _planner(Budget("megabytes", 0.0033), 1.0).search(5, None)
    assert _quantized(best) == {0, 1, 2}  # 4,200 bytes - 300 each
    with pytest.raises(UserError, match=r"1 ms.*1\.800 ms"):
        _planner(Budget("ms", 1.0), 1.0).search(5, None)


@pytest.mark.parametrize("budget", [Budget("drop", 1.0), Budget("ms", 3.0), Budget("megabytes", 0.0033)])
def test_a_broken_budget_is_tightened_until_it_holds(budget):
    plans, best = _planner(budget, 1.25).search(6, None)
    assert len(plans) > 1 and best is plans[-1]
    assert plans[0].measured[budget.kind] > budget.limit >= best.measured[budget.kind]
    kls = [plan.kl for plan in plans]
    assert kls == sorted(kls, reverse=budget.kind == "drop")


def test_an_assignment_slower_than_float_is_left_for_a_faster_one():
    """Three layers in int8 are small enough, but measured as slower than float; more of them are faster."""
    planner = _planner(Budget("megabytes", 0.0033), 1.0)
    planner.slow = 1.4
    plans, best = planner.search(6, None)
    assert len(_quantized(plans[0])) == 3 and plans[0].measured["slowdown"] > 1.02 >= best.measured["slowdown"]
    assert len(_quantized(best)) > 3
    planner = _planner(Budget("megabytes", 0.0033), 1.0)
    planner.slow = 2.0
    assert planner.search(6, None)[1] is None


def test_what_is_small_but_slow_is_refused():
    planner = _planner(Budget("megabytes", 0.0033), 1.0)
    planner.ms = {layer: [0.4, 0.5] for layer in planner.ms}
    with pytest.raises(UserError, match="--max-slowdown"):
        planner.search(6, None)
    planner.budget = Budget("megabytes", 0.0033, slowdown=1.2)
    planner._slowdown_limit = 1.2
    assert len(_quantized(planner.search(6, None)[1])) == 3


def test_a_budget_that_no_assignment_holds():
    plans, best = _planner(Budget("ms", 3.0), 1.25).search(1, None)
    assert len(plans) == 1 and best is None


def test_gains_by_chance_do_not_make_the_slope_zero():
    planner = _planner(Budget("drop", 1.0), 1.0)
    planner.known = [(0.036, Effect(30.0, 0.036, 0, 100, 10**4))]  # 100 of 10,000 images gained, by chance
    planner.budget = Budget("drop", 0.1)
    assert planner.slope() == pytest.approx(0.1 / 0.036)  # the slope's standard error
    planner.kl = {layer: [0.0, 10 * values[1]] for layer, values in planner.kl.items()}
    assert 0 < len(_quantized(planner.solve())) < 8


def test_a_drop_must_hold_with_confidence():
    """A measured drop of half the limit may exceed it if the images are few."""
    planner = _planner(Budget("drop", 1.0), 1.0)
    for images, holds in ((200, False), (100_000, True)):
        effect = Effect(30.0, 0.01, images // 200, 0, images)
        measured = {"drop": effect.drop, "drop_at_most": effect.drop_at_most, "slowdown": 1.0}
        assert effect.drop == 0.5 and planner.holds(Plan({}, 0.01, {"drop": 0.5}, effect, measured)) == holds


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    from support import write_bundle, write_images

    folder = tmp_path_factory.mktemp("search")
    return write_bundle(folder / "bundle", SMALL), write_images(folder / "images")


def _search(run, data, out, *more):
    return run(
        "quant/search.py",
        "--checkpoint",
        data[0],
        "--data",
        data[1],
        "--calibration-images",
        8,
        "--images",
        12,
        "--out",
        out,
        *more,
    )


def test_the_command_and_its_replay(data, tmp_path, run_here):
    """The scheme of a search, calibrated and exported again, gives the same file byte for byte."""
    out = tmp_path / "search"
    result = _search(run_here, data, out, "--max-megabytes", 0.3, "--max-slowdown", 100, "--formats", "int8",
                     "int8-accurate")  # fmt: skip
    assert result.returncode == 0, result.stderr
    found, scheme = json.loads((out / "search.json").read_text()), read_scheme(out / "scheme.yaml")
    assert found["met"] and (out / "model.onnx").stat().st_size <= 300_000
    assert set(found["assignment"].values()) > {"float"}
    assert found["assignment"].keys() == LAYERS.keys()
    whole = found["whole_networks"]["int8"]
    assert ("class order" in result.stdout) == (whole["right"] / whole["images"] < 0.4)  # a tenth from a third to all
    measured = found["rounds"][-1]["measured"]
    assert measured["megabytes"] == (out / "model.onnx").stat().st_size / 1e6 and measured["ms"] > 0
    assert found["rounds"][-1]["predicted"]["megabytes"] == pytest.approx(measured["megabytes"], rel=0.2)
    inputs = open_inputs(SourceOptions(data[0], data=str(data[1]), calibration_images=8))
    assert resolve(scheme, inputs.model).tensors.keys() == {
        name for layer, chosen in found["assignment"].items() for name in LAYERS[layer] if chosen != "float"
    } - {"patch_embed.proj.input"}  # no shipped scheme rounds pixels
    export_onnx(
        calibrate(inputs.model, resolve(scheme, inputs.model), inputs.calibration), tmp_path / "again.onnx", "plain"
    )
    assert sha256(tmp_path / "again.onnx") == sha256(out / "model.onnx")
    debug = run_here(
        "quant/debug_layers.py",
        out,
        "--checkpoint",
        data[0],
        "--data",
        data[1],
        "--calibration-images",
        8,
        "--images",
        4,
    )
    assert debug.returncode == 0 and "<-" not in debug.stdout, debug.stderr


def test_times_of_a_gpu_elsewhere_are_predicted(data, tmp_path, run_here):
    out = tmp_path / "search"
    predicted = ("--max-megabytes", 0.3, "--formats", "int8", "--predict-for", "orin-nano")
    result = _search(run_here, data, out, *predicted)
    assert result.returncode == 0 and "PREDICTED" in result.stdout, result.stderr
    found = json.loads((out / "search.json").read_text())
    assert "orin-nano" in found["times"] and found["rounds"][-1]["measured"]["ms"] is None
    assert found["rounds"][-1]["predicted"]["slowdown"] < 1  # by the model, Q/DQ cost nothing
    assert_one_line_error(_search(run_here, data, out, *predicted[:-1], "toaster"), "toaster")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_drop": 0.1, "max_ms": 1.0},
        {"max_drop": -1.0},
        {"max_ms": 1.0, "rounds": 0},
        {"max_ms": 1.0, "reconstruction_iterations": -1},
    ],
)
def test_there_is_one_budget(options):
    given = SearchOptions(**options)
    with pytest.raises(UserError, match=r"--max-drop|--rounds|--reconstruction-iterations"):
        check_bounds(given)
        given.budget()


def test_options_that_do_not_fit(data, tmp_path, run_here):
    assert_one_line_error(_search(run_here, data, tmp_path / "out", "--max-ms", 1, "--formats", "int3"), "int3")
    assert_one_line_error(_search(run_here, data, tmp_path / "out", "--max-drop", 0.1), "0.1 points", "--check-images")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="SCHEME=FILE"):
        SearchOptions(layer_times=("x.json",)).profiles()
    with pytest.raises(UserError, match="--layer-times and --predict-for"):
        SearchOptions(max_megabytes=1.0, layer_times=("int8=x.json",), predict_for="thor").profiles()
    with pytest.raises(UserError, match="--formats"):
        format_schemes(["float"])


def test_formats_are_used_without_block_reconstruction():
    assert (
        shipped_scheme("w4a8").reconstruction_iterations and not format_schemes(["w4a8"])[0].reconstruction_iterations
    )
