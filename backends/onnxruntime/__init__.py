"""ONNX Runtime on CPU: one ONNX graph with integer kernels and in-graph scale tables."""
