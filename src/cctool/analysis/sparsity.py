"""How many weights are zero, at every granularity that hardware or pruning cares about.

The columns are those of Distiller's sparsity table. Weights are the parameters of two or four dimensions,
and those of convolutions of other dimensions; vectors (biases, norms) are excluded, because zeros there save
nothing. A tied weight is listed once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from cctool.base.networks import qualified


@dataclass(frozen=True)
class TensorSparsity:
    """Zeros and statistics of one weight; all shares are percent, 0 to 100.

    A convolution's weight [O, I / groups, *kernel] is treated as O filters, as O * I / groups kernels, as I
    input channels, and flattened to a matrix of O rows and I / groups * prod(kernel) columns. A transposed
    convolution's is transposed first, so that its rows are output channels, too. A linear layer's weight is
    a matrix; kernels, filters and input channels are None for it.

    Attributes:
        name: qualified name of the parameter.
        shape: as it is stored.
        nnz_dense: number of elements.
        nnz_sparse: number of elements that are not zero.
        cols: columns of the matrix that are all zero.
        rows: rows of the matrix that are all zero.
        channels: input channels that no filter reads; a channel belongs to one group.
        kernels_2d: kernels that are all zero.
        filters_3d: filters that are all zero.
        fine: elements that are zero.
        std: standard deviation of all elements (n - 1).
        mean: mean of all elements.
        abs_mean: mean of their magnitudes.
    """

    name: str
    shape: tuple[int, ...]
    nnz_dense: int
    nnz_sparse: int
    cols: float
    rows: float
    channels: float | None
    kernels_2d: float | None
    filters_3d: float | None
    fine: float
    std: float
    mean: float
    abs_mean: float


@dataclass(frozen=True)
class NonFinite:
    """A tensor with NaN or infinite elements.

    Attributes:
        name: qualified name of the parameter or buffer.
        nan: number of NaN.
        infinite: number of infinities.
        elements: number of all elements.
    """

    name: str
    nan: int
    infinite: int
    elements: int


def weights(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, nn.Module]]:
    """Each weight with its qualified name and its module; see the top of this file for what a weight is."""
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            convolution = isinstance(module, _ConvNd) and name == "weight"
            # Identity, because a tied parameter is registered under several names.
            if id(parameter) in seen or not (convolution or parameter.dim() in (2, 4)):
                continue
            seen.add(id(parameter))
            yield qualified(prefix, name), parameter, module


def sparsity(model: nn.Module) -> tuple[TensorSparsity, ...]:
    """Count the zeros of every weight.

    A linear layer whose second input has weights of 0:

    >>> import torch
    >>> layer = nn.Linear(2, 2, bias=False)
    >>> layer.weight = nn.Parameter(torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    >>> found = sparsity(layer)[0]
    >>> found.cols, found.rows, found.fine, found.mean
    (50.0, 0.0, 50.0, 0.5)
    """
    return tuple(_measure(name, value.detach(), module) for name, value, module in weights(model))


def nonfinite(model: nn.Module) -> tuple[NonFinite, ...]:
    """Parameters and buffers that hold NaN or infinities, in the order of the state dict."""
    found = []
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()):
            nan, infinite = int(value.isnan().sum()), int(value.isinf().sum())
            if nan or infinite:
                found.append(NonFinite(name, nan, infinite, value.numel()))
    return tuple(found)


def _measure(name: str, value: Tensor, module: nn.Module) -> TensorSparsity:
    # Coefficients of a convolution need not be arranged as its weight is.
    groups = module.groups if isinstance(module, _ConvNd) and name.rpartition(".")[2] == "weight" else 1
    occupied = _by_group(value != 0, module, groups)  # [groups, O / groups, I / groups, kernel]
    matrix = occupied.flatten(2).flatten(0, 1)
    is_matrix = value.dim() == 2
    exact = value.double()  # float32 sums over millions of elements lose digits
    return TensorSparsity(
        name=name,
        shape=tuple(value.shape),
        nnz_dense=value.numel(),
        nnz_sparse=int(occupied.sum()),
        cols=_empty(matrix.any(0)),
        rows=_empty(matrix.any(1)),
        channels=None if is_matrix else _empty(occupied.any(3).any(1)),
        kernels_2d=None if is_matrix else _empty(occupied.any(3)),
        filters_3d=None if is_matrix else _empty(matrix.any(1)),
        fine=_empty(occupied),
        std=float(exact.std()) if value.numel() > 1 else 0.0,
        mean=float(exact.mean()) if value.numel() else 0.0,
        abs_mean=float(exact.abs().mean()) if value.numel() else 0.0,
    )


def _by_group(occupied: Tensor, module: nn.Module, groups: int) -> Tensor:
    if occupied.dim() == 2:
        return occupied[None, :, :, None]
    flat = occupied.flatten(2)
    grouped = flat.reshape(groups, -1, *flat.shape[1:])
    if isinstance(module, _ConvNd) and module.transposed:
        # stored as [I, O / groups, kernel]: output channels first, as everywhere else
        return grouped.transpose(1, 2)
    return grouped


def _empty(occupied: Tensor) -> float:
    """Percent of False."""
    return 100 * int((~occupied).sum()) / occupied.numel() if occupied.numel() else 0.0
