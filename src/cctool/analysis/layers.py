"""The layer table: shapes, parameters, operations, zeros and bytes, one row per layer.

A row is a module that holds tensors or computes something itself; operations of a parent between its children
(a residual addition) are in the parent's row. Rows are in the order of their first call. Modules of which the
pass touched no tensor (auxiliary heads) come last, with no calls. Quantizers have no rows: their tensors are
counted for the layer whose weight or call they quantize.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from torch import Tensor, nn

from cctool.analysis.precision import BitWidths, owners_of_quantizers, precisions
from cctool.analysis.sparsity import weights
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.edits.mask import masks_of
from cctool.graph.cost import CountedCall, ModelCost
from cctool.graph.trace import Call, Shape
from cctool.transforms.plain import type_of

ROOT = "(network)"
"""Name of the row of the outermost module."""


@dataclass(frozen=True)
class Totals:
    """Counts that add up over layers. Operations are for one input; see `cctool.graph.cost_rules.Cost`.

    Attributes:
        parameters: elements of all parameters; tied ones are counted once, where they are first registered.
        weights: of these, elements of weights as `cctool.analysis.sparsity` defines them.
        zeros: weights that are zero.
        macs: multiply-accumulates of convolutions and linear layers.
        effective_macs: the same times the share of non-zero weights: the work of a perfect sparse kernel.
        matmul_macs: multiply-accumulates between activations.
        norm_ops: elements normalised.
        activation_ops: elements put through a nonlinearity.
        pooling_ops: elements read by poolings, reductions and resampling.
        elementwise_ops: elements of other arithmetic.
        bytes: of the tensors as the file stores them, tied ones once.
        nonfinite: elements that are NaN or infinite.
        masked: elements of all parameters that a mask holds at zero.
    """

    parameters: int = 0
    weights: int = 0
    zeros: int = 0
    macs: int = 0
    effective_macs: int = 0
    matmul_macs: int = 0
    norm_ops: int = 0
    activation_ops: int = 0
    pooling_ops: int = 0
    elementwise_ops: int = 0
    bytes: int = 0
    nonfinite: int = 0
    masked: int = 0

    @property
    def sparsity(self) -> float | None:
        """Percent of weights that are zero; None if there are no weights."""
        return 100 * self.zeros / self.weights if self.weights else None

    def __add__(self, other: Totals) -> Totals:
        return Totals(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True)
class LayerRow:
    """One module.

    Attributes:
        name: qualified name, `(network)` for the outermost module.
        type: class name; for layers of coefficients that of the ordinary layer, and what it is made of.
        attributes: kernel, stride, padding, dilation and groups, if they apply.
        calls: number of counted functions that it called.
        input_shape: of its first input activation, including a batch of one; None if it never ran.
        output_shape: of its last output.
        sums: counts that add up.
        sparsity: percent of its weights that are zero; None without weights.
        precision: bits of its weights, inputs and outputs.
    """

    name: str
    type: str
    attributes: str
    calls: int
    input_shape: Shape | None
    output_shape: Shape | None
    sums: Totals
    sparsity: float | None
    precision: BitWidths = field(default_factory=BitWidths)


@dataclass(frozen=True)
class LayerTable:
    """All layers of a network.

    Attributes:
        layers: the rows.
        totals: their sum.
        uncounted: number of calls of each function without a counting rule.
        unused: layers with parameters that the pass never touched.
        masked: layers with parameters that have a mask.
    """

    layers: tuple[LayerRow, ...]
    totals: Totals
    uncounted: Mapping[str, int] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    masked: tuple[str, ...] = ()


def tabulate(checkpoint: Checkpoint, cost: ModelCost) -> LayerTable:
    """Join the counts of a traced pass with the tensors of a checkpoint.

    Args:
        checkpoint: the model and how its tensors are stored.
        cost: counts for one input, of the same model or of the one with ordinary layers made of it.
    """
    model = checkpoint.model
    called = cost.by_module()
    owners = owners_of_quantizers(model)
    tensors = _tensor_sums(checkpoint, owners)
    bits = precisions(checkpoint)
    density = _densities(model)
    modules = dict(model.named_modules())
    names = [*called, *(name for name in modules if name in tensors and name not in called)]
    rows = [
        _row(name, modules[name], called.get(name, ()), tensors.get(name, Totals()), density, bits)
        for name in names
        if any(call.cost for call in called.get(name, ())) or name in tensors
    ]
    owned = {name.rpartition(".")[0] for name, _ in model.named_parameters()} - owners.keys()
    masked = dict.fromkeys(name.rpartition(".")[0] or ROOT for name in masks_of(model))
    touched = {name.rpartition(".")[0] for name in cost.touched}
    return LayerTable(
        layers=tuple(rows),
        totals=sum((row.sums for row in rows), Totals()),
        uncounted=dict(cost.uncounted),
        unused=tuple(row.name for row in rows if row.name in owned - touched and not row.calls),
        masked=tuple(masked),
    )


def _row(
    name: str,
    module: nn.Module,
    calls: tuple[CountedCall, ...],
    held: Totals,
    density: Mapping[str, float],
    bits: Mapping[str, BitWidths],
) -> LayerRow:
    sums = held
    for counted in calls:
        cost = counted.cost
        sums += Totals(**vars(cost), effective_macs=round(cost.macs * _density(counted, name, density)))
    # A module may call several functions: the settings shown are those of its convolution or linear layer.
    described = next((c.call for c in calls if c.cost.macs), calls[0].call if calls else None)
    return LayerRow(
        name=name or ROOT,
        type=type_of(module),
        attributes=_settings(described) if described else "",
        calls=len(calls),
        input_shape=_activation_shape(calls[0].call) if calls else None,
        output_shape=calls[-1].call.output_shapes[0] if calls else None,
        sums=sums,
        sparsity=sums.sparsity,
        precision=bits.get(name, BitWidths()),
    )


def _density(counted: CountedCall, module: str, density: Mapping[str, float]) -> float:
    # A weight that was computed (quantized, masked) on its way has no name; the module's own stands for it.
    fallback = f"{module}.weight" if module else "weight"
    return density.get(counted.weight or fallback, 1.0)


def _densities(model: nn.Module) -> dict[str, float]:
    return {
        name: int((value != 0).sum()) / value.numel()
        for name, value in model.named_parameters()
        if value.numel()
    }


def _activation_shape(call: Call) -> Shape | None:
    unnamed = (shape for shape, name in zip(call.input_shapes, call.tensor_names, strict=True) if not name)
    return next(unnamed, None)


def _tensor_sums(checkpoint: Checkpoint, owners: Mapping[str, str]) -> dict[str, Totals]:
    """Parameters, zeros, bytes and non-finite elements of each module's own tensors."""
    model = checkpoint.model
    counted = {name for name, _ in model.named_parameters()}
    weighty = {name for name, _, _ in weights(model)}
    masks = masks_of(model)
    sums: dict[str, Totals] = {}
    seen: set[int] = set()
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            continue
        size = _stored_bytes(checkpoint, name, value, seen)
        found = Totals(
            parameters=value.numel() if name in counted else 0,
            weights=value.numel() if name in weighty else 0,
            zeros=int((value == 0).sum()) if name in weighty else 0,
            bytes=size,
            # A tied tensor has no bytes at its second name, and its faults were counted at the first.
            nonfinite=int((~value.isfinite()).sum()) if size and value.is_floating_point() else 0,
            masked=int((~masks[name]).sum()) if name in masks else 0,
        )
        owner = name.rpartition(".")[0]
        owner = owners.get(owner, owner)
        sums[owner] = sums.get(owner, Totals()) + found
    return sums


