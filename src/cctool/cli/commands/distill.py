"""`cctool distill`."""

from __future__ import annotations

from cctool.cli.commands.train import resumed, told
from cctool.cli.frame import Invocation


def distill(call: Invocation) -> None:
    """Train a student on labels and on a teacher's outputs.

    The loss is alpha * T^2 * KL(softmax(teacher / T) || softmax(student / T)) + (1 - alpha) * cross-entropy.

    Example: cctool distill --arch mobilenet_student --data digits --teacher teacher.pt
    """
    call = resumed(call)
    call.write(told, resumes=bool(call.given.get("resume")))
