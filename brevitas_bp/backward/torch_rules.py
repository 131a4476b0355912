"""The rule of each operation of torch."""

from math import prod
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from brevitas_bp.activations.functions import ACTIVATIONS, Activation
from brevitas_bp.backward import classes
from brevitas_bp.backward.attention import ReplayAttention, attention_as_it_is
from brevitas_bp.backward.elementary import elementary, power_of_a_number
from brevitas_bp.backward.losses import SaveLossDerivative
from brevitas_bp.backward.operations import (
    composite,
    elementwise,
    exact,
    lossless,
    normalization,
    product,
    quotient,
    square,
    stands_alone,
    weighted,
)
from brevitas_bp.backward.recurrent import recurrent
from brevitas_bp.backward.registry import OpRule, register_op
from brevitas_bp.backward.rewrites import RunningPass, SaveDerivative, look_through
from brevitas_bp.backward.rows import LEAST_ROW, convolved, of_elements, of_halves, trailing
from brevitas_bp.backward.saved import Call, Decision, SavedTensor
from brevitas_bp.codec import Codec
from brevitas_bp.codec.base import FLOATS
from brevitas_bp.codec.lossless import narrow_to
from brevitas_bp.codec.pooling import adaptive_max_pool_index, max_pool_index, plane_index
from brevitas_bp.codec.regions import (
    alpha_dropout_mask,
    clamp_region,
    dropout_mask,
    hardsigmoid_region,
    hardtanh_region,
    positive_region,
    relu6_region,
    relu_region,
    shrink_region,
    sign,
    threshold_region,
)
from brevitas_bp.codec.rows import Rows
from brevitas_bp.codec.shape_only import shape_only
from brevitas_bp.codec.signed import sign_exact

_MASK = "mask: gradient exact"


def activation(entry: Activation) -> OpRule:
    """Makes the rule of an activation function: its derivative is saved in place of its input.

    Args:
        entry: entry of the function. It serves calls of the function and of its variant, which must be
            alike in ``of_output``, ``compiled`` and ``halves``.
    """
    def formula(x: Tensor, y: Tensor, call: Call) -> Tensor:
        called = entry.called(call.argument)
        derivative = called.kernel or called.derivative
        assert derivative is not None
        return derivative(y if called.of_output else x, **called.read(call.argument))

    def few_bit(call: Call) -> dict[str, Any]:
        called = entry.called(call.argument)
        return {"name": called.name, "even": called.even, **called.read(call.argument)}

    def dim(call: Call) -> int:
        return entry.read(call.argument)["dim"]

    return elementwise(
        formula if entry.kernel or entry.derivative else None,
        few_bit=few_bit if entry.derivative else None,
        of_output=entry.of_output is not None,
        halves=dim if entry.halves else None,
        named=(lambda call: entry.called(call.argument).name) if entry.compiled else None,
        rows=of_halves(dim) if entry.halves else None if entry.bounded else of_elements,
        inplace_at=entry.inplace,
        # For instance, aten's elu has two factors beside alpha.
        most_arguments=1 + len(entry.parameters) + (entry.variant is not None))


_square = square()


_elementwise_product = product(rows=of_elements)


def _multiplied(saved: SavedTensor) -> Decision:
    """Decides for an elementwise product, which may be that of a tensor with itself."""
    first, second = saved.call.argument(0, "input"), saved.call.argument(1, "other")
    return (_square if first is second else _elementwise_product).decide(saved)


def _power(saved: SavedTensor) -> Decision:
    """Decides for a power: ``x ** 2`` is a product; for other exponents, the derivative is stored."""
    base, exponent = saved.call.argument(0, "input"), saved.call.argument(1, "exponent")
    if isinstance(exponent, Tensor):
        return power_of_a_number(saved, base, exponent)
    if saved.position == 0 and exponent == 2:
        return _square.decide(saved)
    return elementary(saved)


def _reverse_power(saved: SavedTensor) -> Decision:
    """Decides for ``base ** x``, called as a method of ``x``."""
    return power_of_a_number(
        saved, saved.call.argument(1, "other"), saved.call.argument(0, "input"))


def _power_derivative(x: Tensor, y: Tensor, call: Call) -> Tensor:
    exponent = call.argument(1, "exponent")
    return exponent * x ** (exponent - 1)


_save_power = SaveDerivative(_power_derivative)


