"""Export to ONNX with standard operators only: opset 23, native 8-bit weights, dynamic batch."""

from __future__ import annotations

import ast
import json
from collections import Counter
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes
import onnxscript
import torch
from onnxscript import opset23 as op
from onnxscript.optimizer import fold_constants
from onnxscript.rewriter import rewrite
from onnxscript.rewriter.rules import common as rules
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from illama.bundle import FEATURES, INPUT, OUTPUT, SOFTMAX_OUTPUT
from illama.graph.block_scales import expand_block_scales
from illama.graph.reader import LAYER
from illama.graph.tensorrt_operators import DOMAIN, register_operators
from illama.graph.writer import EXTERNAL_ABOVE, save_graph
from illama.models.attention import Form, MaskedAttention, MaskedNetwork
from illama.progress import Activity
from illama.quiet import quiet
from quant.export.rotary import pair_halves, rotary_embedding
from quant.quantizers.block_rounding import dequantize_blocks, quantize_blocks
from quant.quantizers.layers import Quantizer, copy_sharing_weights, dequantize, freeze, quantize_dequantize, quantizers
from quant.schemes.formats import FORMATS

OPSET = 23
# Those of onnxscript's 45 rules that apply to a transformer. One of the other rules turns pairs of Slices into a Split,
# in time quadratic in the size of the network: half of the export time for 12 blocks.
_RULES = (
    rules.materialize_reshape_shape_rule,
    rules.squeeze_reshape_1d_rule,
    rules.reshape_reshape_rule,
    rules.flatten_to_reshape_rule,
    rules.unsqueeze_unsqueeze_rule,
    rules.collapse_slice_rule,
    rules.collapse_slice2_rule,
    rules.no_op_transpose_rule,
    rules.transpose_transpose_rule,
    rules.cast_cast_rule,
    rules.no_op_cast_rule,
    rules.no_op_expand_rule,
    *rules.mul_by_1_rule.commute(),
    *rules.add_0_rule.commute(),
)


def export_onnx(
    model: MaskedNetwork,
    path: Path,
    form: Form,
    dtype: torch.dtype = torch.float32,
    external_above: int = EXTERNAL_ABOVE,
    wide: Mapping[str, torch.dtype] | None = None,
) -> None:
    """Exports ``model`` to ``path``: images (batch, C, H, W) float32 -> logits (batch, num_classes, ...) or features
    (batch, *config.features) float32.

    Quantizers become Q/DQ operators through :func:`translations`.

    Args:
        form: ``plain`` for CPUs, ``fused`` (one Attention operator per block) for TensorRT.
        dtype: float16 computes everything except normalizations in half precision, as TensorRT's fused attention
            requires; inputs and outputs stay float32.
        external_above: see :func:`illama.graph.writer.save_graph`.
        wide: module -> dtype in which it is computed instead.
    """
    model = copy_sharing_weights(model).eval()
    if form == "plain":
        pair_halves(model)
    notes = softmax_scales(model) if form == "fused" else {}
    network = _Casting(model, dtype, wide or {}, fold_zero_points=form == "fused")
    network.model.set_attention_form(form)
    dtypes = {quantizer.dtype.name for _, quantizer in quantizers(network)}
    register_operators()
    config = model.config
    images = torch.zeros(2, config.in_channels, *config.size)
    with Activity(f"export {path.name}"):
        with quiet("torch.onnx"), torch.no_grad():
            traced = torch.export.export(network, (images,), dynamic_shapes=({0: Dim("batch")},))
            program = torch.onnx.export(
                lower(traced),
                dynamo=True,
                opset_version=OPSET,
                optimize=False,
                verbose=False,
                input_names=[INPUT],
                output_names=[FEATURES if config.features else OUTPUT],
                custom_translation_table=translations(form, dtypes),
            )
        assert program is not None
        graph = simplify(program.model)
        if form == "plain":
            expand_block_scales(graph)
        if notes:
            graph.metadata_props[SOFTMAX_OUTPUT] = json.dumps(notes)
        save_graph(graph, path, external_above)


