"""Editing of an ONNX graph: producers and consumers of values, constants, new nodes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


class OnnxGraph:
    """Wraps a document's graph; `close` writes the edits back.

    Attributes:
        graph: the GraphProto.
        nodes: in topological order.
    """

    def __init__(self, document: Any) -> None:
        from onnx import numpy_helper

        self.graph = document.graph
        self.nodes: list[Any] = list(document.graph.node)
        self._read = numpy_helper.to_array
        self._constants: dict[str, Any] = {tensor.name: tensor for tensor in document.graph.initializer}
        for node in self.nodes:
            if node.op_type == "Constant" and len(node.attribute) == 1 and node.attribute[0].name == "value":
                self._constants[node.output[0]] = node.attribute[0].t
        self._arrays: dict[str, Array] = {}
        self._names = {value for node in self.nodes for value in (*node.input, *node.output, node.name)}
        self._names |= self._constants.keys()
        self.outputs = {entry.name for entry in document.graph.output}
        self._made: dict[str, Any] = {}
        self._taken: dict[str, list[Any]] = defaultdict(list)
        self.index()

    def index(self) -> None:
        """Update `maker` and `takers` after a change of inputs."""
        self._made = {output: node for node in self.nodes for output in node.output if output}
        self._taken = defaultdict(list)
        for node in self.nodes:
            for name in dict.fromkeys(node.input):
                self._taken[name].append(node)

    def maker(self, name: str) -> Any | None:
        """The node whose output a value is; None for initializers and the graph's inputs."""
        return self._made.get(name)

    def takers(self, name: str) -> list[Any]:
        """The nodes that have a value as an input."""
        return self._taken[name]

    def constant(self, name: str) -> Array | None:
        """A constant's values; None if the value is computed."""
        if name not in self._arrays and name in self._constants:
            self._arrays[name] = self._read(self._constants[name])
        return self._arrays.get(name)

    def floats(self) -> Iterator[tuple[str, Array]]:
        """Names and values of all float32 constants."""
        for name in list(self._constants):
            array = self.constant(name)
            if array is not None and array.dtype == np.float32:
                yield name, array

    def fresh(self, name: str) -> str:
        """An unused name, made of this one."""
        found, number = name, 1
        while found in self._names:
            found, number = f"{name}_{number}", number + 1
        self._names.add(found)
        return found

    def add_constant(self, name: str, array: Array) -> str:
        """Add an initializer; returns its name."""
        from onnx import numpy_helper

        return self.add_tensor(numpy_helper.from_array(np.ascontiguousarray(array), self.fresh(name)))

    def add_tensor(self, tensor: Any) -> str:
        """Add an initializer of an unused name; returns the name."""
        self._constants[tensor.name] = tensor
        self.graph.initializer.append(tensor)
        name: str = tensor.name
        return name

    def node(self, kind: str, inputs: Sequence[str], name: str, **attributes: Any) -> Any:
        """Make a node with one output of the same name, which is not in the graph yet."""
        from onnx import helper

        name = self.fresh(name)
        return helper.make_node(kind, list(inputs), [name], name=name, **attributes)

    def insert(self, nodes: Sequence[Any], *, before: Any | None = None, after: Any | None = None) -> None:
        """Insert nodes before or after another one; call `index` afterwards."""
        other = before if before is not None else after
        place = next(i for i, node in enumerate(self.nodes) if node is other) + (before is None)
        self.nodes[place:place] = nodes

    def rename(self, old: str, new: str, takers: Sequence[Any]) -> None:
        """Let these nodes take ``new`` where they took ``old``."""
        for node in takers:
            for i, name in enumerate(node.input):
                if name == old:
                    node.input[i] = new

    def attribute(self, node: Any, name: str, default: Any) -> Any:
        """An attribute's value."""
        from onnx import helper

        found = next((a for a in node.attribute if a.name == name), None)
        return default if found is None else helper.get_attribute_value(found)

    def _used(self, name: str) -> bool:
        return bool(self._taken[name]) or name in self.outputs

    def close(self) -> None:
        """Remove nodes and initializers that nothing uses, and write the graph back."""
        while True:
            self.index()
            alive = [node for node in self.nodes if any(map(self._used, node.output))]
            if len(alive) == len(self.nodes):
                break
            self.nodes = alive
        kept = [tensor for tensor in self.graph.initializer if self._used(tensor.name)]
        values = [entry for entry in self.graph.value_info if entry.name in self._made]
        for name, entries in (("node", self.nodes), ("initializer", kept), ("value_info", values)):
            # Copies, because clearing the field may free its entries.
            entries = [type(entry).FromString(entry.SerializeToString()) for entry in entries]
            self.graph.ClearField(name)
            getattr(self.graph, name).extend(entries)


def name_outputs(document: Any, names: Mapping[str, str]) -> None:
    """Rename a graph's outputs, in place; values inside that have such a name already get another.

    Args:
        document: the model.
        names: new names by old ones; all different, and none of them an input's.
    """
    graph = document.graph
    used = {value for node in _all_nodes(graph) for value in (*node.input, *node.output)}
    used |= {tensor.name for tensor in graph.initializer}
    changes = dict(names)
    for name in names.values():
        if name in used:
            number = 1
            while f"{name}_{number}" in used or f"{name}_{number}" in names.values():
                number += 1
            changes[name] = f"{name}_{number}"
            used.add(changes[name])
    for node in _all_nodes(graph):
        for values in (node.input, node.output):
            values[:] = [changes.get(value, value) for value in values]
    for entry in (*graph.initializer, *graph.value_info, *graph.output):
        entry.name = changes.get(entry.name, entry.name)


def _all_nodes(graph: Any) -> Iterator[Any]:
    """The nodes of a graph and of the graphs in their attributes."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs) if attribute.HasField("g") else attribute.graphs:
                yield from _all_nodes(inner)
