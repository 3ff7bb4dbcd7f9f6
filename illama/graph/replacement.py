"""Builds the nodes that replace one node of a graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from illama.graph.reader import add_constant


@dataclass
class Replacement:
    """Nodes in place of another, with names that begin with its name, and its metadata.

    Attributes:
        graph: the graph of the node.
        node: the node, which must have one output.
        nodes: the nodes added so far.
    """

    graph: ir.Graph
    node: ir.Node
    nodes: list[ir.Node] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Name of the old node, or of its output if it has none."""
        return self.node.name or str(self.node.outputs[0].name)

    def add(
        self, kind: str, inputs: Sequence[ir.Value | None], dtype: ir.DataType | None = None, **attributes: Any
    ) -> ir.Value:
        """Adds an operator with one output, whose dtype is the first input's if not given; returns the output."""
        return self.add_many(kind, inputs, 1, dtype, **attributes)[0]

    def add_many(
        self, kind: str, inputs: Sequence[ir.Value | None], outputs: int, dtype: ir.DataType | None, **attributes: Any
    ) -> Sequence[ir.Value]:
        """Adds an operator with several outputs of one dtype; returns them."""
        node = ir.node(kind, inputs, attributes, num_outputs=outputs)
        node.name = f"{self.name}/{len(self.nodes)}.{kind}"
        node.metadata_props.update(self.node.metadata_props)
        for index, value in enumerate(node.outputs):
            value.name = f"{node.name}.{index}" if index else node.name
            value.type = ir.TensorType(dtype or inputs[0].dtype)  # type: ignore[union-attr, arg-type]
        self.nodes.append(node)
        return node.outputs

    def constant(self, name: str, number: object, dtype: ir.DataType) -> ir.Value:
        """Returns a new constant of the graph."""
        full = f"{self.name}/{name}"
        while full in self.graph.initializers:  # of the file
            full += "_"
        return add_constant(self.graph, full, np.array(number, dtype.numpy()))

    def finish(self, result: ir.Value) -> None:
        """Inserts the nodes, lets all readers of the old node read ``result``, and removes the old node."""
        old = self.node.outputs[0]
        result.shape = old.shape
        self.graph.insert_before(self.node, self.nodes)
        old.replace_all_uses_with(result, replace_graph_outputs=True)
        result.name, old.name = old.name, None
        self.graph.remove(self.node, safe=True)