def softmax_scales(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Returns attention -> signed format and scale of its softmax output, for each that the scheme quantizes.

    ONNX's Attention operator computes the softmax inside, where no Q/DQ can be inserted. The engine builder replaces
    the operator by TRT_QuantizedAttention, which takes this scale.
    """
    found = {}
    for name, quantizer in quantizers(model):
        if name.endswith(".p"):
            signed = FORMATS[quantizer.dtype.name.removeprefix("u")]
            scale = float(quantizer.scale) * quantizer.dtype.high / signed.high
            found[name.removesuffix(".p")] = {"number": signed.name, "scale": scale}
    return found


class _Casting(nn.Module):
    """A network in another precision, with float32 inputs and outputs; ``wide``: modules in a third precision."""

    def __init__(
        self, model: MaskedNetwork, dtype: torch.dtype, wide: Mapping[str, torch.dtype], fold_zero_points: bool
    ) -> None:
        super().__init__()
        freeze(model, fold_zero_points)
        for name, module in model.named_modules():
            own = next((kind for unit, kind in wide.items() if f"{name}.".startswith(f"{unit}.")), dtype)
            _cast_own(module, own)
            if name in wide:
                module.register_forward_pre_hook(partial(_cast_inputs, own))
                module.register_forward_hook(lambda _, __, output: output.to(dtype))
        self.model, self.dtype = model, dtype

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images.to(self.dtype)).to(torch.float32)


def _cast_own(module: nn.Module, dtype: torch.dtype) -> None:
    """Converts the float32 tensors of a module, but not of those in it; 8-bit floating-point weights stay.

    The scales by which block scales are multiplied stay too: most are below float16's normal numbers.
    """
    if isinstance(module, Quantizer) and module.dtype.block:
        return
    for name, parameter in module._parameters.items():
        if parameter is not None and parameter.dtype == torch.float32:
            module._parameters[name] = nn.Parameter(parameter.detach().to(dtype), requires_grad=False)
    for name, buffer in module._buffers.items():
        if buffer is not None and buffer.dtype == torch.float32:
            module._buffers[name] = buffer.to(dtype)


def _cast_inputs(dtype: torch.dtype, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(each.to(dtype) if isinstance(each, Tensor) and each.is_floating_point() else each for each in inputs)


class _LoweredProgram(ExportedProgram):
    """An exported program that is not traced again if nothing in it has to be decomposed."""

    def run_decompositions(
        self, decomp_table: dict[Any, Any] | None = None, decompose_custom_triton_ops: bool = False
    ) -> ExportedProgram:
        """Returns the program itself if the table has none of its operators and none of them mutates its inputs."""
        targets = [node.target for node in self.graph.nodes if node.op == "call_function"]
        mutating = any(isinstance(each, torch._ops.OpOverload) and each._schema.is_mutable for each in targets)
        if decomp_table is None or mutating or any(each in decomp_table for each in targets):
            return super().run_decompositions(decomp_table, decompose_custom_triton_ops)
        return self


def lower(program: ExportedProgram) -> ExportedProgram:
    """Replaces operators that torch.onnx cannot translate, in place, and returns the program.

    Otherwise torch.onnx decomposes them by tracing the whole network again, which takes longer than the rest of the
    export. It still does so for operators that are not known here.
    """
    for node in list(program.graph.nodes):
        _lower(node)
    program.graph.eliminate_dead_code()
    return _LoweredProgram(
        program.graph_module,
        program.graph,
        program.graph_signature,
        program.state_dict,
        program.range_constraints,
        program.module_call_graph,
        program.example_inputs,
        program.constants,
        verifiers=program.verifiers,
    )


def _lower(node: fx.Node) -> None:
    """Replaces one node if its operator and arguments are known; all sizes except the batch are constants."""
    aten = torch.ops.aten
    if node.target in (aten.flatten.using_ints, aten.unflatten.int):
        shape = [size if isinstance(size, int) else -1 for size in node.meta["val"].shape]
        if shape.count(-1) <= 1:
            node.target, node.args, node.kwargs = aten.reshape.default, (node.args[0], shape), {}
    elif node.target == aten.chunk.default and not node.kwargs:
        dim = node.args[2] if len(node.args) > 2 else 0
        size = node.meta["val"][0].shape[dim]
        if isinstance(size, int):
            node.target, node.args = aten.split.Tensor, (node.args[0], size, dim)
    elif node.target == aten.to.dtype and len(node.args) == 2 and not node.kwargs:
        x, dtype = node.args
        if x.meta["val"].dtype != dtype or any(user.op == "output" for user in node.users):  # type: ignore[union-attr]
            node.target, node.args, node.kwargs = aten._to_copy.default, (x,), {"dtype": dtype}
        else:
            node.replace_all_uses_with(x)  # type: ignore[arg-type]
    elif node.target == aten._assert_tensor_metadata.default:
        node.graph.erase_node(node)


def simplify(model: ir.Model) -> ir.Model:
    """Names nodes by layer, folds all constants except Q/DQ, and removes torch.onnx's metadata; in place."""
    name_by_layer(model)
    limit = 2**40
    passes.InlinePass()(model)
    for _ in range(2):  # the rules can produce constants to fold
        fold_constants(model, onnx_shape_inference=True, input_size_limit=limit, output_size_limit=limit)
        rewrite(model, _RULES)
    ir.passes.Sequential(
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.DeduplicateInitializersPass(size_limit=limit),
        passes.CommonSubexpressionEliminationPass(),
        passes.DeduplicateInitializersPass(size_limit=limit),
        passes.RemoveUnusedNodesPass(),
        passes.OutputFixPass(),
        passes.NameFixPass(),
    )(model)
    for node in model.graph.all_nodes():
        for key in node.metadata_props.keys() - {LAYER}:
            del node.metadata_props[key]
    return model


def name_by_layer(model: ir.Model) -> None:
    """Names nodes and values by the network's modules, in place. A value of several modules is named by the innermost.

    A node becomes ``blocks.0.attn.qkv/MatMul``, the module's output ``blocks.0.attn.qkv``, and its quantized input
    ``blocks.0.attn.qkv.input``. Engines, profiles and :mod:`quant.debug_layers` show these names. Programs read the
    module from the node's metadata (:func:`illama.graph.reader.layer_of`); the two products of an attention are
    ``blocks.0.attn.core.qk`` and ``blocks.0.attn.core.pv`` there.
    """
    results: dict[str, ir.Value] = {}
    counts: Counter[str] = Counter()
    for node in model.graph.all_nodes():
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))[2:-1]
        scopes = [scope.removeprefix("model.") for scope in scopes]
        name = f"{scopes[-1] if scopes else 'network'}/{node.op_type}"
        counts[name] += 1
        node.name = name if counts[name] == 1 else f"{name}_{counts[name]}"
        if scopes:
            classes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.class_hierarchy", "[]"))
            product = node.op_type == "MatMul" and classes[-2].rpartition(".")[2] == MaskedAttention.__name__
            node.metadata_props[LAYER] = scopes[-1] + (".qk" if counts[name] == 1 else ".pv") * product
        results.update(dict.fromkeys(scopes, node.outputs[0]))
    taken: set[int] = {id(value) for value in model.graph.outputs}
    for scope, value in sorted(results.items(), key=lambda item: -item[0].count(".")):
        if id(value) not in taken:
            value.name = scope
            taken.add(id(value))


