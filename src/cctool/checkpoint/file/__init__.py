"""The files: `.pt` and `.safetensors`, their checksums, and how they are written."""
