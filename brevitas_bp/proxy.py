"""The Brevitas proxy of bucket quantizers."""

from typing import Any

from brevitas.proxy.runtime_quant import ActQuantProxyFromInjector
from torch import Tensor, nn

from brevitas_bp.errors import UnknownNameError, nearest
from brevitas_bp.format.spec import check_bit_width
from brevitas_bp.quant_tensor import BucketwiseIntQuantTensor

# Names that Brevitas' layers and proxies add to every injector.
_ADDED_BY_BREVITAS = frozenset({"module", "proxy_module", "act_impl", "passthrough_act"})


class _ReadNames(dict[str, Any]):
    """Dependencies of an injector that record which names were read."""

    def __init__(self, dependencies: dict[str, Any]) -> None:
        super().__init__(dependencies)
        self.asked: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.asked.add(name)
        return super().get(name, default)


def _names_read(injector: Any) -> set[str]:
    """Returns the names read while quantizer and activation are built, including optional ones."""
    # Some of Brevitas' quantizers hold the proxy that they will become part of.
    proxy = injector.proxy_module if "proxy_module" in injector else nn.Identity()
    probe = injector.let(proxy_module=proxy)
    dependencies = _ReadNames(probe.__dependencies__)
    type.__setattr__(probe, "__dependencies__", dependencies)
    _ = probe.tensor_quant, _activation(probe)
    return dependencies.asked


def check_override_names(where: str, injector: Any, overrides: Any) -> None:
    """Raises for an override that neither the config defines nor any of its components reads.

    Brevitas accepts any keyword and ignores unknown ones.

    Args:
        where: the caller, for the message.
        injector: the config with the overrides applied.
        overrides: names to check.

    Raises:
        UnknownNameError: a name is unknown; the message suggests the nearest known name.
    """
    config = _config_of(injector)
    known = set(config.__dependencies__) | _ADDED_BY_BREVITAS
    unknown = [name for name in overrides if name not in known]
    if not unknown:
        return
    read = _names_read(injector)
    for name in unknown:
        if name not in read:
            settings = {n for n in known | read if not n.startswith("_")} - set(unknown)
            raise UnknownNameError(
                f"{where}: {config.__name__} has no setting {name!r}{nearest(name, settings)}")


def _config_of(injector: Any) -> Any:
    """Returns the class that the user wrote, below the classes that ``let`` made."""
    return next(c for c in injector.__mro__ if c.__module__ != "brevitas.inject")


class _FusedActQuant(nn.Module):
    """Applies the activation, then the quantizer.

    It is plain Python, so that ``tensor_quant`` keeps its methods.
    """

    def __init__(self, activation_impl: nn.Module, tensor_quant: nn.Module) -> None:
        super().__init__()
        self.activation_impl = activation_impl
        self.tensor_quant = tensor_quant

    def forward(self, x: Tensor) -> Any:
        return self.tensor_quant(self.activation_impl(x))


class BucketwiseActQuantProxyFromInjector(ActQuantProxyFromInjector):
    """Holds a bucket quantizer for Brevitas layers. Fills the slot ``proxy_class``.

    Raises:
        UnknownNameError: the config does not know a keyword override.
        ValueError: a bit width outside 1..8.
    """

    def __init__(self, quant_layer: nn.Module, quant_injector: Any) -> None:
        _check_against_config(quant_injector)
        super().__init__(quant_layer, quant_injector)
        self.cache_class = _CachedBucketwise

    def init_tensor_quant(self) -> None:
        """Builds the quantizer; Brevitas calls this again when a checkpoint is loaded."""
        tensor_quant = self._injector.tensor_quant
        if tensor_quant is None:
            super().init_tensor_quant()
            return
        # With BREVITAS_JIT=1 the stock fused proxy is a ScriptModule, which would script our quantizer.
        self.fused_activation_quant_proxy = _FusedActQuant(
            _activation(self._injector), tensor_quant)
        self.is_quant_enabled = True

    @property
    def bucket_size(self) -> int | None:
        """Elements of a bucket; None: the whole tensor is one bucket."""
        return self._injector.bucket_size

    @property
    def average_size(self) -> int:
        """Neighbours along the last dimension that share one code."""
        return self._injector.average_size if "average_size" in self._injector else 1

    @property
    def has_codes(self) -> bool:
        """Whether codes can be recomputed from values, see :class:`BucketwiseIntQuantTensor`."""
        tensor_quant: Any = self.fused_activation_quant_proxy.tensor_quant
        quantizer = getattr(tensor_quant, "bucket_quant", tensor_quant)
        transformed = getattr(quantizer, "transform_impl", None) is not None
        return not (transformed or getattr(quantizer, "decoding_draws", False))

    @property
    def _injector(self) -> Any:
        # Injectors define their attributes at run time.
        return self.quant_injector

    @property
    def requires_export_handler(self) -> bool:
        """False: bucket quantizers have no export format and run unchanged in export and inference."""
        return False

    def compile_quant(self, compile_export: bool = False) -> None:
        """Does nothing: the quantizer compiles as part of its layer."""

    def apply_input_view(self, x: Tensor) -> Tensor:
        """Returns ``x`` unchanged: values keep their own shape."""
        return x

    def create_quant_tensor(
            self, qt_args: Tensor | tuple[Any, ...], x: Any) -> Any:
        if isinstance(qt_args, tuple):
            value, scale, zero_point, bit_width = qt_args
            return BucketwiseIntQuantTensor(
                value, scale, zero_point, self.bucket_size, bit_width, bool(self.is_signed),
                self.training, self.average_size, self.has_codes)
        return BucketwiseIntQuantTensor(
            qt_args, x.scale, x.zero_point, self.bucket_size, x.bit_width, x.signed,
            self.training, x.average_size, x.has_codes)


class _CachedBucketwise:
    """Metadata of the last quantized tensor. Brevitas caches it in inference."""

    def __init__(self, quant_tensor: BucketwiseIntQuantTensor, metadata_only: bool) -> None:
        self.shape = quant_tensor.value.shape
        self.value = None if metadata_only else quant_tensor.value
        self.scale = quant_tensor.scale
        self.zero_point = quant_tensor.zero_point
        self.bit_width = quant_tensor.bit_width
        self.signed = quant_tensor.signed
        self.bucket_size = quant_tensor.bucket_size
        self.average_size = quant_tensor.average_size
        self.has_codes = quant_tensor.has_codes


def _activation(injector: Any) -> nn.Module:
    """Returns the layer's activation.

    Hardtanh is kept too: a range taken from the data does not replace it.
    """
    activation = injector.act_impl if "act_impl" in injector else None
    return nn.Identity() if activation is None else activation


def _check_against_config(injector: Any) -> None:
    """Refuses misspelt keywords, and a bit width for which Brevitas would only fail an assertion."""
    added = set(injector.__dependencies__) - set(_config_of(injector).__dependencies__)
    check_override_names("brevitas_bp quantizer", injector, sorted(added))
    if "bit_width" in injector:
        check_bit_width("brevitas_bp quantizer", injector.bit_width)