def translations(form: Form, dtypes: Collection[str] = ()) -> dict[Any, Any]:
    """Returns the translations of our custom operators to ONNX, for torch.onnx.export.

    Args:
        dtypes: names of the dtypes of quantized activations in the network.
    """

    def to_onnx_quantize_dequantize(x: Any, scale: Any, dtype: str, zero_point: int = 0) -> Any:
        limits, kind = FORMATS[dtype], onnx.TensorProto.DataType.Value(FORMATS[dtype].onnx_name)
        if limits.bits == 6:  # the 8-bit type does not saturate at 6 bits
            ends: list[Any] = [op.Constant(value_float=end - zero_point) for end in (limits.low, limits.high)]
            x = op.Clip(x, *(op.Mul(scale, op.CastLike(end, scale)) for end in ends))
        if form == "plain" and kind == onnx.TensorProto.INT8:
            # The same values as uint8, which integer products on x86 CPUs take as their left operand. ONNX Runtime
            # converts only some int8 operands by itself, and runs the others several times slower.
            kind, zero_point = onnx.TensorProto.UINT8, 128
        zero: Any = op.Constant(value=onnx.helper.make_tensor(f"zero_{dtype}", kind, [], [zero_point]))
        quantized: Any = op.QuantizeLinear(x, scale, zero)
        return op.DequantizeLinear(quantized, scale, zero)

    def to_onnx_dequantize(weight: Any, scale: Any, dtype: str, axis: int, group_size: int = 0) -> Any:
        if FORMATS[dtype].bits == 4:
            weight = op.Cast(weight, to=onnx.TensorProto.DataType.Value(FORMATS[dtype].onnx_name))
        return op.DequantizeLinear(weight, scale, axis=axis, block_size=group_size)

    def to_onnx_rotary(x: Any, cos: Any, sin: Any, positions: Any) -> Any:
        return op.RotaryEmbedding(x, cos, sin, positions, interleaved=0)

    def to_onnx_relu(x: Any) -> Any:
        zero: Any = op.Constant(value_float=0.0)
        return op.Max(x, op.CastLike(zero, x))

    table = {
        rotary_embedding._opoverload: to_onnx_rotary,
        quantize_dequantize._opoverload: to_onnx_quantize_dequantize,
        dequantize._opoverload: to_onnx_dequantize,
        **_block_translations(),
    }
    if form == "plain" and "fp8" in dtypes:
        # ONNX Runtime removes a Relu before a QuantizeLinear with zero point 0. This is right for unsigned integers
        # only, and FP8 is signed: Max is kept.
        table[torch.ops.aten.relu.default] = to_onnx_relu
    return table


