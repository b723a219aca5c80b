"""The `quantize` edit: describes a network's quantizers, and restores them from a file."""

from __future__ import annotations

from torch import nn

from cctool.base.errors import CorruptCheckpointError, SpecError
from cctool.base.networks import qualified
from cctool.checkpoint.spec import ModelSpec
from cctool.checkpoint.tables import EditKind
from cctool.quantization.network.attach import CONTAINER, attach, held_by, quantizers_of
from cctool.quantization.network.calls import CallSite
from cctool.quantization.network.points import Quantize
from cctool.quantization.quantizers.base import Quantizer


def with_quantizers(spec: ModelSpec, model: nn.Module) -> ModelSpec:
    """The spec with the quantize edits of ``model`` in place of its former ones."""
    others = tuple(edit for edit in spec.edits if edit.get("kind") != "quantize")
    held = quantizers_of(model)
    if held is None:
        return spec.model_copy(update={"edits": others})
    state = held.state
    whole = Quantize(
        module="",
        fingerprint=state.fingerprint,
        images=state.images,
        observing=state.observing,
        method=state.method,
    )
    edits: dict[str, Quantize] = {"": whole}
    for name, weight in state.weights.items():
        owner, _, leaf = name.rpartition(".")
        edit = edits.get(owner, Quantize(module=owner))
        edits[owner] = edit.model_copy(update={"weights": edit.weights | {leaf: weight}})
    for place, call in state.calls.items():
        edit = edits.get(place.module, Quantize(module=place.module))
        edits[place.module] = edit.model_copy(update={"calls": edit.calls | {place.key: call}})
    return spec.model_copy(update={"edits": others}).with_edits(tuple(edits.values()))


def _apply(model: nn.Module, edit: Quantize) -> None:
    try:
        model.get_submodule(edit.module)
    except AttributeError:
        raise SpecError(f"quantize: the architecture has no module {edit.module!r}") from None
    weights = {qualified(edit.module, leaf): weight for leaf, weight in edit.weights.items()}
    for name, weight in weights.items():
        if weight.norm is not None and weight.norm not in dict(model.named_modules()):
            raise SpecError(f"quantize: {name}: the architecture has no module {weight.norm!r}")
    calls = {_place(edit.module, key): call for key, call in edit.calls.items()}
    held = attach(model, weights, calls)
    if not edit.module:
        held.state.fingerprint, held.state.images = edit.fingerprint, edit.images
        held.state.observing, held.state.method = edit.observing, edit.method


def _place(module: str, key: str) -> CallSite:
    function, _, number = key.rpartition("#")
    if not (number.isdecimal() and len(number) < 10 and function.isidentifier()):
        raise SpecError(f"quantize: {module or 'the model'} has no call {key!r}")
    return CallSite(module, function, int(number))


def _check(model: nn.Module, edit: Quantize) -> None:
    held = held_by(model)
    for leaf, weight in edit.weights.items():
        name = qualified(edit.module, leaf)
        tensor = dict(model.named_parameters(remove_duplicate=False)).get(name)
        axis = weight.config.axis
        if tensor is not None and axis is not None:
            size = tensor.shape[axis] if axis < tensor.dim() else None
            if size != weight.channels:
                raise CorruptCheckpointError(
                    f"{name} has {size} channels, its quantizer {weight.channels} scales"
                )
    if not edit.module:
        for key, quantizer in held.named():
            _check_state(key, quantizer)


def _check_state(key: str, quantizer: Quantizer) -> None:
    try:
        quantizer.check()
    except CorruptCheckpointError as error:
        raise CorruptCheckpointError(f"{CONTAINER}.{key}: {error}") from None


# After swapped layers and masks, which determine the tensors that are quantized.
QUANTIZE = EditKind(record=Quantize, apply=_apply, order=15, check=_check)
