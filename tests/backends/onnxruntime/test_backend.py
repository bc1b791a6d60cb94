"""The ONNX Runtime target: the kit every backend passes, and what is special to this one."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from edgeqdm.backends.onnxruntime.backend import GRAPH, OnnxRuntimeBackend
from edgeqdm.emit.backend import Backend
from edgeqdm.errors import VerifyError
from edgeqdm.ir.model import LayerKind
from edgeqdm.ir.plan import DeploymentPlan, Phase
from edgeqdm.ir.precision import Precision
from edgeqdm.testing.conformance import BackendConformance, tiny_quantized


class TestOnnxRuntime(BackendConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def backend(cls) -> Backend:
        return OnnxRuntimeBackend()
