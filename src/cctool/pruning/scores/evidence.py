"""Evidence: gradients and activations on training images, as criteria need them.

The network runs in evaluation mode: batch norm uses its running statistics and dropout is off, so images do
not influence each other, and nothing depends on the batch size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cctool.base.errors import DataError, PruningError
from cctool.base.networks import in_mode
from cctool.data.serving.batches import Batch
from cctool.graph.execution import execute
from cctool.options.prune.choices import PruneMethod
from cctool.pruning.scores.arrivals import ArrivalObserver, Key, Read, ReadApart

LossFn = Callable[..., Tensor]
"""(outputs of the network, targets) -> mean loss of the batch, a scalar; gets ``inputs`` if it takes them."""

_PIXELS = 1 << 20
"""Pixels (without channels) that are processed together: 20 images of 224 x 224."""
GRADIENTS = frozenset({PruneMethod.TAYLOR, PruneMethod.HESSIAN, PruneMethod.GRADIENT})
"""Methods that need a loss."""


@dataclass(frozen=True)
class Evidence:
    """What was gathered on training images for one method; fields that it does not need are empty.

    Attributes:
        method: the method.
        images: number of images.
        gradients: mean over the images of the loss's gradient, by the parameter's name; of the parameter's
            shape and device. For taylor and gradient.
        squares: mean over the images of the squared gradient of one image's loss, the diagonal of the
            empirical Fisher matrix; of the parameter's shape and device. For hessian.
        contributions: sum of g * w over the weights that read a channel, g of one image's loss, by weight
            and dim; shape [images, indices of the dim], on the CPU. For taylor.
        activations: mean magnitude of a layer's inputs, by weight and dim that read them; shape [indices of
            the dim], on the CPU. For activation.
        zeros: share of zeros in a layer's inputs, in [0, 1]; keys and shapes likewise. For apoz.
    """

    method: PruneMethod
    images: int
    gradients: Mapping[str, Tensor] = field(default_factory=dict)
    squares: Mapping[str, Tensor] = field(default_factory=dict)
    contributions: Mapping[Key, Tensor] = field(default_factory=dict)
    activations: Mapping[Key, Tensor] = field(default_factory=dict)
    zeros: Mapping[Key, Tensor] = field(default_factory=dict)


def gather(
    model: nn.Module,
    batches: Iterable[Batch],
    samples: int,
    method: PruneMethod,
    *,
    loss: LossFn | None = None,
) -> Evidence:
    """Gather evidence on images, with the network in evaluation mode.

    Args:
        model: on the device of the batches; flags, gradients, buffers and the random state are restored.
        batches: un-augmented training images [N, C, H, W], normalised; with labels if there is a loss.
        samples: number of images, at least 1; all of them if there are fewer.
        method: one that needs data; it decides what is gathered.
        loss: to take gradients of; needed for taylor, hessian and gradient.

    Raises:
        DataError: there are no images, or no labels for a loss.
        PruningError: the loss is not finite, or no gradient reaches any parameter.
    """
    taken = _first(batches, samples)
    with _kept(model):
        if method not in GRADIENTS:
            return _activations(model, taken, method)
        if loss is None:
            raise PruningError(f"method {method.value} needs a loss")
        with _differentiable(model) as parameters:
            if method is PruneMethod.HESSIAN:
                return _mean_squares(model, parameters, taken, loss)
            if method is PruneMethod.TAYLOR:
                return _contributions(model, parameters, taken, loss)
            return _mean_gradients(model, parameters, taken, loss)


def _first(batches: Iterable[Batch], samples: int) -> Iterator[Batch]:
    """The first `samples` images, or all if there are fewer, in pieces whose activations fit in memory."""
    used = 0
    for batch in batches:
        stop = min(samples - used, len(batch.images))
        # The memory that activations take grows with the number of pixels.
        size = max(1, _PIXELS // max(1, batch.images[0, 0].numel())) if stop else 1
        for start in range(0, stop, size):
            yield _part(batch, slice(start, min(start + size, stop)))
        used += stop
        if used >= samples:
            break
    if not used:
        raise DataError("the training split is empty: the method has no images to look at")


def _part(batch: Batch, which: slice | list[int]) -> Batch:
    labels = None if batch.labels is None else batch.labels[which]
    return Batch(batch.images[which], labels, batch.indices[which])


@contextmanager
def _kept(model: nn.Module) -> Iterator[None]:
    """Restore buffers, as some networks change them even in evaluation mode."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, values in before:
                buffer.copy_(values)


