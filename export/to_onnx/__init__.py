"""The targets `onnx` and `ort`."""
