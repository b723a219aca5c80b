"""ONNX files: written, edited into integers, and checked."""
