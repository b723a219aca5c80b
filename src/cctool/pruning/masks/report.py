"""Reports of masks: how many weights of a network they keep."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.conv import _ConvNd

from cctool.base.networks import qualified
from cctool.checkpoint.edits.mask import masks_of
from cctool.options.prune.choices import Granularity
from cctool.options.prune.options import PruneOptions
from cctool.options.prune.patterns import Pattern
from cctool.pruning.masks.granularity import as_filters, pattern_holds


@dataclass(frozen=True)
class TensorMask:
    """The mask of one tensor.

    Attributes:
        name: qualified name of the parameter.
        shape: its shape.
        kept: number of elements that its mask keeps; all without a mask.
        total: number of elements.
        note: why it got no mask, or whose rows it follows; otherwise "".
    """

    name: str
    shape: tuple[int, ...]
    kept: int
    total: int
    note: str


@dataclass(frozen=True)
class MaskReport:
    """What a masking did and did not do.

    Attributes:
        granularity: what was removed: elements, rows, ...
        tensors: every weight of two or more dimensions, and other masked tensors, in the order of the model.
        kept: number of elements that masks keep, of all weights of two or more dimensions.
        total: number of elements of those weights.
        sparsity_before: percent of those weights that were zero.
        sparsity_after: percent that are zero now.
        pattern: N:M, if that was asked for.
        pattern_holds: whether every masked weight has the pattern in each group; None without a pattern.
        notes: further remarks for the user.
    """

    granularity: str
    tensors: tuple[TensorMask, ...]
    kept: int
    total: int
    sparsity_before: float
    sparsity_after: float
    pattern: str | None = None
    pattern_holds: bool | None = None
    notes: tuple[str, ...] = ()


def weights_of(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, nn.Module]]:
    """Parameters of two or more dimensions with their names and modules; tied ones once."""
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter.dim() >= 2 and id(parameter) not in seen:
                seen.add(id(parameter))
                yield qualified(prefix, leaf), parameter, module


def is_maskable(module: nn.Module) -> bool:
    """Whether a module's weights of two or more dimensions are those of a convolution or linear layer."""
    return isinstance(module, (_ConvNd, nn.Linear, nn.MultiheadAttention))


def zero_percent(model: nn.Module) -> float:
    """Percent of weights of two or more dimensions that are zero."""
    zeros = total = 0
    for _, weight, _ in weights_of(model):
        zeros += weight.numel() - int(weight.detach().count_nonzero())
        total += weight.numel()
    return 100 * zeros / total if total else 0.0


def report_masks(
    model: nn.Module,
    options: PruneOptions,
    before: float,
    why: Mapping[str, str],
    notes: tuple[str, ...] = (),
) -> MaskReport:
    """Make the report of a masking.

    Args:
        model: after it.
        options: granularity and pattern.
        before: `zero_percent` before it.
        why: note on each tensor that has one, by name.
        notes: further remarks for the user.
    """
    # `weighty` has weights of two or more dimensions; masked biases and norms are listed, but not counted.
    masks, weighty = masks_of(model), {name for name, _, _ in weights_of(model)}
    tensors = tuple(
        TensorMask(
            name,
            tuple(parameter.shape),
            int(masks[name].sum()) if name in masks else parameter.numel(),
            parameter.numel(),
            why.get(name, ""),
        )
        for name, parameter in model.named_parameters()
        if name in masks or name in weighty
    )
    pattern = (options.pattern or Pattern()) if options.granularity is Granularity.NM else None
    return MaskReport(
        granularity=options.granularity.value,
        tensors=tensors,
        kept=sum(tensor.kept for tensor in tensors if tensor.name in weighty),
        total=sum(tensor.total for tensor in tensors if tensor.name in weighty),
        sparsity_before=before,
        sparsity_after=zero_percent(model),
        pattern=f"{pattern.keep}:{pattern.of}" if pattern else None,
        pattern_holds=_holds(model, pattern, why) if pattern else None,
        notes=notes,
    )


def _holds(model: nn.Module, pattern: Pattern, skipped: Mapping[str, str]) -> bool:
    return all(
        pattern_holds(as_filters(weight.detach(), module), pattern)
        for name, weight, module in weights_of(model)
        if name not in skipped and is_maskable(module)
    )