def _rewrite_power(running: RunningPass, call: Call) -> Any:
    """Saves the derivative for whole exponents from 3 on, as in GELU by ``x ** 3``.

    The derivative is finite where ``x`` is.
    """
    exponent = call.argument(1, "exponent")
    if isinstance(exponent, (int, float)) and exponent >= 3 and exponent == int(exponent):
        return _save_power(running, call)
    return NotImplemented


def _einsum(saved: SavedTensor) -> Decision:
    """Treats up to two operands as a product; with more, intermediate products would be rounded too."""
    operands = [a for a in saved.arguments[1:] if isinstance(a, Tensor)]
    listed = [a for a in saved.arguments[1:] if isinstance(a, (list, tuple))]
    if len(operands) + sum(map(len, listed)) <= 2:
        return product().decide(saved)
    return Decision(None, "a product of more than two tensors")


def _deviation(saved: SavedTensor) -> Decision:
    """Decides for a variance or deviation.

    Its gradient is ``(x - mean)`` times one number for each statistic.
    """
    x, dims = saved.tensor, saved.call.argument(1, "dim")
    if saved.position != 0 or x.dtype not in FLOATS:
        return Decision(None, "backward is not linear in it")
    # An older form has ``unbiased``, a bool, in this place.
    reduced = _trailing(x, dims if isinstance(dims, (int, tuple, list)) and (
        not isinstance(dims, bool)) else None)
    if reduced is None:
        return Decision(None, "its statistics run across rows")
    return Decision(
        saved.codec, "backward is linear in it", shared=stands_alone(saved, of_itself=True),
        reach="all", rows=lambda x, call: trailing(x, reduced))


def _threshold(saved: SavedTensor) -> Codec | None:
    return threshold_region(saved.call.argument(1, "threshold"))


def _hardtanh(saved: SavedTensor) -> Codec | None:
    call = saved.call
    return hardtanh_region(call.argument(1, "min_val", -1.0), call.argument(2, "max_val", 1.0))


def _shrink(saved: SavedTensor) -> Codec | None:
    return shrink_region(saved.call.argument(1, "lambd", 0.5))


def _clamp(saved: SavedTensor) -> Codec | None:
    low, high = saved.call.argument(1, "min"), saved.call.argument(2, "max")
    return clamp_region(low, high) if _is_number(low) and _is_number(high) else None


def _clamp_min(saved: SavedTensor) -> Codec | None:
    low = saved.call.argument(1, "min")
    return clamp_region(low, None) if _is_number(low) else None


def _clamp_max(saved: SavedTensor) -> Codec | None:
    high = saved.call.argument(1, "max")
    return clamp_region(None, high) if _is_number(high) else None


def _is_number(bound: Any) -> bool:
    return bound is None or isinstance(bound, (int, float))


def _rrelu(saved: SavedTensor) -> Decision:
    """Decides for rrelu, which multiplies by noise in training.

    In evaluation, it multiplies by a slope where the input is negative.
    """
    training = saved.call.argument(3, "training", False)
    if saved.position is None:
        # The kernel writes the noise only after it was saved: a hook does not see the noise yet.
        return Decision(None if training else shape_only(), "noise")
    return Decision(positive_region(), _MASK)


def _prelu(saved: SavedTensor) -> Decision:
    if saved.position != 0 or saved.codec is None:
        return Decision(None, "slopes")
    return Decision(
        sign_exact(saved.codec.per_element), "sign exact; the slope's gradient is linear in the rest",
        shared=stands_alone(saved), rows=_prelu_rows)


def _prelu_rows(x: Tensor, call: Call) -> Rows | None:
    """Returns one row for each channel, because each slope belongs to a channel."""
    return trailing(x, max(x.dim() - 2, 1))


def _dropout(saved: SavedTensor) -> Codec | None:
    # The only saved tensor is the mask, which is computed and has the input's dtype.
    p = saved.call.argument(1, "p", 0.5)
    return dropout_mask(float(p)) if saved.position is None and 0 < p < 1 else None


def _alpha_dropout(saved: SavedTensor) -> Codec | None:
    p = saved.call.argument(1, "p", 0.5)
    return alpha_dropout_mask(float(p)) if saved.position is None and 0 < p < 1 else None


def _look_through_python(running: RunningPass, call: Call) -> Any:
    """Lets the functions inside a Python function follow their own rules; an operator runs as it is."""
    return look_through(running, call) if isinstance(call.function, FunctionType) else NotImplemented


