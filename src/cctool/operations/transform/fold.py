"""`cctool transform --fold`: batch norm, computed weights and parallel branches become plain layers.

fold on a copy, checked -> the network itself -> fold edits, thin edits written anew -> followers
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from cctool.base.errors import TransformError
from cctool.base.networks import some
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.edits.fold import with_folds
from cctool.checkpoint.spec import Metrics, Size
from cctool.data.records import DataSource
from cctool.operations.context import Context, Outcome, ShownTables
from cctool.operations.data import measured_splits, open_source
from cctool.operations.judge.size import measure
from cctool.operations.judge.task import judge_of
from cctool.operations.keep import events
from cctool.operations.keep.images import some_images, split_of
from cctool.options.transform.options import TransformOptions
from cctool.tasks.base import Measure
from cctool.transforms.fold.fold import Folding, fold_network
from cctool.transforms.fold.layers import Stays
from cctool.transforms.fold.probes import CONSTANTS, SCALES

_IMAGES = 64
# How far rounding alone moves a share, in points, and other metrics, of their size.
_TURNED, _MOVED = 0.5, 0.01

# What was fitted to the layers as they are, by the kind of its edit.
_FITTED = {
    "quantize": "quantizers, whose ranges and rounding are of the layers as they are: fold the float "
    "network, then quantize it",
    "tap": "coded feature maps, whose codecs are fitted to the layers as they are: fold first, then code",
}


@dataclass(frozen=True)
class FoldedLayer:
    """What became of one layer.

    Attributes:
        name: of the layer.
        folded: what is in it now, in words; names are without what they share with the layer's.
        modules: whole names of the modules that went into it.
        parameters_before: of the layer and of all modules that were folded into it.
        parameters_after: of the layer.
    """

    name: str
    folded: str
    modules: tuple[str, ...]
    parameters_before: int
    parameters_after: int


@dataclass(frozen=True)
class TransformFoldReport:
    """What folding did.

    Attributes:
        layers: that took something in.
        stays: what was not folded, and why.
        before: size of the input network.
        after: size of the folded one.
        error: largest difference of its outputs, of their range, on all inputs that were tried.
        double_error: the same if both compute in float64; None if the network does not run so.
        images: number of images of the data set among these inputs.
        decides: modules whose code decides by the values of its input: other inputs may fare otherwise.
        metrics_before: of the input network.
        metrics_after: of the folded one.
        notes: for the history.
    """

    layers: tuple[FoldedLayer, ...]
    stays: tuple[Stays, ...]
    before: Size
    after: Size
    error: float
    double_error: float | None
    images: int
    decides: tuple[str, ...]
    metrics_before: tuple[Metrics, ...]
    metrics_after: tuple[Metrics, ...]
    notes: tuple[str, ...]

    def tables(self) -> ShownTables:
        """A row for each layer, the sizes of the network, and what stays."""
        found: list[tuple[str, Sequence[str], Sequence[Sequence[object]]]] = []
        if self.layers:
            rows = [(x.name, x.folded, x.parameters_before, x.parameters_after) for x in self.layers]
            found.append(("folded", ("layer", "folded in", "parameters", "after"), rows))
        kinds = (("MACs", "macs"), ("parameters", "parameters"), ("bytes", "bytes"))
        sizes = [(title, getattr(self.before, name), getattr(self.after, name)) for title, name in kinds]
        found.append(("network", ("", "before", "after"), sizes))
        if self.stays:
            found.append(("stays", ("module", "because"), [(x.name, x.reason) for x in self.stays]))
        return found


def run(checkpoint: Checkpoint, options: TransformOptions, context: Context) -> Iterator[Outcome]:
    """Fold the network in place. Where nothing can be folded the product is the input, and a note says so.

    Raises:
        TransformError: if the network has quantizers or coded feature maps, or its outputs would change.
        ArchitectureError: if it does not run on its input shape.
    """
    for kind, why in _FITTED.items():
        if any(edit["kind"] == kind for edit in checkpoint.spec.edits):
            raise TransformError(f"--fold: the network has {why}")
    source = open_source(options.data, checkpoint, context)
    metrics_before = measured_splits(checkpoint, source, options.data, context)
    before = measure(events.stored(checkpoint, context.tables, settle=False))
    counts = {name: _parameters(module) for name, module in checkpoint.model.named_modules()}
    swaps = {str(edit["module"]) for edit in checkpoint.spec.edits if edit["kind"] == "swap"}
    images, split = _images(checkpoint, source, options, context)
    folding = fold_network(checkpoint.model, checkpoint.spec.input_shape, images)
    product, notes = _product(checkpoint, folding, split)
    product, followed = events.changed(product, source, options.data, context)
    stays = tuple(_told(item, swaps) for item in folding.stays)
    metrics_after = (
        measured_splits(product, source, options.data, context) if folding.edits else metrics_before
    )
    _refuse_change(judge_of(checkpoint, context).main, metrics_before, metrics_after)
    notes = (*notes, *followed)
    report = TransformFoldReport(
        layers=tuple(_layer(n, folding, counts, product.model) for n in counts if n in folding.layers),
        stays=stays,
        before=before,
        after=measure(product),
        error=folding.error,
        double_error=folding.double_error,
        images=folding.images,
        decides=folding.decides,
        metrics_before=metrics_before,
        metrics_after=metrics_after,
        notes=notes,
    )
    yield Outcome(product, report, metrics_before=metrics_before, metrics_after=metrics_after, notes=notes)


def _images(
    checkpoint: Checkpoint, source: DataSource | None, options: TransformOptions, context: Context
) -> tuple[list[Tensor], str]:
    """Batches of images that the fold is checked on, and the split that they are of."""
    if source is None or not source.loaders:
        return [], ""
    split = split_of(source)
    return list(some_images(checkpoint, source, split, _IMAGES, options.data, context)), split


def _refuse_change(main: Measure, before: Sequence[Metrics], after: Sequence[Metrics]) -> None:
    """Refuse a fold that a whole data set tells from the network, where what was compared did not.

    Raises:
        TransformError: naming the split and the figures.
    """
    earlier = {found.split: found for found in before}
    for found in after:
        old, new = earlier[found.split].values.get(main.name), found.values.get(main.name)
        if old is None or new is None:
            continue
        # Rounding turns a few decisions around, and moves other figures a little.
        rounding = max(_TURNED, 200 / max(found.n, 1)) if main.share else _MOVED * max(abs(old), abs(new))
        if abs(new - old) > rounding:
            raise TransformError(
                f"--fold: {found.split} {main.title} would go from {main.shown(old)} to {main.shown(new)}: "
                "the network's code decides by its input, and on some images takes another way than on "
                "those that were compared; nothing is written"
            )


def _product(checkpoint: Checkpoint, folding: Folding, split: str) -> tuple[Checkpoint, tuple[str, ...]]:
    """The checkpoint of the folded network, and notes."""
    if not folding.edits:
        earlier = any(edit["kind"] == "fold" for edit in checkpoint.spec.edits)
        if earlier:
            more = "all that can be is folded already"
        elif folding.stays:
            more = f"{some([item.name for item in folding.stays])} cannot be: each has its reason"
        else:
            more = "the network has no batch norm, computed weights or parallel branches"
        return checkpoint, (f"nothing was folded: {more}",)
    state = checkpoint.model.state_dict(keep_vars=True)
    changed = {id(checkpoint.model.get_parameter(name)) for name in folding.tensors}
    kept = {n: form for n, form in checkpoint.stored.items() if n in state and id(state[n]) not in changed}
    lost = sorted(checkpoint.stored.keys() - kept.keys())
    product = replace(
        checkpoint,
        spec=with_folds(checkpoint.spec, checkpoint.model, folding.edits),
        stored=kept,
        resume=None,
    )
    return product, tuple(_notes(checkpoint, folding, split, lost))


def _notes(checkpoint: Checkpoint, folding: Folding, split: str, lost: Sequence[str]) -> Iterator[str]:
    alone = "" if folding.noise is None else f" (rounding alone: {folding.noise:.1e})"
    exact = "" if folding.double_error is None else f", and by {folding.double_error:.1e} in float64"
    images = f", {folding.images} {split} images" if folding.images else ""
    scales, constants = (", ".join(f"{value:g}" for value in values) for values in (SCALES, CONSTANTS))
    yield (
        f"outputs differ by at most {folding.error:.1e} of their range{alone}{exact}, on random inputs "
        f"N(0, 1), these times {scales}, constants {constants}, other numbers and sizes{images}"
    )
    if folding.decides:
        modules = some([name or "the network" for name in folding.decides])
        others = "other images" if folding.images else "images, which --data gives,"
        yield (
            f"the code of {modules} decides by the values of its input: {others} may take another way than "
            "the inputs that were compared"
        )
    if not folding.norms_left and any(
        "batch norm" in text for log in folding.layers.values() for text in log.what
    ):
        yield (
            "no batch norm is left: `prune --method slimming` and --recalibrate have nothing to work with "
            "(--method l1 ranks filters), and training goes on without it"
        )
    if any("torch.nn.utils.prune" in log.what for log in folding.layers.values()):
        yield (
            "zeros of torch.nn.utils.prune are values now, which training may change: "
            "`prune --granularity element` sets masks that hold"
        )
    if lost:
        yield f"{some(lost)} had stored forms: what they decode to was folded, and is stored dense"
    if checkpoint.resume is not None:
        yield "the state of the optimizer belongs to the weights, and was dropped"


def _told(item: Stays, swaps: set[str]) -> Stays:
    """Layers of ours compute their weights, too, but by what the user asked for."""
    if item.name in swaps:
        return Stays(item.name, "its weight is made of transform coefficients or basis functions; fold first")
    return item


def _layer(name: str, folding: Folding, counts: dict[str, int], model: nn.Module) -> FoldedLayer:
    log = folding.layers[name]
    modules = tuple(dict.fromkeys(log.modules))
    before = counts.get(name, 0) + sum(counts.get(module, 0) for module in modules)
    return FoldedLayer(name, ", ".join(log.what), modules, before, _parameters(model.get_submodule(name)))


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
