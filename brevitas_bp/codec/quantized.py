"""The codec of any Brevitas activation quantizer: values -> codes -> bytes."""

import inspect
from functools import partial
from typing import Any, TypeAlias

import torch
from brevitas.inject import ExtendedInjector
from brevitas.proxy.runtime_quant import ActQuantProxyFromInjectorBase
from brevitas.quant.solver.act import ActQuantSolver
from dependencies.exceptions import DependencyError
from torch import Tensor, nn

from brevitas_bp.codec.average import AverageCodec
from brevitas_bp.codec.base import Codec
from brevitas_bp.codec.general import ModuleCodec
from brevitas_bp.codec.lowered import LoweredCodec
from brevitas_bp.codec.lowering import lower
from brevitas_bp.codec.recipe import Recipe
from brevitas_bp.codec.stock import (
    StatefulCodec,
    is_stateful,
    keeps_statistics,
    kind_of,
    stock_codec,
)
from brevitas_bp.core.average import AverageQuant
from brevitas_bp.core.int_quant import BucketRescalingIntQuant
from brevitas_bp.core.levels import BucketLevelQuant
from brevitas_bp.errors import UnsupportedQuantizerError
from brevitas_bp.format.random import seeded
from brevitas_bp.private import TorchDispatchMode
from brevitas_bp.probes import undisturbed
from brevitas_bp.proxy import check_override_names

#: A Brevitas activation quantizer: an injector class (a config), a proxy, or a ``tensor_quant`` module.
#: Brevitas' configs are classes whose attributes have no declared types, so type checkers take anything,
#: and the library checks it when it runs.
ActQuant: TypeAlias = Any


def codec_from(quantizer: ActQuant, **overrides: Any) -> Codec:
    """Builds the codec of a Brevitas activation quantizer.

    Args:
        quantizer: an injector class (a config), a proxy (for instance ``layer.act_quant``; shared, not
            copied) or a ``tensor_quant`` module.
        overrides: settings of the config, as keywords of a Brevitas layer.

    Raises:
        UnknownNameError: the config does not know an override.
        UnsupportedQuantizerError: the quantizer has no codes that could be stored.
        TypeError: the argument is not a quantizer.

    >>> from brevitas_bp.quant import ShiftedUint2DynamicActPerBucketFloat
    >>> codec_from(ShiftedUint2DynamicActPerBucketFloat, bit_width=4).name
    '4-bit nearest'
    """
    # Read a codec's constants on the host, whatever the default device is.
    with torch.device("cpu"):
        return _codec_from(quantizer, overrides)


def _codec_from(quantizer: Any, overrides: dict[str, Any]) -> Codec:
    where = "brevitas_bp.codec.codec_from"
    if inspect.isclass(quantizer) and issubclass(quantizer, ExtendedInjector):
        return _from_injector(where, quantizer, overrides)
    if overrides:
        raise TypeError(
            f"{where}: keyword overrides {sorted(overrides)} need a config class, got an instance of "
            f"{type(quantizer).__name__}, which is built already; set them where it is built")
    if hasattr(quantizer, "fused_activation_quant_proxy"):
        return _codec_of(tensor_quant_of(quantizer))
    if isinstance(quantizer, nn.Module):
        return _codec_of(quantizer)
    raise TypeError(
        f"{where}: expected a Brevitas config class, an activation proxy or a tensor_quant module, "
        f"got {quantizer!r}; ready-made configs are in brevitas_bp.quant")


def _from_injector(where: str, config: Any, overrides: dict[str, Any]) -> Codec:
    recipe = Recipe(config, overrides)
    quantizer = build_quantizer(where, recipe)
    codec = _codec_of(quantizer)
    if _is_one_per_tensor(quantizer):
        if isinstance(codec, AverageCodec):
            raise UnsupportedQuantizerError(
                f"{where}: {config.__name__} averages groups and has a running range; tensors that are "
                "not averaged would need another running range. Leave out one of the two")
        codec = StatefulCodec(partial(_codec_from_recipe, recipe), codec.name)
    codec.recipe = recipe
    return codec


def build_quantizer(where: str, recipe: Recipe) -> nn.Module:
    """Builds the ``tensor_quant`` of a config.

    Args:
        where: the caller, for messages.
        recipe: an activation quantizer's config, and its settings.

    Raises:
        UnknownNameError: the config does not know a setting.
        UnsupportedQuantizerError: the config is not that of an activation quantizer.
        ValueError: a setting is missing.
    """
    config, overrides = recipe.config, recipe.settings
    if not issubclass(config.proxy_class, ActQuantProxyFromInjectorBase):
        raise UnsupportedQuantizerError(
            f"{where}: {config.__name__} quantizes weights or biases; use an activation quantizer, for "
            "instance one of brevitas_bp.quant")
    try:
        check_override_names(where, config.let(**overrides), sorted(overrides))
        return _build(recipe)
    except DependencyError as error:
        raise UnsupportedQuantizerError(
            f"{where}: {config.__name__} cannot be built without more settings: {error}; pass them as "
            "keywords") from error
    except RuntimeError as error:
        _refuse_order(where, config, error)
        if "group_dim" in str(error):
            raise ValueError(
                f"{where}: {config.__name__} needs group_dim, the dimension that its groups run "
                "along; pass for instance group_dim=1") from error
        raise
    except TypeError as error:
        _refuse_order(where, config, error)
        if "quant_type" not in str(error):
            raise
        raise UnsupportedQuantizerError(
            f"{where}: {config.__name__} does not say how values are scaled; derive it from a fragment "
            "with a scale as well, for instance PerBucketMinMax") from error


