"""Options of `train` and `distill` on what the network starts from."""

from __future__ import annotations

from dataclasses import dataclass

from cctool.options.fields import Options, section

_network = section("Which network")


@dataclass(frozen=True)
class StartOptions(Options):
    """Weights that others published, and a last layer for other classes."""

    # fmt: off
    pretrained: bool = _network(
        False, "Start a fresh torchvision: or timm: network from its library's published weights.")
    new_head: bool = _network(
        False, "Replace the last layer by a fresh one for the data set's classes (transfer learning).")
    # fmt: on
