"""The processes that train one network together, through Lightning Fabric."""

from __future__ import annotations

import logging
import warnings
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from cctool.base.errors import DeviceError
from cctool.options.common import Precision

if TYPE_CHECKING:
    from lightning_fabric import Fabric


_PRECISIONS: dict[Precision, Literal["32-true", "bf16-mixed", "16-mixed"]] = {
    Precision.FULL: "32-true",
    Precision.BF16: "bf16-mixed",
    Precision.FP16: "16-mixed",
}


class Group:
    """Combines values of all processes; this class is for a single process."""

    def sum(self, values: Tensor) -> Tensor:
        """Sum over all processes, element by element."""
        return values

    def concatenate(self, values: Tensor) -> Tensor:
        """Concatenate the rows of all processes, which may have different numbers of them."""
        return values


class Together(Group):
    """The processes of a Fabric."""

    def __init__(self, fabric: Fabric) -> None:
        self._fabric = fabric

    def sum(self, values: Tensor) -> Tensor:
        """Sum over all processes, element by element."""
        total = values.to(self._fabric.device, copy=True)
        torch.distributed.all_reduce(total)
        return total

    def concatenate(self, values: Tensor) -> Tensor:
        """Concatenate the rows of all processes, which may have different numbers of them."""
        # all_gather needs equal shapes: everyone pads to the longest, and the padding is cut off again.
        counts = self.stack(torch.tensor(values.shape[0]))
        padded = values.new_zeros((int(counts.max()), *values.shape[1:]))
        padded[: values.shape[0]] = values
        gathered = self.stack(padded)
        return torch.cat([part[: int(count)] for part, count in zip(gathered, counts, strict=True)])

    def stack(self, values: Tensor) -> Tensor:
        """Stack equally shaped tensors of all processes in a new first dimension, on the CPU."""
        mine = values.to(self._fabric.device).contiguous()
        gathered = [torch.empty_like(mine) for _ in range(self._fabric.world_size)]
        torch.distributed.all_gather(gathered, mine)
        return torch.stack(gathered).cpu()


def group_of(fabric: Fabric) -> Group:
    """The group of the processes of ``fabric``."""
    return Together(fabric) if fabric.world_size > 1 else Group()


def make_fabric(
    device: torch.device, precision: Precision = Precision.FULL, *, devices: int = 1, nodes: int = 1
) -> Fabric:
    """Set up this process for training.

    With more than one process in total, each has been started already and finds its place in the environment
    (``RANK``, ``LOCAL_RANK``, ``WORLD_SIZE``, ``MASTER_ADDR``, ``MASTER_PORT``).

    Args:
        device: this process's device; of several CUDA devices, each process takes that of its local rank.
        precision: arithmetic of forward and backward passes.
        devices: number of processes on this machine.
        nodes: number of machines.

    Raises:
        DeviceError: if the device cannot compute in this precision.
    """
    if precision is Precision.FP16 and device.type != "cuda":
        raise DeviceError("--precision 16 trains on CUDA devices only; --precision bf16 works here")
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
    from lightning_fabric.strategies.ddp import DDPStrategy

    talk = logging.getLogger("lightning_fabric.utilities.rank_zero")
    level = talk.level
    # Fabric logs the precision, which the user has just asked for.
    talk.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*srun.*command is available")
            chosen: list[int] | int = devices
            several: dict[str, Any] = {}
            if devices * nodes > 1:
                strategy, plugins = DDPStrategy(find_unused_parameters=True), [TorchElasticEnvironment()]
                several = {"num_nodes": nodes, "strategy": strategy, "plugins": plugins}
            elif device.type == "cuda":
                chosen = [device.index or 0]
            fabric = Fabric(
                accelerator=device.type, devices=chosen, precision=_PRECISIONS[precision], **several
            )
            fabric.launch()
    finally:
        talk.setLevel(level)
    return fabric