def _stored_bytes(checkpoint: Checkpoint, name: str, value: Tensor, seen: set[int]) -> int:
    encoded = checkpoint.stored.get(name)
    total = 0
    for piece in [value] if encoded is None else encoded.parts.values():
        place = value.data_ptr() if encoded is None else id(piece)
        # Tied tensors share memory in the model, and parts in what is stored.
        if piece.numel() and place not in seen:
            seen.add(place)
            total += piece.numel() * piece.element_size()
    return total


def _settings(call: Call) -> str:
    """Kernel, stride, padding, dilation, groups: `k=3x3, s=2, p=1, g=32`."""
    given, function = call.attributes, call.function
    if function.startswith("conv"):
        parts = {"k": call.input_shapes[1][2:], "s": given.get("stride", 1), "p": given.get("padding", 0)}
        if _text(given.get("dilation", 1)) != "1":
            parts["d"] = given["dilation"]
        parts["g"] = given.get("groups", 1)
    elif function.startswith("adaptive_"):
        parts = {"out": given.get("output_size")}
    elif "_pool" in function:
        kernel = given.get("kernel_size")
        parts = {"k": kernel, "s": given.get("stride") or kernel, "p": given.get("padding", 0)}
    elif function == "scaled_dot_product_attention":
        parts = {"heads": call.input_shapes[0][-3] if len(call.input_shapes[0]) > 3 else 1}
    elif function == "group_norm":
        parts = {"g": given.get("num_groups")}
    else:
        return ""
    return ", ".join(f"{key}={_text(value)}" for key, value in parts.items())


def _text(value: object) -> str:
    """`(3, 3)` -> `3`, `(3, 5)` -> `3x5`."""
    if not isinstance(value, (tuple, list)):
        return str(value)
    distinct = list(dict.fromkeys(value))
    return str(distinct[0]) if len(distinct) == 1 else "x".join(map(str, value))