def _vector_norm(saved: SavedTensor) -> Decision:
    """Decides for a Euclidean norm over the last dimensions: backward is linear in its input."""
    x, dims = saved.tensor, saved.call.argument(2, "dim")
    if saved.position != 0 or saved.call.argument(1, "ord", 2) != 2 or x.dtype not in FLOATS:
        return Decision(None, "backward is not linear in it")
    reduced = _trailing(x, dims)
    if reduced is None or prod(x.shape[x.dim() - reduced:]) < LEAST_ROW:
        return Decision(None, "its norms run across rows, or have few elements")
    return Decision(
        saved.codec, "backward is linear in it", shared=stands_alone(saved, of_itself=True),
        reach="all", rows=lambda x, call: trailing(x, reduced))


def _trailing(x: Tensor, dims: Any) -> int | None:
    """Returns the number of reduced dimensions if these are the last ones, else None."""
    if dims is None or dims in ((), []):
        return x.dim()
    listed = {dims} if isinstance(dims, int) else set(dims)
    reduced = {d % x.dim() for d in listed} if x.dim() else set()
    return len(reduced) if reduced == set(range(x.dim() - len(reduced), x.dim())) else None


def _index(saved: SavedTensor) -> Codec | None:
    """Narrows indices into a dimension: they are below the largest size of any float argument."""
    if saved.tensor.dtype != torch.int64:
        return None
    sizes = [
        max(a.shape, default=0) for a in saved.arguments
        if isinstance(a, Tensor) and a.is_floating_point()]
    return narrow_to(max(sizes)) if sizes else None


def _pool(saved: SavedTensor) -> Codec | None:
    """Stores only the shape of the input, and each index as its place in the window."""
    if saved.tensor.is_floating_point():
        return shape_only()
    call = saved.call
    x, dims = call.argument(0, "input"), _dims(call)
    if "adaptive" in call.name:
        return adaptive_max_pool_index(x.shape, dims)
    if "fractional" in call.name:
        return plane_index(x.shape, dims)
    return max_pool_index(
        x.shape, dims, call.argument(1, "kernel_size"), call.argument(2, "stride"),
        call.argument(3, "padding", 0), call.argument(4, "dilation", 1))


def _dims(call: Call) -> int:
    return next(dims for dims in (1, 2, 3) if f"{dims}d" in call.name)


def _shape(saved: SavedTensor) -> Codec | None:
    """Stores only the shape of the first argument."""
    return shape_only() if saved.position == 0 and saved.tensor.is_floating_point() else None


def _gather(saved: SavedTensor) -> Codec | None:
    return shape_only() if saved.tensor.is_floating_point() else _index(saved)


def _register(rule: OpRule, names: str) -> None:
    for name in names.split():
        register_op(name, rule)


_register(weighted(), "linear conv_tbc grouped_mm")
_register(weighted(rows=convolved), """
    conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution
    _convolution""")
_register(OpRule(_multiplied), "mul multiply rmul imul")
_register(_square, "square")
_register(product(), "matmul rmatmul imatmul mm bmm mv dot vdot inner outer ger tensordot")
_register(product(summands=1), "addmm addmv addbmm baddbmm addr")
_register(product(summands=1, rows=of_elements), "addcmul")
_register(OpRule(_power), "ipow float_power")
register_op("pow", OpRule(_power, _rewrite_power))
_register(OpRule(_einsum), "einsum")
_register(quotient(), "div divide true_divide truediv itruediv idiv")
_register(OpRule(_deviation), "var std var_mean std_mean")
_register(normalization(statistics=True), """
    batch_norm native_batch_norm _native_batch_norm_legit layer_norm native_layer_norm group_norm
    native_group_norm instance_norm""")
_register(normalization(), "rms_norm")
register_op(torch.nn.SyncBatchNorm, normalization(statistics=True))

for _entry in ACTIVATIONS.values():
    if not _entry.stepwise:
        _register(activation(_entry), " ".join((_entry.name, *_entry.aliases)))

register_op("scaled_dot_product_attention", OpRule(
    attention_as_it_is, ReplayAttention()))
_register(composite(), "multi_head_attention_forward")

