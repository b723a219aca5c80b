"""`cctool transform --mode basis`, and `--swap` of `cctool train`: layers whose weights are basis functions.

select -> basis layers -> trial run with complex numbers (dft) -> swap edits
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, replace

from torch import nn

from cctool.base.errors import TransformError, UsageError
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.spec import Metrics
from cctool.operations.context import Context, Outcome, ShownTables
from cctool.operations.data import measured_splits, open_source
from cctool.operations.judge.size import stored_bytes
from cctool.operations.keep import events
from cctool.operations.transform.weights_report import counted, layer_bytes
from cctool.options.transform.options import TransformOptions
from cctool.transforms.insert_basis import BASIS_KERNELS, put_basis
from cctool.transforms.layers.base import with_swaps
from cctool.transforms.layers.which import SelectedLayer, SkippedLayer, select_layers


@dataclass(frozen=True)
class BasisLayerReport:
    """What became of one layer.

    Attributes:
        name: of the layer; the first, if it is used under several.
        layer: its new class.
        shape: of its weight.
        parameters_before: number of the layer's parameters, with bias.
        parameters_after: likewise.
        bytes_before: of its weight as it was stored.
        bytes_after: of what the weight is computed from.
    """

    name: str
    layer: str
    shape: tuple[int, ...]
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class TransformBasisReport:
    """What one change to basis functions did.

    Attributes:
        kernel: family of the functions.
        layers: that were replaced.
        complex_modules: names of other modules that compute with complex numbers now.
        skipped: selected layers that were not replaced, and why.
        parameters_before: of the network.
        parameters_after: of the network.
        bytes_before: of all tensors of the input as stored.
        bytes_after: of all tensors of the product as stored.
        metrics_before: of the input network.
        metrics_after: of the network with fresh basis functions, before training.
        notes: for the history.
    """

    kernel: str
    layers: tuple[BasisLayerReport, ...]
    complex_modules: tuple[str, ...]
    skipped: tuple[SkippedLayer, ...]
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    metrics_before: tuple[Metrics, ...]
    metrics_after: tuple[Metrics, ...]
    notes: tuple[str, ...]

    def tables(self) -> ShownTables:
        """A row for each layer and one for the network."""
        columns = ("layer", "now", "shape", "parameters", "after", "bytes", "after")
        rows: list[tuple[object, ...]] = [
            (layer.name, layer.layer, "x".join(map(str, layer.shape)), *astuple(layer)[3:])
            for layer in self.layers
        ]
        sizes = (self.parameters_before, self.parameters_after, self.bytes_before, self.bytes_after)
        rows.append(("network", self.kernel, "", *sizes))
        return [("", columns, rows)]


def run(checkpoint: Checkpoint, options: TransformOptions, context: Context) -> Iterator[Outcome]:
    """Replace the selected layers of the network in place; their weights are lost.

    Raises:
        UsageError: if the kernel has no basis layers, or a pattern matches nothing.
        TransformError: if nothing can be replaced, or the network cannot compute with complex numbers.
    """
    kernel = basis_kernel(options.kernel, "--kernel")
    selected, skipped = _selected(checkpoint, options.weights.layers)
    source = open_source(options.data, checkpoint, context)
    before = measured_splits(checkpoint, source, options.data, context)
    # Sizes as in a file, before the layers are replaced in place.
    stored = events.stored(checkpoint, context.tables, settle=False)
    bytes_before, parameters_before = stored_bytes(stored), _parameters(checkpoint.model)
    layers_before = {
        item.names[0]: (layer_bytes(stored, item.names[0]), _parameters(item.layer)) for item in selected
    }
    product, complex_modules = _changed(
        checkpoint, selected, kernel, normalize_gradients=options.weights.normalize_gradients
    )
    product, followed = events.changed(product, source, options.data, context)
    after = measured_splits(product, source, options.data, context)
    context.reporter.warn(
        f"the weights of {len(selected)} layers are gone: fresh {kernel} basis functions took their place, "
        "and the network needs training (`cctool train`)"
    )
    notes = (*_notes(checkpoint, complex_modules), *counted(skipped), *followed)
    report = TransformBasisReport(
        kernel=kernel,
        layers=tuple(_layer_report(item, product, *layers_before[item.names[0]]) for item in selected),
        complex_modules=complex_modules,
        skipped=tuple(skipped),
        parameters_before=parameters_before,
        parameters_after=_parameters(product.model),
        bytes_before=bytes_before,
        bytes_after=stored_bytes(product),
        metrics_before=before,
        metrics_after=after,
        notes=notes,
    )
    yield Outcome(product, report, metrics_before=before, metrics_after=after, notes=notes)


def with_basis(checkpoint: Checkpoint, kernel: str, layers: Sequence[str], option: str) -> Checkpoint:
    """Replace layers of a fresh network in place by basis functions, for training from scratch.

    Args:
        checkpoint: of the fresh network.
        kernel: family of the functions.
        layers: kinds or patterns, as of ``--layers``.
        option: that the user gave, for error messages.

    Raises:
        UsageError: if the kernel has no basis layers, or a pattern matches nothing.
        TransformError: if a layer cannot be replaced, or the network cannot compute with complex numbers.
    """
    known = basis_kernel(kernel, option)
    selected, _ = _selected(checkpoint, layers)
    return _changed(checkpoint, selected, known, normalize_gradients=False)[0]


def basis_kernel(name: str, option: str) -> str:
    """The kernel if it has basis layers. Raises UsageError, which names those that have."""
    if name not in BASIS_KERNELS:
        raise UsageError(f"{option} {name}: basis functions are {', '.join(BASIS_KERNELS)}")
    return name


def _selected(
    checkpoint: Checkpoint, layers: Sequence[str]
) -> tuple[Sequence[SelectedLayer], Sequence[SkippedLayer]]:
    selected, skipped = select_layers(checkpoint.model, layers)
    if not selected:
        raise TransformError(f"nothing is left to replace: {'; '.join(counted(skipped))}")
    return selected, skipped


def _changed(
    checkpoint: Checkpoint, selected: Sequence[SelectedLayer], kernel: str, *, normalize_gradients: bool
) -> tuple[Checkpoint, tuple[str, ...]]:
    """The checkpoint of the changed network, and its other modules that compute with complex numbers now."""
    if kernel == "dft" and any(edit.get("kind") == "tap" for edit in checkpoint.spec.edits):
        raise TransformError(
            "codecs of feature maps do not take complex numbers: change layers first, then tap"
        )
    model = checkpoint.model
    swaps = put_basis(
        model, selected, kernel, checkpoint.spec.input_shape, normalize_gradients=normalize_gradients
    )
    spec = with_swaps(checkpoint.spec, model).with_edits(swaps)
    names = {name for item in selected for name in item.names}
    # Modules between complex layers are replaced, too.
    names |= {swap.module for swap in swaps}
    # Forms of replaced tensors are of values that are gone.
    stored = {name: form for name, form in checkpoint.stored.items() if name.rpartition(".")[0] not in names}
    product = events.masked(replace(checkpoint, spec=spec, stored=stored, resume=None))
    return product, tuple(swap.module for swap in swaps)


def _notes(checkpoint: Checkpoint, complex_modules: Sequence[str]) -> list[str]:
    notes = []
    if complex_modules:
        notes.append(
            f"{len(complex_modules)} modules between them compute with complex numbers now: "
            f"{', '.join(complex_modules[:3])}{' and more' if len(complex_modules) > 3 else ''}"
        )
    if checkpoint.resume is not None:
        notes.append("the state of the optimizer belongs to the weights, and was dropped")
    return notes


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _layer_report(
    item: SelectedLayer, product: Checkpoint, bytes_before: int, parameters: int
) -> BasisLayerReport:
    name = item.names[0]
    layer = product.model.get_submodule(name)
    return BasisLayerReport(
        name=name,
        layer=type(layer).__name__,
        shape=tuple(item.plain.weight.shape),
        parameters_before=parameters,
        parameters_after=_parameters(layer),
        bytes_before=bytes_before,
        bytes_after=layer_bytes(product, name),
    )
