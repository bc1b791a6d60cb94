"""Layers whose precision differs between phases, as forks of one graph.

    y = variant of the layer that the step uses

One `If` for every such layer, or for several that are fed the same tensor; what the phases have in
common is there once and runs as in a graph of one phase: packed once, its buffers planned ahead.
The step chooses by a table of booleans. Of what a fork costs, and why there is not one around all
that a phase computes, see `docs/decisions/0014-forks-around-layers.md`.

A branch holds the nodes that no one else needs. Large tensors stand outside, even those that only
one branch reads: the runtime keeps a second copy of what is in a branch. Two do not: weights of
float convolutions, which are blocked by channels only in their own graph, and what is read two
levels down, where ONNX Runtime (1.31.1) does not pack what stands outside and an integer
convolution takes three times as long.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir
from onnx import numpy_helper
from onnx_ir.passes import common as ir_passes

DOMAIN = "edgeqdm"
CHOOSE = "Choose"
OF_STEP = "of_step"
STEP = "step"
_SMALL_BYTES = 16384
"""A tensor up to here stands in every branch that reads it: no memory to speak of."""


def fork(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with every `edgeqdm.Choose` replaced by forks; without one, the graph itself."""
    if not any(is_choice(node) for node in model.graph.node):
        return model
    whole = onnx_ir.from_proto(model)
    _Forker(whole.graph).run()
    del whole.graph.opset_imports[DOMAIN]
    ir_passes.RemoveUnusedNodesPass()(whole)
    ir_passes.TopologicalSortPass()(whole)
    forked = onnx_ir.to_proto(whole)
    _drop_value_info(forked.graph)
    return forked


def _drop_value_info(graph: onnx.GraphProto) -> None:
    del graph.value_info[:]
    for branch in branches(graph):
        _drop_value_info(branch)


def is_choice(node: onnx.NodeProto | onnx_ir.Node) -> bool:
    return node.op_type == CHOOSE and node.domain == DOMAIN


@dataclass(frozen=True)
class _Choice:
    """Layers that are fed the same tensor and change their variant at the same steps."""

    nodes: tuple[onnx_ir.Node, ...]
    of_step: tuple[int, ...]

    def variants(self) -> list[int]:
        """That of most steps first: every one further down waits for one more decision."""
        found = range(len(self.nodes[0].inputs) - 2)
        return sorted(found, key=lambda variant: -self.of_step.count(variant))

    def outputs(self, variant: int) -> list[onnx_ir.Value]:
        return [_given(node.inputs[2 + variant]) for node in self.nodes]


def _given(value: onnx_ir.Value | None) -> onnx_ir.Value:
    assert value is not None
    return value


class _Forker:
    """Takes the nodes of every variant out of the graph and puts them into branches."""

    def __init__(self, graph: onnx_ir.Graph) -> None:
        self.graph = graph
        self.step = next(value for value in graph.inputs if value.name == STEP)
        self._conditions: dict[tuple[bool, ...], onnx_ir.Value] = {}
        self._names = itertools.count()

    def run(self) -> None:
        grouped: dict[tuple[onnx_ir.Value, tuple[int, ...]], list[onnx_ir.Node]] = {}
        for node in self.graph:
            if is_choice(node):
                key = (_given(node.inputs[0]), tuple(node.attributes[OF_STEP].as_ints()))
                grouped.setdefault(key, []).append(node)
        for (_, of_step), nodes in grouped.items():
            self._fork(_Choice(tuple(nodes), of_step))

    def _fork(self, choice: _Choice) -> None:
        variants = choice.variants()
        own = {v: self._exclusive(choice, v) for v in variants}
        # Of more than two, all but the first stand two levels down or deeper.
        deep = variants[1:] if len(variants) > 2 else []
        first, *others = [self._branch(choice, v, own[v], deep=v in deep) for v in variants]
        rest = others.pop()
        for v in reversed(variants[1:-1]):
            nested = self._if(choice, v, others.pop(), rest)
            rest = onnx_ir.Graph([], nested.outputs, nodes=[nested], name=self._name("later"))
        made = self._if(choice, variants[0], first, rest)
        self.graph.insert_before(choice.nodes[0], made)
        for node, output in zip(choice.nodes, made.outputs, strict=True):
            chosen = node.outputs[0]
            name, chosen.name = chosen.name, None
            output.name, output.type, output.shape = name, chosen.type, chosen.shape
            onnx_ir.convenience.replace_all_uses_with(chosen, output, replace_graph_outputs=True)
        self.graph.remove(list(choice.nodes), safe=True)

    def _exclusive(self, choice: _Choice, variant: int) -> list[onnx_ir.Node]:
        """Nodes that nothing but this variant needs, in order."""
        wanted, found = set(choice.nodes), set[onnx_ir.Node]()

        def is_ours(node: onnx_ir.Node, place: int) -> bool:
            return node in found or (node in wanted and place == 2 + variant)

        for node in reversed(self.graph):
            uses = [use for output in node.outputs for use in output.uses()]
            read_outside = any(output.is_graph_output() for output in node.outputs)
            if uses and not read_outside and all(is_ours(use.node, use.idx) for use in uses):
                found.add(node)
        return [node for node in self.graph if node in found]

    def _branch(
        self, choice: _Choice, variant: int, nodes: Sequence[onnx_ir.Node], *, deep: bool
    ) -> onnx_ir.Graph:
        outputs = choice.outputs(variant)
        for node in choice.nodes:
            node.replace_input_with(2 + variant, None)
        self.graph.remove(list(nodes))
        inside = {value for node in nodes for value in node.outputs}
        # What is computed outside, or comes as an input, must be handed on to be an output.
        passed = [value for value in dict.fromkeys(outputs) if value not in inside]
        handed = {value: onnx_ir.node("Identity", [value]) for value in passed}
        for each in handed.values():
            each.outputs[0].name = self._name("passed")
        results = [handed[v].outputs[0] if v in handed else v for v in outputs]
        nodes = [*nodes, *handed.values()]
        tensors = self._adopt(nodes, deep=deep)
        name = self._name("variant")
        return onnx_ir.Graph([], results, nodes=nodes, initializers=tensors, name=name)

    def _adopt(self, nodes: Sequence[onnx_ir.Node], *, deep: bool) -> list[onnx_ir.Value]:
        """Tensors that stand in the branch with its nodes."""
        mine, found = set(nodes), list[onnx_ir.Value]()
        for value in dict.fromkeys(value for node in nodes for value in node.inputs):
            if value is None or not value.is_initializer() or value.const_value is None:
                continue
            uses = [use for use in value.uses() if use.node in mine]
            blocked = any(use.node.op_type == "Conv" for use in uses)
            if not (deep or blocked or value.const_value.nbytes <= _SMALL_BYTES):
                continue
            if len(uses) == len(value.uses()):
                del self.graph.initializers[_named(value)]
                found.append(value)
                continue
            copy = onnx_ir.Value(
                name=self._name(_named(value)),
                type=value.type,
                shape=value.shape,
                const_value=value.const_value,
            )
            for use in uses:
                use.node.replace_input_with(use.idx, copy)
            found.append(copy)
        return found

    def _if(
        self, choice: _Choice, variant: int, first: onnx_ir.Graph, rest: onnx_ir.Graph
    ) -> onnx_ir.Node:
        made = onnx_ir.node(
            "If",
            [self._condition(tuple(each == variant for each in choice.of_step))],
            {"then_branch": first, "else_branch": rest},
            num_outputs=len(choice.nodes),
            name=self._name("fork"),
        )
        for output in made.outputs:
            output.name = self._name("chosen")
        return made

    def _condition(self, holds: tuple[bool, ...]) -> onnx_ir.Value:
        if holds not in self._conditions:
            name = self._name("steps")
            table = onnx_ir.tensor(np.array(holds), name=name)
            value = onnx_ir.Value(
                name=name,
                type=onnx_ir.TensorType(table.dtype),
                shape=onnx_ir.Shape([len(holds)]),
                const_value=table,
            )
            self.graph.register_initializer(value)
            gather = onnx_ir.node("Gather", [value, self.step], {"axis": 0}, name=f"{name}/here")
            gather.outputs[0].name = f"{name}/here"
            self.graph.insert_before(self.graph[0], gather)
            self._conditions[holds] = gather.outputs[0]
        return self._conditions[holds]

    def _name(self, what: str) -> str:
        return f"phase/{next(self._names)}/{what}"


