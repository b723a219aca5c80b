"""Files for other programs: ONNX and plain state dicts."""
