"""All export formats."""

from __future__ import annotations

from cctool.formats.onnx.write import write_onnx
from cctool.formats.pt2 import write_pt2
from cctool.formats.records import Writer
from cctool.formats.state_dict import write_safetensors, write_state_dict
from cctool.options.inspect.export import ExportFormat

FORMATS: dict[ExportFormat, Writer] = {
    ExportFormat.ONNX: write_onnx,
    ExportFormat.STATE_DICT: write_state_dict,
    ExportFormat.SAFETENSORS: write_safetensors,
    ExportFormat.PT2: write_pt2,
}
"""What writes and verifies each format."""