def _named(value: onnx_ir.Value) -> str:
    assert value.name is not None
    return value.name


def branches(graph: onnx.GraphProto) -> list[onnx.GraphProto]:
    """Graphs inside the nodes of a graph, one level down."""
    return [
        attribute.g
        for node in graph.node
        for attribute in node.attribute
        if attribute.type == onnx.AttributeProto.GRAPH
    ]


def count_ops(graph: onnx.GraphProto, names: Sequence[str]) -> Mapping[str, int]:
    """Nodes of each operator that run at one step, the one at which most of them do."""
    return max(
        count_ops_by_step(graph, names).values(),
        key=lambda found: (sum(found.values()), *found.values()),
    )


def count_ops_by_step(graph: onnx.GraphProto, names: Sequence[str]) -> dict[int, dict[str, int]]:
    """Nodes of each operator that run, by the first step of every range in which the same do."""
    tables = _step_tables(graph)
    found: dict[int, dict[str, int]] = {}
    before = None
    for step, holds in enumerate(list(zip(*tables.values(), strict=True)) or [()]):
        if holds != before:
            found[step] = _count(graph, names, dict(zip(tables, holds, strict=True)))
        before = holds
    return found


def _step_tables(graph: onnx.GraphProto) -> dict[str, list[bool]]:
    """By name of a fork's condition: whether it holds, for every step."""
    asked = _conditions(graph)
    tensors = {t.name: t for t in graph.initializer if t.data_type == onnx.TensorProto.BOOL}
    return {
        node.output[0]: numpy_helper.to_array(tensors[node.input[0]]).tolist()
        for node in graph.node
        if node.op_type == "Gather" and node.input[0] in tensors and node.output[0] in asked
    }


def _conditions(graph: onnx.GraphProto) -> set[str]:
    here = {node.input[0] for node in graph.node if node.op_type == "If"}
    return here.union(*map(_conditions, branches(graph)))


def _count(
    graph: onnx.GraphProto, names: Sequence[str], holds: Mapping[str, bool]
) -> dict[str, int]:
    found = dict.fromkeys(names, 0)
    for node in graph.node:
        if node.op_type in found:
            found[node.op_type] += 1
        elif node.op_type == "If":
            for name, n in _count_branch(node, names, holds).items():
                found[name] += n
    return found


def _count_branch(
    node: onnx.NodeProto, names: Sequence[str], holds: Mapping[str, bool]
) -> dict[str, int]:
    """Of the branch that is taken; of the larger one where that is not for the step to say."""
    counts = {a.name: _count(a.g, names, holds) for a in node.attribute if a.HasField("g")}
    if node.input[0] not in holds:
        return max(counts.values(), key=lambda found: sum(found.values()))
    return counts["then_branch" if holds[node.input[0]] else "else_branch"]
