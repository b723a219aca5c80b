"""How many operations a call of each torch function takes.

A rule is a pure function of the shapes and settings of a call, with one line in `RULES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

from cctool.graph.trace import Call, Shape


@dataclass(frozen=True)
class Cost:
    """Operations of one call or of many.

    Attributes:
        macs: multiply-accumulates of products with weights: convolutions and linear layers, also where they
            are written as a matrix product with a parameter.
        matmul_macs: multiply-accumulates of products of activations: attention, matmul, einsum.
        norm_ops: output elements of batch, layer, group and instance norms.
        activation_ops: output elements of nonlinearities and softmax.
        pooling_ops: elements read by poolings, reductions and resampling.
        elementwise_ops: output elements of additions, products and other arithmetic.
    """

    macs: int = 0
    matmul_macs: int = 0
    norm_ops: int = 0
    activation_ops: int = 0
    pooling_ops: int = 0
    elementwise_ops: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __bool__(self) -> bool:
        return any(getattr(self, f.name) for f in fields(self))


Rule = Callable[[Call], Cost]


def _outputs(call: Call) -> int:
    return math.prod(call.output_shapes[0])


def _inputs(call: Call) -> int:
    return math.prod(call.input_shapes[0])


def _convolution(call: Call) -> Cost:
    """Every output element sums one kernel over the input channels of its group.

    macs = numel(output) * (C_in / groups) * prod(kernel), whatever stride, padding and dilation are.
    """
    weight = call.input_shapes[1]  # [C_out, C_in / groups, *kernel]
    return Cost(macs=_outputs(call) * math.prod(weight[1:]))


def _transposed_convolution(call: Call) -> Cost:
    """Every input element is multiplied by one kernel for each output channel of its group.

    macs = numel(input) * (C_out / groups) * prod(kernel); products that padding crops are counted.
    """
    weight = call.input_shapes[1]  # [C_in, C_out / groups, *kernel]
    return Cost(macs=_inputs(call) * math.prod(weight[1:]))


def _linear(call: Call) -> Cost:
    """Every output element sums over all input features: macs = numel(output) * in_features."""
    return Cost(macs=_outputs(call) * call.input_shapes[0][-1])


def _bilinear(call: Call) -> Cost:
    """x1^T W x2 for each output: macs = numel(output) * in1 * in2 for W x2, and * in1 for the rest."""
    first, second = call.input_shapes[0][-1], call.input_shapes[1][-1]
    return Cost(macs=_outputs(call) * first * (second + 1))


def _product(call: Call, macs: int, operands: slice) -> Cost:
    if any(call.tensor_names[operands]):
        return Cost(macs=macs)
    return Cost(matmul_macs=macs)


def _matmul(call: Call) -> Cost:
    """Every output element is a dot product over the last dimension of the left operand."""
    return _product(call, _outputs(call) * call.input_shapes[0][-1], slice(0, 2))


def _added_matmul(call: Call) -> Cost:
    """The product in `addmm(bias, a, b)` and its variants; `addbmm` sums over the batch as well."""
    left, right = call.input_shapes[1:3]
    columns = right[-1] if len(right) > 1 else 1
    return _product(call, math.prod(left) * columns, slice(1, 3))


def _tensordot(call: Call) -> Cost:
    """numel(a) * numel(b) = numel(output) * k^2, where k elements are summed over for each output."""
    left, right = (math.prod(shape) for shape in call.input_shapes[:2])
    return _product(call, math.isqrt(left * right * _outputs(call)), slice(0, 2))


def _einsum(call: Call) -> Cost:
    """One multiply-accumulate per combination of all indices, for each operand after the first."""
    if len(call.input_shapes) < 2:
        return Cost(pooling_ops=_inputs(call))
    equation = str(call.attributes["equation"]).replace(" ", "")
    sizes: dict[str, int] = {}
    for subscripts, shape in zip(equation.split("->")[0].split(","), call.input_shapes, strict=False):
        for index, size in _einsum_indices(subscripts, shape):
            sizes[index] = max(size, sizes.get(index, 1))
    macs = math.prod(sizes.values()) * (len(call.input_shapes) - 1)
    return _product(call, macs, slice(0, None))


def _einsum_indices(subscripts: str, shape: Shape) -> list[tuple[str, int]]:
    head, dots, tail = subscripts.partition("...")
    covered = len(shape) - len(head) - len(tail)
    # Dimensions of the ellipsis are aligned at the end, as in broadcasting.
    names = [*head, *(f"...{covered - i}" for i in range(covered if dots else 0)), *tail]
    return list(zip(names, shape, strict=False))


def _attention(call: Call) -> Cost:
    """softmax(Q K^T) V with Q (..., L, E), K (..., S, E), V (..., S, Ev).

    matmul_macs = batch * heads * L * S * (E + Ev); activation_ops = batch * heads * L * S for the softmax.
    A causal mask is not taken into account.
    """
    query, key, value = call.input_shapes[:3]
    scores = math.prod(query[:-1]) * key[-2]
    return Cost(matmul_macs=scores * (query[-1] + value[-1]), activation_ops=scores)


def _window_pool(call: Call) -> Cost:
    """Every output element reads its window: pooling_ops = numel(output) * prod(kernel)."""
    dimensions = int(call.function[-2])
    kernel = call.attributes["kernel_size"]
    sides = tuple(kernel) if isinstance(kernel, (tuple, list)) else (kernel,)
    window = math.prod(sides) if len(sides) == dimensions else sides[0] ** dimensions
    return Cost(pooling_ops=_outputs(call) * window)


def _adaptive_pool(call: Call) -> Cost:
    """Bin i of n over a size s reads elements floor(i s / n) up to ceil((i + 1) s / n)."""
    dimensions = int(call.function[-2])
    source, target = call.input_shapes[0], call.output_shapes[0]
    reads = math.prod(source[:-dimensions])
    for size, bins in zip(source[-dimensions:], target[-dimensions:], strict=True):
        reads *= sum(-(-(i + 1) * size // bins) - i * size // bins for i in range(bins))
    return Cost(pooling_ops=reads)


_TAPS = {"nearest": 1, "nearest-exact": 1, "linear": 2, "bilinear": 4, "trilinear": 8, "bicubic": 16}


def _resample(call: Call) -> Cost:
    """Every output element reads 1 (nearest) to 16 (bicubic) neighbours; `area` reads each input once."""
    mode = str(call.attributes.get("mode", "nearest"))
    return Cost(pooling_ops=_outputs(call) * _TAPS[mode] if mode in _TAPS else _inputs(call))


_NORMS = "batch_norm instance_norm layer_norm group_norm rms_norm local_response_norm normalize"
_ACTIVATIONS = (
    "relu relu6 leaky_relu prelu rrelu elu celu selu gelu silu mish hardtanh hardswish hardsigmoid sigmoid "
    "tanh softmax softmin log_softmax logsigmoid softplus softsign softshrink hardshrink tanhshrink "
    "threshold glu"
)
_REDUCTIONS = (
    "mean sum prod amax amin max min argmax argmin std var std_mean var_mean norm vector_norm logsumexp all "
    "any cumsum topk sort"
)
_ARITHMETIC = (
    "add sub mul div pow float_power sqrt rsqrt square exp exp2 expm1 log log2 log10 log1p abs neg "
    "reciprocal sin cos tan atan atan2 sinh cosh erf erfc clamp clamp_min clamp_max clip maximum minimum "
    "where lerp addcmul addcdiv floor ceil round trunc frac sign floor_divide floordiv remainder fmod mod "
    "eq ne lt le gt ge logical_and logical_or logical_not bitwise_and bitwise_or bitwise_not isnan isinf "
    "isfinite masked_fill nan_to_num rsub multiply"
)

_FREE = (
    "view view_as reshape reshape_as permute transpose t mT swapaxes swapdims movedim moveaxis flatten "
    "ravel unflatten chunk split split_with_sizes tensor_split unbind cat stack hstack vstack contiguous "
    "clone detach getitem setitem select narrow index_select index gather take_along_dim roll flip rot90 "
    "pad expand expand_as broadcast_to repeat repeat_interleave tile squeeze unsqueeze to type float half "
    "double bfloat16 int long bool cpu cuda type_as pixel_shuffle pixel_unshuffle channel_shuffle unfold "
    "fold dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout embedding copy fill "
    "zero zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty new_tensor "
    "scatter index_copy meshgrid diagonal tril triu requires_grad as_subclass numpy real imag "
    "view_as_real view_as_complex one_hot nonzero masked_select identity"
)

RULES: dict[str, Rule] = {
    **{f"conv{n}d": _convolution for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": _transposed_convolution for n in (1, 2, 3)},
    "linear": _linear,
    "bilinear": _bilinear,
    **dict.fromkeys(("matmul", "mm", "bmm", "mv", "dot", "inner"), _matmul),
    **dict.fromkeys(("addmm", "addmv", "addbmm", "baddbmm"), _added_matmul),
    "tensordot": _tensordot,
    "einsum": _einsum,
    "scaled_dot_product_attention": _attention,
    **{f"{kind}_pool{n}d": _window_pool for kind in ("max", "avg") for n in (1, 2, 3)},
    **{f"adaptive_{kind}_pool{n}d": _adaptive_pool for kind in ("max", "avg") for n in (1, 2, 3)},
    **dict.fromkeys(("interpolate", "upsample", "grid_sample"), _resample),
    **dict.fromkeys(_NORMS.split(), lambda call: Cost(norm_ops=_outputs(call))),
    **dict.fromkeys(_ACTIVATIONS.split(), lambda call: Cost(activation_ops=_outputs(call))),
    **dict.fromkeys(_REDUCTIONS.split(), lambda call: Cost(pooling_ops=_inputs(call))),
    **dict.fromkeys(_ARITHMETIC.split(), lambda call: Cost(elementwise_ops=_outputs(call))),
}
"""How each function is counted, by its canonical name in the trace."""

FREE = frozenset(_FREE.split())
"""Functions that move data, make constants or do nothing in evaluation mode: no arithmetic to count."""