def _refuse_order(where: str, config: Any, error: Exception) -> None:
    """Raises if fragments are listed after the solver: its settings would then replace theirs."""
    bases = list(config.__mro__)
    if ActQuantSolver not in bases:
        return
    solver = bases.index(ActQuantSolver)
    late = [c.__name__ for c in config.__bases__ if bases.index(c) > solver]
    if late:
        raise UnsupportedQuantizerError(
            f"{where}: {config.__name__} has {', '.join(late)} right of ActQuantSolver, which overrides "
            f"their settings; write class {config.__name__}({', '.join(late)}, ActQuantSolver)"
            ) from error


def _codec_from_recipe(recipe: Recipe) -> Codec:
    # Build on the host, as codec_from does.
    with torch.device("cpu"):
        return _codec_of(_build(recipe))


def _is_one_per_tensor(quantizer: nn.Module) -> bool:
    """Whether each tensor needs its own quantizer. Parameters of a bucket quantizer may be shared."""
    if isinstance(quantizer, (AverageQuant, BucketRescalingIntQuant, BucketLevelQuant)):
        return keeps_statistics(quantizer)
    return is_stateful(quantizer)


def _build(recipe: Recipe) -> nn.Module:
    injector = recipe.config.let(**recipe.settings)
    return tensor_quant_of(injector.proxy_class(nn.Identity(), injector))


def tensor_quant_of(proxy: Any) -> nn.Module:
    """Returns the ``tensor_quant`` of an activation proxy.

    Raises:
        UnsupportedQuantizerError: the proxy quantizes nothing, or applies an activation first.
    """
    fused = getattr(proxy, "fused_activation_quant_proxy", None)
    if fused is None:
        raise UnsupportedQuantizerError(
            f"brevitas_bp.codec: {type(proxy).__name__} quantizes nothing; pass act_quant=None to keep "
            "tensors exact")
    activation = fused.activation_impl
    if kind_of(activation) != "Identity":
        raise UnsupportedQuantizerError(
            f"brevitas_bp.codec: the proxy applies {kind_of(activation)} before it quantizes, "
            "which would change what backward sees; pass the quantizer's config class instead")
    return fused.tensor_quant


class _Draws(TorchDispatchMode):
    """Raises when an operation is about to draw from torch's generator."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # A call with a generator of its own touches no other generator.
        if torch.Tag.nondeterministic_seeded in func.tags and func.namespace != "brevitas_bp" and (
                kwargs.get("generator") is None):
            raise _DrawsError
        return func(*args, **kwargs)


class _DrawsError(Exception):
    """A part draws from torch's generator."""


def _check_rounding(quantizer: nn.Module) -> None:
    """Tries a custom rounding part once: it must give integers, and not draw from torch's generator.

    Raises:
        UnsupportedQuantizerError: the part draws from torch's generator, or gives no integers.
    """
    part: Any = getattr(getattr(quantizer, "int_quant", None), "float_to_int_impl", None)
    if not isinstance(part, nn.Module) or type(part).__module__.partition(".")[0] in _KNOWN:
        return
    size: int = getattr(getattr(quantizer, "input_view_impl", None), "bucket_size", None) or 32

    def tried() -> tuple[bool, list[float]]:
        values = torch.linspace(-3, 3, 2 * size).view(2, size)
        with torch.no_grad(), seeded(0), _Draws():
            codes: Tensor = part(values)
        sound = codes.shape == values.shape and torch.equal(codes, codes.round())
        return sound, codes.reshape(-1)[:4].tolist()

    kind = type(part).__name__
    try:
        sound, codes = undisturbed(tried)
    except _DrawsError as error:
        raise UnsupportedQuantizerError(
            f"brevitas_bp.codec: {kind} draws from torch's generator, so that dropout of the forward "
            "pass would change; take noise from torch.ops.brevitas_bp.noise_like(x), uniform in [0, 1)"
            ) from error
    except Exception:  # It may need other values or another device. This check does not judge that.
        return
    if not sound:
        raise UnsupportedQuantizerError(
            f"brevitas_bp.codec: {kind} must give integers in the shape of its input, and gave {codes}; "
            "it fills float_to_int_impl, which rounds values that are scaled already")


# Packages whose rounding parts are known.
_KNOWN = ("brevitas", "brevitas_bp", "torch")


def _codec_of(quantizer: nn.Module) -> Codec:
    _check_rounding(quantizer)
    if type(quantizer) is AverageQuant:
        return AverageCodec(_codec_of(quantizer.bucket_quant), quantizer.average_size)
    if not isinstance(quantizer, (BucketRescalingIntQuant, BucketLevelQuant)):
        return stock_codec(quantizer)
    if any(True for _ in quantizer.msb_clamp_bit_width_impl.parameters()):
        raise UnsupportedQuantizerError(
            "brevitas_bp.codec: a learned bit width would have to be read from the device for "
            "every saved tensor; use a constant bit_width, or two with the fragment TwoBitWidth")
    spec = lower(quantizer)
    if spec is not None:
        return LoweredCodec(quantizer, spec)
    if isinstance(quantizer, BucketLevelQuant) or quantizer.decoding_draws:
        raise UnsupportedQuantizerError(
            "brevitas_bp.codec: codes of levels, and codes that need their draws again, are stored by "
            f"kernels that know all parts of the quantizer, and a part of {type(quantizer).__name__} is "
            "unknown to them; use the parts of brevitas_bp.core, or give yours a method bucket_stage")
    return ModuleCodec(quantizer)