def _block_translations() -> dict[Any, Any]:
    """Returns those of formats with block scales."""
    trt = onnxscript.values.Opset(DOMAIN, 1)

    def dequantize_twice(x: Any, scale: Any, tensor_scale: Any, dtype: Any, options: Mapping[str, int]) -> Any:
        scales: Any = op.DequantizeLinear(scale, tensor_scale)
        wide: Any = op.DequantizeLinear(x, scales, **options)
        return wide if int(dtype) == onnx.TensorProto.FLOAT else op.Cast(wide, to=int(dtype))

    def to_onnx_quantize_blocks(x: Any, tensor_scale: Any, dtype: str) -> Any:
        options, kind = {"axis": -1, "block_size": FORMATS[dtype].block}, onnx.TensorProto.FLOAT8E4M3FN
        if dtype == "mxfp8":
            quantized, scale = trt.TRT_MXFP8DynamicQuantize(x, **options, output_dtype=kind)
            return trt.TRT_MXFP8DequantizeLinear(quantized, scale, **options, output_dtype=int(x.dtype))
        quantized, scale = trt.TRT_FP4DynamicQuantize(x, tensor_scale, **options, scale_type=kind)
        return dequantize_twice(quantized, scale, tensor_scale, x.dtype, options)

    def to_onnx_dequantize_blocks(weight: Any, scale: Any, tensor_scale: Any, dtype: str, result: Any) -> Any:
        options = {"axis": 0, "block_size": FORMATS[dtype].block}
        if dtype == "mxfp8":
            return trt.TRT_MXFP8DequantizeLinear(weight, scale, **options, output_dtype=int(result))
        weight = op.Cast(weight, to=onnx.TensorProto.FLOAT4E2M1)
        return dequantize_twice(weight, scale, tensor_scale, result, options)

    return {
        quantize_blocks._opoverload: to_onnx_quantize_blocks,
        dequantize_blocks._opoverload: to_onnx_dequantize_blocks,
    }
