"""What a package for ONNX Runtime may look like.

`standard`: one graph, weights on integers, scales gathered by the step.
`small`: the same with the floats that are left stored in 16 bits.
`ort`: the same graph in the runtime's own format, for builds that hold nothing but its operators.
`npu`: constant scales in Q/DQ pairs and standard operators, one graph per phase.
"""

from __future__ import annotations

from pathlib import Path

from edgeqdm.emit.backend import STANDARD
from edgeqdm.errors import VerifyError

SMALL = "small"
ORT = "ort"
NPU = "npu"
FORMS = (STANDARD, SMALL, ORT, NPU)

GRAPH = "model.onnx"
ORT_GRAPH = "model.ort"
STEP_GRAPH = "model.step{}.onnx"
"""The graph from this step on, up to that of the next phase."""


def graph_files(package: Path, form: str) -> dict[int, Path]:
    """The graphs of a package, by the first step that each serves, in order.

    Raises:
        VerifyError: EQ-8301, where the first is missing.
    """
    if form != NPU:
        return {0: package / (ORT_GRAPH if form == ORT else GRAPH)}
    before, after = STEP_GRAPH.split("{}")
    numbers = [path.name[len(before) : -len(after)] for path in package.glob(f"{before}*{after}")]
    starts = sorted(int(number) for number in numbers if number.isdecimal())
    if not starts or starts[0] != 0:
        first = package / STEP_GRAPH.format(0)
        raise VerifyError("EQ-8301", "no graph for the first step", path=first)
    return {start: package / STEP_GRAPH.format(start) for start in starts}
