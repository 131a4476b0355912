"""Optimizers for learned scales: parameter groups, Adam's epsilon, positive scales."""

from typing import Any

import torch
from torch import nn
from torch.optim import Adam, Optimizer

from brevitas_bp.backward.transparent import all_modules
from brevitas_bp.core.learned import LearnedScale
from brevitas_bp.core.nested_floor import LEAST_SCALE, ratio_gradient
from brevitas_bp.nn.learned.tensors import learned_tensors

#: Epsilon of Adam that belongs to the thesis' values of lam: the default of Keras. PyTorch's is 1e-8.
KERAS_EPSILON = 1e-7
_MARK = "learned_scales"


def parameter_groups(
        model: nn.Module, *, scale_lr: float | None = None,
        scale_betas: tuple[float, float] | None = None,
        eps: float = KERAS_EPSILON) -> list[dict[str, Any]]:
    """Returns the parameters in two groups for an optimizer: all but the scales, and the scales.

    Both groups get ``eps``. The gradients of the gradient-ratio rule are at most ``lam * max|P_q|``,
    which is about 1e-7. So Adam's step depends on ``lam / eps``: with PyTorch's ``eps = 1e-8``, a ten
    times smaller lam does the same.

    Scales get no weight decay, which would make them smaller.

    Args:
        model: a model with learned tensors.
        scale_lr: learning rate of the scales; None: that of the optimizer.
        scale_betas: Adam's decay rates for the scales; None: those of the optimizer. The first gradients
            of a penalty are huge (``1 / s**2`` is 7e9), and Adam remembers their squares for about
            ``1 / (1 - beta2)`` steps. In a short training, a smaller beta2 lets gamma have an effect.
        eps: epsilon of the optimizer, for Adam and its relatives. Other optimizers ignore it.

    Raises:
        ValueError: no learned tensors.

    >>> from brevitas_bp.nn.learned import learn_quantization
    >>> net = nn.Linear(3, 2)
    >>> _ = learn_quantization(net, granularity="scalar", lam=1e-10)
    >>> optimizer = torch.optim.AdamW(parameter_groups(net), lr=1e-4)
    >>> keep_scales_positive(optimizer)
    >>> [len(group["params"]) for group in optimizer.param_groups]
    [2, 2]
    """
    learned_tensors("brevitas_bp.nn.learned.parameter_groups", model)
    scales = {
        id(module.value): module.value for module in all_modules(model)
        if isinstance(module, LearnedScale)}
    others = [parameter for parameter in model.parameters() if id(parameter) not in scales]
    of_scales: dict[str, Any] = {
        "params": list(scales.values()), "eps": eps, "weight_decay": 0.0, _MARK: True}
    if scale_lr is not None:
        of_scales["lr"] = scale_lr
    if scale_betas is not None:
        of_scales["betas"] = scale_betas
    return [{"params": others, "eps": eps}, of_scales]


def keep_scales_positive(optimizer: Optimizer) -> None:
    """Makes ``optimizer`` set scales below ``LEAST_SCALE`` = 1.1920929e-05 to it after each step.

    Layers compute with ``max(s, LEAST_SCALE)`` in any case. Without this, a scale that was pushed far
    below needs as many steps to come back.

    Args:
        optimizer: an optimizer of :func:`parameter_groups`.

    Raises:
        ValueError: it has no group of scales.
    """
    if not any(group.get(_MARK) for group in optimizer.param_groups):
        raise ValueError(
            "brevitas_bp.nn.learned.keep_scales_positive: expected an optimizer with a group of scales, "
            f"got {type(optimizer).__name__} without one; build it with parameter_groups(model)")
    optimizer.register_step_post_hook(_clamp)


@torch.no_grad()
def _clamp(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for group in optimizer.param_groups:
        if group.get(_MARK):
            for scale in group["params"]:
                scale.clamp_(min=LEAST_SCALE)


def adam(
        model: nn.Module, *, lr: float, scale_lr: float | None = None,
        scale_betas: tuple[float, float] | None = None, eps: float = KERAS_EPSILON,
        **options: Any) -> Adam:
    """Returns Adam as the thesis uses it: ``eps = 1e-7``, and positive scales.

    Keras adds epsilon before it corrects the bias of the second moment, PyTorch after. So in step t,
    epsilon of Keras counts ``1 / sqrt(1 - beta2**t)`` times as much: 32 times in the first step, 1.3
    times in step 1000.

    Args:
        model: a model with learned tensors.
        lr: learning rate.
        scale_lr: see :func:`parameter_groups`.
        scale_betas: see :func:`parameter_groups`.
        eps: see :func:`parameter_groups`.
        options: further arguments of ``torch.optim.Adam``.

    Raises:
        ValueError: no learned tensors.
    """
    groups = parameter_groups(model, scale_lr=scale_lr, scale_betas=scale_betas, eps=eps)
    optimizer = Adam(groups, lr=lr, **options)
    keep_scales_positive(optimizer)
    return optimizer


@torch.no_grad()
def ratio_gradients(model: nn.Module) -> None:
    """Computes the gradients of all scales anew, from the gradients of their parameters.

    The rule is not linear in the gradient. In ``backward()`` it sees the gradient of one use of the
    weight, in one backward pass, of the loss as it is. Call this right before ``optimizer.step()`` if
    that is not the gradient that the optimizer sees:

    * with a ``GradScaler``, after ``scaler.unscale_(optimizer)``,
    * with gradients that are accumulated over several passes, or averaged over processes (DDP),
    * if a weight is used several times in a forward pass.

    Scales without a rule (``lam=None``) and parameters without a gradient are left as they are.
    Gradients that penalties gave to scales with a rule are replaced.

    Raises:
        ValueError: no learned tensors.
    """
    found: dict[int, tuple[nn.Parameter, torch.Tensor]] = {}
    for tensor in learned_tensors("brevitas_bp.nn.learned.ratio_gradients", model):
        quantizer, gradient = tensor.quantizer, tensor.parameter.grad
        scale = quantizer.scaling_impl.value
        if quantizer.lam is None or gradient is None or not scale.requires_grad:
            continue
        rule = ratio_gradient(
            gradient, tensor.parameter, scale, quantizer.lam, quantizer.unanimity)
        # Brevitas layers may share a quantizer: their gradients add up.
        before = found.get(id(scale))
        found[id(scale)] = scale, rule if before is None else before[1] + rule
    for scale, rule in found.values():
        scale.grad = rule
