"""What each torch function does to channels: a rule each, in one table."""

from __future__ import annotations

from collections.abc import Callable

from cctool.graph.execution import Event
from cctool.graph.ledger import Ledger
from cctool.graph.rules import arithmetic, layers, products, recurrent, shapes, slices

Rule = Callable[[Ledger, Event], None]

_UNARY = """
    relu relu6 leaky_relu elu celu selu gelu silu mish hardswish hardsigmoid hardtanh sigmoid logsigmoid tanh
    softplus softsign tanhshrink hardshrink softshrink threshold rrelu erf exp expm1 log log1p log2 log10 sqrt
    rsqrt square abs neg negative sign round floor ceil trunc frac reciprocal sin cos positive logical_not
    dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout feature_dropout native_dropout
    contiguous clone detach to type type_as float half double bfloat16 int long bool cuda cpu requires_grad
    data zero fill zeros_like ones_like full_like rand_like randn_like empty_like nan_to_num isnan isinf
    isfinite bernoulli alias real lift_fresh
"""

_ELEMENTWISE = """
    add sub rsub mul div floor_divide remainder fmod pow float_power maximum minimum fmax fmin where lerp
    addcmul addcdiv masked_fill clamp clip clamp_min clamp_max eq ne lt le gt ge not_equal greater less and or
    xor logical_and logical_or logical_xor bitwise_and bitwise_or bitwise_xor atan2 hypot
"""

_SPATIAL = """
    max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
    adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d lp_pool1d lp_pool2d
    max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices interpolate upsample
    upsample_nearest upsample_bilinear grid_sample
"""

_FACTORIES = """
    arange linspace eye rand randn randint tensor as_tensor scalar_tensor from_numpy new_tensor meshgrid
"""

_UNIFORM = "zeros ones full empty new_zeros new_ones new_full new_empty"

_REDUCTIONS = "sum mean amax amin max min var std var_mean std_mean norm vector_norm prod any all logsumexp"


def _each(names: str, rule: Rule) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


RULES: dict[str, Rule] = {
    **_each(_UNARY, arithmetic.unary),
    **_each(_ELEMENTWISE, arithmetic.elementwise),
    **_each(_SPATIAL, arithmetic.spatial),
    **_each("max_unpool1d max_unpool2d max_unpool3d", arithmetic.unpooling),
    **_each(_FACTORIES, arithmetic.fixed),
    **_each(_UNIFORM, arithmetic.uniform),
    **_each("conv1d conv2d conv3d", layers.convolution),
    **dict.fromkeys([f"conv_transpose{n}d" for n in (1, 2, 3)], layers.transposed_convolution),
    **_each("batch_norm instance_norm", layers.channel_norm),
    **_each("layer_norm rms_norm", layers.layer_norm),
    **_each("matmul mm bmm", products.matrix_product),
    **_each("view reshape flatten unflatten view_as reshape_as", shapes.view),
    **_each("chunk split split_with_sizes tensor_split", slices.pieces),
    **_each("unbind select", slices.unbind),
    **_each("permute movedim moveaxis unsqueeze squeeze", shapes.replay),
    **_each("transpose swapaxes swapdims t T mT H", shapes.transposed),
    **_each("repeat tile repeat_interleave flip", shapes.copying),
    **_each("expand expand_as broadcast_to", shapes.expand),
    **_each(_REDUCTIONS, arithmetic.reduction),
    **_each("softmax log_softmax softmin normalize cumsum cumprod", arithmetic.along_dim),
    **_each("numpy tolist array", arithmetic.leaves_torch),
    **_each("lstm gru rnn_tanh rnn_relu", recurrent.recurrent),
    **_each("lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell", recurrent.cell),
    "linear": layers.linear,
    "addmm": products.add_matrix_product,
    "baddbmm": products.add_batched_product,
    "einsum": products.einsum,
    "group_norm": layers.group_norm,
    "prelu": layers.prelu,
    "embedding": layers.embedding,
    "scaled_dot_product_attention": products.attention,
    "getitem": slices.getitem,
    "setitem": slices.setitem,
    "copy": slices.copy,
    "glu": slices.glu,
    "narrow": slices.narrow,
    "cat": shapes.concatenate,
    "stack": shapes.stack,
    "pad": shapes.pad,
    "roll": shapes.same_order,
    "pixel_shuffle": shapes.pixel_shuffle,
    "pixel_unshuffle": shapes.pixel_unshuffle,
    "channel_shuffle": shapes.channel_shuffle,
    "native_channel_shuffle": shapes.channel_shuffle,
    "unfold": shapes.unfold,
}
"""Rule of each function by its canonical name; a function without one freezes the channels it touches."""


def apply_rule(ledger: Ledger, event: Event) -> None:
    """Apply the rule of a call; without one, or in a form that it cannot read, freeze the inputs."""
    rule = RULES.get(event.name)
    if rule is None:
        layers.opaque(ledger, event, f"no rule for `{event.name}`")
        return
    try:
        rule(ledger, event)
    except (IndexError, KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        # torch accepts arguments in more forms than the rules read: freezing is safe, guessing is not.
        reason = f"no rule for `{event.name}` called like this ({type(error).__name__})"
        layers.opaque(ledger, event, reason)
