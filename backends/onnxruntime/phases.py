"""One graph for several phases of the sampler.

    step < start[1] ? phase 0 : (step < start[2] ? phase 1 : ...)

Weights stand in the outer graph, each once however many phases read it: the runtime packs them
once, and a phase that shares all its weights with another costs nothing but its nodes. Those of
float convolutions, and their biases, stand in every branch that reads them: only there does ONNX
Runtime (1.31.1) block them by channels, without which `unet-fmnist` in float takes 1.27 times as
long.

The rest has a price too. A branch is fed the outer weights; those that were packed come as empty
values, and then no buffers are planned ahead, as with `enable_mem_pattern` off: about 0.1 us per
node, 3 to 9 % of the small reference models in W8A8.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

STEP = "step"


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
    branches = [outer.adopt(model.graph, f"p{p}/") for p, (_, model) in enumerate(models)]
    output = first.graph.output[0]
    body, last = branches[-1], _as_output(output, branches[-1].output[0].name)
    for start, branch in reversed(
        [(start, branch) for (start, _), branch in zip(later, branches[:-1], strict=True)]
    ):
        body = _choose(start, branch, body, last)
        last = body.output[0]
    outer.nodes += body.node
    merged = onnx.ModelProto()
    merged.CopyFrom(first)
    del merged.graph.node[:]
    del merged.graph.initializer[:]
    merged.graph.node.extend(outer.nodes)
    merged.graph.initializer.extend([*outer.tensors.values(), *body.initializer])
    merged.graph.output[0].CopyFrom(_as_output(output, body.output[0].name))
    _rename_output(merged.graph, output.name)
    domains = {entry.domain: entry.version for _, model in models for entry in model.opset_import}
    del merged.opset_import[:]
    merged.opset_import.extend(helper.make_opsetid(d, v) for d, v in domains.items())
    return merged


class _Outer:
    """What all phases share: weights by content, and the nodes that widen them."""

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
            self.nodes.append(helper.make_node("Cast", [source], [wide], wide, to=kind))
            self._widened[source, kind] = wide
        return self._widened[source, kind]


def _as_output(like: onnx.ValueInfoProto, name: str) -> onnx.ValueInfoProto:
    value = onnx.ValueInfoProto()
    value.CopyFrom(like)
    value.name = name
    return value


def _choose(
    start: int, before: onnx.GraphProto, after: onnx.GraphProto, output: onnx.ValueInfoProto
) -> onnx.GraphProto:
    """A graph that runs `before` at steps below `start`, `after` from there on."""
    bound = numpy_helper.from_array(np.array(start, np.int64), f"phase/{start}")
    early, chosen = f"phase/{start}/early", f"phase/{start}/output"
    graph = onnx.GraphProto(name=f"phase/{start}")
    graph.node.append(helper.make_node("Less", [STEP, bound.name], [early], f"phase/{start}/less"))
    graph.node.append(
        helper.make_node(
            "If", [early], [chosen], f"phase/{start}/if", then_branch=before, else_branch=after
        )
    )
    graph.initializer.append(bound)
    graph.output.append(_as_output(output, chosen))
    return graph


def _rename_output(graph: onnx.GraphProto, name: str) -> None:
    """The graph's output under the name that graphs of one phase give it."""
    old = graph.output[0].name
    for node in graph.node:
        node.output[:] = [name if each == old else each for each in node.output]
    graph.output[0].name = name


def count_ops(graph: onnx.GraphProto, names: Sequence[str]) -> Mapping[str, int]:
    """Nodes of each operator, of the branch with most of them where the graph forks."""
    found = dict.fromkeys(names, 0)
    for node in graph.node:
        if node.op_type in found:
            found[node.op_type] += 1
        branches = [a.g for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
        counts = [count_ops(branch, names) for branch in branches]
        most = max(counts, key=lambda count: sum(count.values()), default={})
        for name, number in most.items():
            found[name] += number
    return found