@contextmanager
def _differentiable(model: nn.Module) -> Iterator[dict[str, nn.Parameter]]:
    """Let all parameters take gradients, also those that the user has frozen; `.grad` is never touched."""
    parameters = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
    flags = [(parameter, parameter.requires_grad) for parameter in parameters.values()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(True)
        yield parameters
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


class _WithGradients(nn.Module):
    """Runs a network with gradients although the caller, `execute`, has switched them off."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Any:
        with torch.enable_grad():
            return self.model(images)


def _loss_of(outputs: Any, batch: Batch, loss: LossFn) -> Tensor:
    """Sum of the images' losses."""
    # A user's loss of outputs and inputs, such as an autoencoder's.
    takes_inputs = getattr(loss, "takes_inputs", False)
    if batch.labels is None and not takes_inputs:
        raise DataError("gradients of the loss need labels, and this data set has none")
    with torch.enable_grad():
        more = {"inputs": batch.images} if takes_inputs else {}
        value = loss(outputs, batch.labels, **more) * len(batch.images)
    if not bool(torch.isfinite(value)):
        raise PruningError("the loss is not finite on these images: nothing can be ranked by its gradient")
    if not value.requires_grad:
        raise PruningError("no gradient of the loss reaches any parameter: rank with --method l1 or l2")
    return value


class _Mean:
    """A mean over images of tensors by key, from sums; keys without a value are left out."""

    def __init__(self) -> None:
        self.sums: dict[Any, Tensor] = {}
        self.images = 0

    def add(self, key: Any, value: Tensor | None) -> None:
        if value is not None:
            before = self.sums.get(key)
            self.sums[key] = value.detach().clone() if before is None else before.add_(value.detach())

    def means(self) -> dict[Any, Tensor]:
        return {key: value / self.images for key, value in self.sums.items()}


def _gradients(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], part: Batch, copies: int, loss: LossFn
) -> Iterator[tuple[str, Tensor | None]]:
    with in_mode(model, training=False), torch.enable_grad():
        # A doubled image counts twice in the sum of losses.
        value = _loss_of(model(part.images), part, loss) / copies
    found = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
    return zip(parameters, found, strict=True)


def _mean_gradients(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], batches: Iterable[Batch], loss: LossFn
) -> Evidence:
    mean = _Mean()
    for batch in batches:
        for name, gradient in _gradients(model, parameters, *_runnable(model, batch), loss):
            mean.add(name, gradient)
        mean.images += len(batch.images)
    return Evidence(PruneMethod.GRADIENT, mean.images, gradients=mean.means())


def _mean_squares(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], batches: Iterable[Batch], loss: LossFn
) -> Evidence:
    mean = _Mean()
    for batch in batches:
        for single, copies in _singly(model, batch):
            for name, gradient in _gradients(model, parameters, single, copies, loss):
                mean.add(name, None if gradient is None else gradient.square())
            mean.images += 1
    return Evidence(PruneMethod.HESSIAN, mean.images, squares=mean.means())


def _runnable(model: nn.Module, batch: Batch) -> tuple[Batch, int]:
    """The batch, and how often it holds each image: one image is doubled if the network needs several."""
    if len(batch.images) > 1:
        return batch, 1
    try:
        with in_mode(model, training=False):
            model(batch.images)
    # Code with a bare squeeze() may fail in any way on a batch of one; other errors will recur.
    except Exception:
        return _part(batch, [0, 0]), 2
    return batch, 1


