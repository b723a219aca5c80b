"""An ONNX file as a module, to be measured like any other network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cctool.base.errors import ArchitectureError, CheckpointError
from cctool.formats.converting import reason
from cctool.formats.onnx.kernels import session_options

_TYPES = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16, "tensor(double)": torch.float64}


class OnnxNetwork(nn.Module):
    """A network without parameters that onnxruntime runs, on the CPU.

    It returns the file's output, or, if there are several, a dict of them by name.

    Args:
        path: the file.
        input_shape: (C, H, W) of the images that it will get.

    Raises:
        CheckpointError: if onnxruntime cannot load it.
        ArchitectureError: if it does not take such images.
    """

    def __init__(self, path: Path, input_shape: tuple[int, ...]) -> None:
        super().__init__()
        import onnxruntime

        if not path.is_file():
            raise CheckpointError(f"{path}: no such file")
        options = session_options(precise=False)
        # As many as torch takes, so that times compare.
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            self._session = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        # onnxruntime's exceptions have no common base class.
        except Exception as error:
            raise CheckpointError(f"onnxruntime cannot load {path}: {reason(error)}") from error
        self._path = path
        self._input = self._the_input(input_shape)
        self._dtype = _TYPES[self._input.type]
        self._names = [output.name for output in self._session.get_outputs()]

    def _the_input(self, input_shape: tuple[int, ...]) -> Any:
        inputs = self._session.get_inputs()
        if len(inputs) != 1:
            names = ", ".join(found.name for found in inputs)
            raise ArchitectureError(f"{self._path} has {len(inputs)} inputs ({names}): one is expected")
        found = inputs[0]
        fixed = len(found.shape) == 4 and all(
            size == wanted
            for size, wanted in zip(found.shape[1:], input_shape, strict=True)
            if isinstance(size, int)
        )
        if not fixed or found.type not in _TYPES:
            taken = "x".join(map(str, found.shape))
            raise ArchitectureError(
                f"{self._path} takes {found.type} of shape {taken}, not images of "
                f"{'x'.join(map(str, input_shape))}"
            )
        return found

    def forward(self, images: Tensor) -> Tensor | dict[str, Tensor]:
        """Outputs in float32 for images (N, C, H, W), on the images' device."""
        size = self._input.shape[0]
        # A file of a fixed batch size takes no other.
        parts = torch.split(images, size) if isinstance(size, int) else (images,)
        runs = [self._run(part) for part in parts]
        joined = [torch.cat(pieces).to(images.device) for pieces in zip(*runs, strict=True)]
        return joined[0] if len(joined) == 1 else dict(zip(self._names, joined, strict=True))

    def _run(self, images: Tensor) -> list[Tensor]:
        batch = images.detach().to("cpu", self._dtype).numpy()
        try:
            found = self._session.run(None, {self._input.name: batch})
        except Exception as error:
            raise ArchitectureError(
                f"onnxruntime cannot run {self._path} on a batch of {len(batch)}: {reason(error)}"
            ) from error
        tensors = map(torch.from_numpy, found)
        return [found.float() if found.is_floating_point() else found for found in tensors]
