"""One graph for several phases of the sampler.

    y = sample
    y = phase k if start[k] <= step < start[k + 1] else y, for every phase k

One `If` after another, and none inside another one: two levels down, ONNX Runtime (1.31.1) does not
pack weights of the outermost graph, and an integer convolution takes three times as long.

Weights stand in the outer graph, each once however many phases read it: a phase that shares all its
weights with another costs nothing but its nodes. Those of float convolutions, and their biases,
stand in every branch that reads them: only there does the runtime block them by channels, without
which `unet-fmnist` in float takes 1.27 times as long.

The rest has a price too. A branch is fed the outer weights; those that were packed come as empty
values, and then no buffers are planned ahead, as with `enable_mem_pattern` off: 0.1 to 0.2 us per
node, 4 to 9 % of the small reference models in W8A8.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SAMPLE, STEP = "sample", "step"


def merge_phases(models: Sequence[tuple[int, onnx.ModelProto]]) -> onnx.ModelProto:
    """Finished graphs of the phases, as one.

    Args:
        models: (first step, graph) of every phase, ascending from 0; all with the same inputs and
            one output.
    """
    (_, first), *later = models
    if not later:
        return first
    outer = _Outer()
    output, chosen = first.graph.output[0], SAMPLE
    stops = [*(start for start, _ in later), None]
    earlier = ""
    for p, ((_, model), stop) in enumerate(zip(models, stops, strict=True)):
        branch = outer.adopt(model.graph, f"p{p}/")
        here, earlier = outer.here(p, earlier, stop)
        found = output.name if stop is None else f"phase/{p}/output"
        outer.choose(p, here, branch, chosen, found)
        chosen = found
    merged = onnx.ModelProto()
    merged.CopyFrom(first)
    del merged.graph.node[:]
    del merged.graph.initializer[:]
    merged.graph.node.extend(outer.nodes)
    merged.graph.initializer.extend(outer.tensors.values())
    domains = {entry.domain: entry.version for _, model in models for entry in model.opset_import}
    del merged.opset_import[:]
    merged.opset_import.extend(helper.make_opsetid(d, v) for d, v in domains.items())
    return merged


class _Outer:
    """The graph around the phases: their weights by content, what widens them, and the forks."""

    def __init__(self) -> None:
        self.tensors: dict[str, TensorProto] = {}
        self.nodes: list[onnx.NodeProto] = []
        self._widened: dict[tuple[str, int], str] = {}

    def adopt(self, graph: onnx.GraphProto, prefix: str) -> onnx.GraphProto:
        """The phase as a branch, under names of its own, reading the outer tensors."""
        names = {value.name: value.name for value in graph.input}
        stored = {tensor.name for tensor in graph.initializer}
        floats = [n for n in graph.node if n.op_type == "Conv" and n.input[1] in stored]
        own = {name for node in floats for name in node.input[1:]}
        branch = onnx.GraphProto(name=f"{prefix}graph")
        for tensor in graph.initializer:
            if tensor.name in own:
                names[tensor.name] = prefix + tensor.name
                branch.initializer.add().CopyFrom(tensor)
                branch.initializer[-1].name = names[tensor.name]
            else:
                names[tensor.name] = self._share(tensor)
        nodes = []
        for node in graph.node:
            if node.op_type == "Cast" and names.get(node.input[0], "") in self.tensors:
                names[node.output[0]] = self._widen(node, names[node.input[0]])
            else:
                nodes.append(node)
        for node in nodes:
            names |= {name: prefix + name for name in node.output if name}
        for node in nodes:
            renamed = branch.node.add()
            renamed.CopyFrom(node)
            renamed.name = prefix + node.name
            renamed.input[:] = [names[name] if name else "" for name in node.input]
            renamed.output[:] = [names[name] if name else "" for name in node.output]
        branch.output.append(_as_output(graph.output[0], names[graph.output[0].name]))
        return branch

    def here(self, p: int, earlier: str, stop: int | None) -> tuple[str, str]:
        """Names of whether a step is of phase `p`, and of whether it is before the next one.

        Args:
            p: the phase.
            earlier: name of whether it is before this phase; empty for the first one.
            stop: first step of the next phase; None for the last one.
        """
        if stop is None:
            self._node("Not", [earlier], f"phase/{p}/here")
            return f"phase/{p}/here", ""
        bound = f"phase/{p}/stop"
        self.tensors[bound] = numpy_helper.from_array(np.array(stop, np.int64), bound)
        self._node("Less", [STEP, bound], f"phase/{p}/before")
        if not earlier:
            return f"phase/{p}/before", f"phase/{p}/before"
        self._node("Xor", [earlier, f"phase/{p}/before"], f"phase/{p}/here")
        return f"phase/{p}/here", f"phase/{p}/before"

    def choose(
        self, p: int, here: str, branch: onnx.GraphProto, otherwise: str, output: str
    ) -> None:
        """Run the branch where the step is of phase `p`, else keep what was there."""
        kept = onnx.GraphProto(name=f"phase/{p}/kept")
        kept.node.append(helper.make_node("Identity", [otherwise], [f"phase/{p}/keep"], kept.name))
        # Without a shape: the sample that the first one keeps can have other channels.
        kind = branch.output[0].type.tensor_type.elem_type
        kept.output.append(helper.make_tensor_value_info(f"phase/{p}/keep", kind, None))
        self._node("If", [here], output, then_branch=branch, else_branch=kept)

    def _node(self, kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> None:
        self.nodes.append(
            helper.make_node(kind, inputs, [output], f"{output}/{kind}", **attributes)
        )

    def _share(self, tensor: TensorProto) -> str:
        content = hashlib.sha256(f"{tensor.data_type} {list(tensor.dims)} ".encode())
        bare = TensorProto()
        bare.CopyFrom(tensor)
        bare.ClearField("name")
        content.update(bare.SerializeToString(deterministic=True))
        name = f"t/{content.hexdigest()[:20]}"
        if name not in self.tensors:
            bare.name = name
            self.tensors[name] = bare
        return name

    def _widen(self, cast: onnx.NodeProto, source: str) -> str:
        (kind,) = (attribute.i for attribute in cast.attribute if attribute.name == "to")
        if (source, kind) not in self._widened:
            wide = f"{source}/wide-{kind}"
            self._node("Cast", [source], wide, to=kind)
            self._widened[source, kind] = wide
        return self._widened[source, kind]


def _as_output(like: onnx.ValueInfoProto, name: str) -> onnx.ValueInfoProto:
    value = onnx.ValueInfoProto()
    value.CopyFrom(like)
    value.name = name
    return value


def branches(graph: onnx.GraphProto) -> list[onnx.GraphProto]:
    """Graphs inside the nodes of a graph, one level down."""
    return [
        attribute.g
        for node in graph.node
        for attribute in node.attribute
        if attribute.type == onnx.AttributeProto.GRAPH
    ]


def count_ops(graph: onnx.GraphProto, names: Sequence[str]) -> Mapping[str, int]:
    """Nodes of each operator, with those of the branch that has most of them: one branch runs."""
    found = dict.fromkeys(names, 0)
    for node in graph.node:
        if node.op_type in found:
            found[node.op_type] += 1
    counts = [count_ops(branch, names) for branch in branches(graph)]
    most = max(counts, key=lambda count: sum(count.values()), default={})
    return {name: number + most.get(name, 0) for name, number in found.items()}