def _singly(model: nn.Module, batch: Batch) -> Iterator[tuple[Batch, int]]:
    """Each image in a batch of its own, and how often the batch holds it."""
    _, copies = _runnable(model, _part(batch, slice(0, 1)))
    for n in range(len(batch.images)):
        yield _part(batch, [n] * copies), copies


def _contributions(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], batches: Iterable[Batch], loss: LossFn
) -> Evidence:
    """Sum of g * w over a layer's weights, as sum of a * dL/da over the activations a that it reads.

    The two are equal, and the second is known for each image after one backward pass of a batch.
    """
    mean = _Mean()
    rows: dict[Key, list[Tensor]] = {}
    together: bool | None = None
    for batch in batches:
        if together is None:
            together = _image_first(model, batch)
        for part, copies in [(batch, 1)] if together else _singly(model, batch):
            images = len(part.images) if together else 1
            gradients, found = _contributed(model, parameters, part, loss, together, copies)
            for name, gradient in zip(parameters, gradients, strict=True):
                mean.add(name, gradient)
            for key, values in found.items():
                rows.setdefault(key, []).append(values.cpu())
            mean.images += images
    contributions = {key: torch.cat(values) for key, values in rows.items()}
    return Evidence(PruneMethod.TAYLOR, mean.images, gradients=mean.means(), contributions=contributions)


def _contributed(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    batch: Batch,
    loss: LossFn,
    by_image: bool,
    copies: int,
) -> tuple[tuple[Tensor | None, ...], dict[Key, Tensor]]:
    """Gradients of the parameters, summed over a batch, and contributions, shape [images, indices]."""
    reads: list[Read] = []
    with ReadApart(ArrivalObserver(model, reads.append)):
        outputs = execute(_WithGradients(model), (batch.images,), [])
    value = _loss_of(outputs, batch, loss) / copies
    reads = [read for read in reads if read.tensor.requires_grad]  # the network's input does not
    wanted = [*parameters.values(), *(read.tensor for read in reads)]
    found = torch.autograd.grad(value, wanted, allow_unused=True)
    contributions: dict[Key, Tensor] = {}
    for read, gradient in zip(reads, found[len(parameters) :], strict=True):
        if gradient is not None:
            part = read.per_channel(gradient * read.tensor.detach(), by_image).to(read.tensor.dtype)
            # A layer that runs several times reads the channel each time.
            contributions[read.key] = contributions[read.key] + part if read.key in contributions else part
    return found[: len(parameters)], contributions


def _image_first(model: nn.Module, batch: Batch) -> bool:
    """Whether dim 0 counts images wherever channels are read; in sequence-first attention it does not."""
    try:
        # Three sizes, so that no fixed dim can pass for the batch by chance.
        for images in (1, 2, 3):
            reads: list[Read] = []
            repeated = batch.images[:1].repeat(images, 1, 1, 1)
            execute(model, (repeated,), [ArrivalObserver(model, reads.append)])
            if any(read.tensor.shape[0] != images or read.dim == 0 for read in reads):
                return False
    # Code that takes no batch of one: then `_runnable` doubles each image.
    except Exception:
        return False
    return True


def _activations(model: nn.Module, batches: Iterable[Batch], method: PruneMethod) -> Evidence:
    sums, counts = _Mean(), dict[Key, float]()
    for batch in batches:
        part, copies = _runnable(model, batch)

        def add(read: Read, copies: int = copies) -> None:
            x = read.tensor
            seen = x == 0 if method is PruneMethod.APOZ else x.abs()
            total = read.per_channel(seen, by_image=False)[0] / copies
            sums.add(read.key, total)
            counts[read.key] = counts.get(read.key, 0) + x.numel() / total.numel() / copies

        execute(model, (part.images,), [ArrivalObserver(model, add)])
        sums.images += len(batch.images)
    means = {key: (value / counts[key]).cpu() for key, value in sums.sums.items()}
    if method is PruneMethod.APOZ:
        return Evidence(method, sums.images, zeros=means)
    return Evidence(method, sums.images, activations=means)
