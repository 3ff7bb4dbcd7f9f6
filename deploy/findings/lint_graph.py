"""Checks an ONNX file of any origin by all rules."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass, LiftConstantsToInitializersPass

from deploy.findings.attention_rules import check_attentions
from deploy.findings.finding import SEVERITIES, Check, Finding, Subject, found
from deploy.findings.loading_rules import check_domains, check_shapes, check_versions
from deploy.findings.precision_rules import check_constants, check_squares
from deploy.findings.quantization_rules import (
    check_normalizations,
    check_product_shapes,
    check_residuals,
    check_scales,
    check_stored_weights,
)
from deploy.versions import LoadedBy
from illama.errors import UserError
from illama.graph.check_graph import drop_large_constants
from illama.quiet import quiet
from illama.structured_files import check_regular

CHECKS: tuple[Check, ...] = (
    check_versions,
    check_domains,
    check_shapes,
    check_scales,
    check_constants,
    check_residuals,
    check_normalizations,
    check_attentions,
    check_squares,
    check_product_shapes,
    check_stored_weights,
)
_LIMIT, _MOST_NODES = 2**31, 1_000_000


def lint_graph(path: Path, runtime: LoadedBy | None = None) -> list[Finding]:
    """Returns everything that the rules find in an ONNX file, the most severe first.

    Args:
        runtime: the runtime that the file is for; if not given, nothing is checked against versions.

    Raises:
        UserError: the file does not exist or is not an ONNX file.
    """
    check_regular(path)
    if path.stat().st_size >= _LIMIT:
        return [found("file-too-large", path.name, f"{path.stat().st_size / 1e9:.1f} GB")]
    subject = Subject(path, open_any_graph(path), runtime)
    try:
        findings = [finding for check in CHECKS for finding in check(subject)]
    except (MemoryError, OSError):
        raise
    except Exception as error:  # a file that is not valid, or whose data is cut off, fails in any place
        raise UserError(f"{path} is damaged: {' '.join(str(error).split())[:200] or type(error).__name__}") from error
    return sorted(findings, key=lambda each: SEVERITIES.index(each.severity))


def open_any_graph(path: Path) -> ir.Model:
    """Opens an ONNX file of any origin, with dtypes and shapes as far as they can be inferred; data stay on disk.

    Raises:
        UserError: it is not an ONNX file, or its external data are missing.
    """
    try:
        proto = onnx.load(path, format="protobuf", load_external_data=False)
        if _expanded_nodes(proto) > _MOST_NODES:
            raise UserError(f"{path} has functions of more than {_MOST_NODES:,} operators in all: export without them")
        light = onnx.ModelProto()
        light.CopyFrom(proto)
        drop_large_constants(light)
        with suppress(onnx.shape_inference.InferenceError):  # of a file with operators that ONNX does not know
            inferred = onnx.shape_inference.infer_shapes(light, strict_mode=False)
            del proto.graph.value_info[:]
            proto.graph.value_info.extend(inferred.graph.value_info)
        with quiet("onnx_ir"):
            model = ir.from_proto(proto)
            model.graph.sort()  # raises an error if the graph has a cycle
            InlinePass()(model)
            LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        ir.external_data.set_base_dir(model.graph, path.parent.absolute())
        if not len(model.graph) or not model.graph.inputs:
            raise UserError(f"{path} has no operators or no input")
    except UserError:
        raise
    except Exception as error:  # the exceptions of protobuf, onnx and onnx_ir have no other common base class
        raise UserError(f"{path} cannot be read as ONNX: {' '.join(str(error).split())[:200]}") from error
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and not Path(tensor.path).is_file():
            raise UserError(f"{path} has external data in {tensor.location}, which does not exist: copy it beside it")
    return model


def _expanded_nodes(proto: onnx.ModelProto) -> int:
    """Returns how many operators a graph has with its functions in place of their calls.

    Raises:
        RecursionError: a function calls itself.
    """
    functions = {(each.domain, each.name): each for each in proto.functions}

    @cache
    def size(function: tuple[str, str]) -> int:
        calls = ((node.domain, node.op_type) for node in _with_branches(bodies[function]))
        return sum(size(call) if call in functions else 1 for call in calls)

    bodies = {key: each.node for key, each in functions.items()} | {("", ""): proto.graph.node}
    return size(("", ""))


def _with_branches(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Yields operators, and those in their branches and loops."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from _with_branches(graph.node)