_register(composite(), "normalize")
register_op("norm", OpRule(exact().decide, _look_through_python))
_register(OpRule(_vector_norm), "linalg_vector_norm vector_norm")
_register(OpRule(classes.softmax), "softmax softmin")
_register(OpRule(classes.log_softmax), "log_softmax")
_register(OpRule(classes.cross_entropy), "cross_entropy cross_entropy_loss")
_register(OpRule(classes.nll_loss), "nll_loss nll_loss2d nll_loss_nd")
_register(OpRule(elementary), """
    exp exp2 expm1 special_exp2 special_expm1 log log2 log10 log1p special_log1p sqrt rsqrt reciprocal
    rdiv rtruediv sinh cosh tan asin arcsin acos arccos acosh arccosh atanh arctanh""")
_register(OpRule(_reverse_power), "rpow")
_register(exact(), """
    gumbel_softmax prod cumprod cumsum logsumexp logcumsumexp matrix_norm
    linalg_norm linalg_matrix_norm cosine_similarity pairwise_distance
    cdist pdist maximum minimum fmax fmin hypot atan2 lerp addcdiv bilinear local_response_norm
    renorm lgamma digamma erfinv logit logaddexp xlogy sinc remainder fmod""")
_register(OpRule(exact("a loss").decide, SaveLossDerivative()), """
    binary_cross_entropy binary_cross_entropy_with_logits smooth_l1_loss soft_margin_loss""")
_register(OpRule(exact("a loss").decide, SaveLossDerivative("weight")), "mse_loss huber_loss")
_register(OpRule(exact("a loss").decide, SaveLossDerivative("weight", signs=True)), "l1_loss")
_register(exact("a loss"), """
    kl_div
    gaussian_nll_loss poisson_nll_loss cosine_embedding_loss hinge_embedding_loss
    margin_ranking_loss multi_margin_loss multilabel_margin_loss
    multilabel_soft_margin_loss triplet_margin_loss triplet_margin_with_distance_loss ctc_loss""")
# These operations save bool or integer tensors, or nothing.
_register(exact("no floating-point tensor is expected"), """
    where masked_fill masked_scatter masked_select max min amax amin topk sort msort argsort
    kthvalue median nanmedian mode unique cat stack sum mean add sub rsub neg
    contiguous to float half bfloat16 double clone roll flip permute transpose reshape view""")
_register(OpRule(recurrent), "lstm gru rnn_tanh rnn_relu")
_register(exact("a recurrent layer: gates and states"), """
    lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell quantized_lstm""")
_register(exact("grid positions"), "grid_sample grid_sampler affine_grid affine_grid_generator")

_register(lossless(lambda saved: relu_region(), _MASK, zeros_outside=True), "relu")
_register(lossless(lambda saved: relu6_region(), _MASK), "relu6")
_register(lossless(_hardtanh, _MASK), "hardtanh")
_register(lossless(lambda saved: hardsigmoid_region(), _MASK), "hardsigmoid")
_register(lossless(lambda saved: positive_region(), _MASK), "leaky_relu")
_register(lossless(_threshold, _MASK), "threshold")
_register(lossless(_shrink, _MASK), "hardshrink softshrink")
_register(lossless(_clamp, _MASK), "clamp clip")
_register(lossless(_clamp_min, _MASK), "clamp_min")
_register(lossless(_clamp_max, _MASK), "clamp_max")
_register(lossless(lambda saved: sign(), "sign: gradient exact"), "abs absolute")
_register(OpRule(_rrelu), "rrelu")
_register(OpRule(_prelu), "prelu")
_register(lossless(_dropout, "dropout mask"), """
    dropout dropout1d dropout2d dropout3d feature_dropout""")
_register(lossless(_alpha_dropout, "dropout mask"), "alpha_dropout feature_alpha_dropout")
_register(lossless(_pool, "shape of the input, index in the window"), """
    max_pool1d max_pool2d max_pool3d max_pool1d_with_indices max_pool2d_with_indices
    max_pool3d_with_indices adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d
    fractional_max_pool2d fractional_max_pool3d fractional_max_pool2d_with_indices
    fractional_max_pool3d_with_indices adaptive_max_pool1d_with_indices
    adaptive_max_pool2d_with_indices adaptive_max_pool3d_with_indices""")
_register(lossless(_shape, "only its shape is read"), """
    avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d pad
    reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d
    replication_pad3d interpolate""")
_register(lossless(_gather, "index, and the shape of the input"), "gather take_along_dim")
_register(lossless(_index, "index"), """
    embedding index_select getitem setitem index index_add index_copy scatter scatter_add""")
# Offsets and flat positions are not bounded by the size of a dimension.
_register(exact("integers of several kinds"), "embedding_bag take put index_put")
