"""The codec interface, and the stored tensor that a codec returns."""

import zlib
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from brevitas_bp.codec.checksum import checksum
from brevitas_bp.codec.derivatives import derivative_at
from brevitas_bp.codec.derived import variants
from brevitas_bp.codec.graph_forms import GraphForm, GraphTensor
from brevitas_bp.codec.integrity import TensorType, check_types, refuse, versions_of
from brevitas_bp.codec.layout import PLAIN as PLAIN
from brevitas_bp.codec.layout import TensorLayout
from brevitas_bp.codec.layout import is_plain as is_plain
from brevitas_bp.codec.recipe import Recipe
from brevitas_bp.errors import UnsupportedTensorError
from brevitas_bp.format.arithmetic import compute_dtype
from brevitas_bp.format.normalizing import Affine, denormalize, normalize

#: Dtypes of real floating-point numbers, of 16 to 64 bits.
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class _Referable:
    """Adds the slot for weak references to a class with slots."""

    __slots__ = ("__weakref__",)


@dataclass(frozen=True, eq=False, init=False, slots=True)
class Packed(_Referable):
    """A stored tensor. It is self-contained and immutable, and every decode gives the same bits.

    Attributes:
        codec: decodes it.
        tensors: everything that takes memory.
        layout: layout of the decoded tensor.
        facts: static facts of the codec.
        where: operation and module that saved the tensor, for messages.
        seal: checksum of tensors and layout, see :meth:`sealed`; None: not requested.
        nbytes: bytes of all stored tensors: codes, padding, metadata, checksum.
        versions: version counters of the tensors; empty if the codec neither owns nor keeps them.

    A copy or a pickle holds copies of the tensors, so it notes their versions anew.
    """

    codec: "Codec"
    tensors: tuple[Tensor, ...]
    layout: TensorLayout
    facts: Any = None
    where: str = ""
    seal: Tensor | None = None
    nbytes: int = field(init=False)
    versions: tuple[int | None, ...] = field(init=False)

    def __init__(
            self, codec: "Codec", tensors: tuple[Tensor, ...], layout: TensorLayout,
            facts: Any = None, where: str = "", seal: Tensor | None = None) -> None:
        nbytes = 0 if seal is None else seal.element_size()
        for tensor in tensors:
            nbytes += tensor.numel() * tensor.element_size()
        put = object.__setattr__
        put(self, "codec", codec)
        put(self, "tensors", tensors)
        put(self, "layout", layout)
        put(self, "facts", facts)
        put(self, "where", where)
        put(self, "seal", seal)
        put(self, "nbytes", nbytes)
        put(self, "versions", versions_of(tensors) if codec.owns or codec.keeps else ())

    def __reduce__(self) -> Any:
        if self.codec.owns:
            self._check()  # A copy must not hide that somebody has changed the original.
        return Packed, (
            self.codec, self.tensors, self.layout, self.facts, self.where, self.seal)

    def decode(self) -> Tensor:
        """Returns the tensor, with its original shape, strides, dtype and device.

        Raises:
            CorruptPayloadError: the stored tensors have changed since they were stored; see
                NOTE [ A corrupted payload is refused ].
        """
        self.checked()
        return self.codec.decode(self)

    def checked(self) -> tuple[Tensor, ...]:
        """Returns the stored tensors, after the checks of :meth:`decode`."""
        if self.codec.owns:
            self._check()
        return self.tensors

    @property
    def is_smaller(self) -> bool:
        """Whether it takes less memory than the tensor; see :func:`is_smaller`."""
        return is_smaller(self.nbytes, self.layout.nbytes)

    @property
    def innermost(self) -> "Packed":
        """The ``Packed`` of the codec that chose the bytes, inside codecs that change order or units."""
        return self.facts.innermost if self.codec.wraps else self

    def with_tensors(self, tensors: tuple[Tensor, ...]) -> "Packed":
        """Returns this ``Packed`` with the first of ``tensors`` in place of its own tensors."""
        own = tensors[:len(self.tensors)]
        same = all(a is b for a, b in zip(own, self.tensors, strict=True))
        return self if same else replace(self, tensors=own)

    def sealed(self) -> "Packed":
        """Returns a copy with a checksum, which :meth:`decode` compares.

        If the codec does not own the tensors, this is the ``Packed`` itself.
        """
        return replace(self, seal=self._checksum()) if self.codec.owns else self

    def _check(self) -> None:
        versions = versions_of(self.tensors)
        if versions != self.versions:
            refuse(self, f"stored tensors at versions {self.versions}", f"versions {versions}")
        if not (self.layout.made_here or self.layout.is_sound()):
            refuse(self, "strides that address every stored element once", self.layout)
        types = self.codec.tensor_types(self)
        if types is not None:
            check_types(self, types)
        if self.seal is not None and not torch.equal(self._checksum(), self.seal):
            refuse(self, f"checksum {int(self.seal)}", int(self._checksum()))

    def _checksum(self) -> Tensor:
        return checksum(self.tensors) + zlib.crc32(repr(self.layout).encode())


def is_smaller(stored: int, given: int) -> bool:
    """Whether storing takes fewer bytes than keeping the tensor (the break-even rule).

    Args:
        stored: bytes of everything that would be stored: codes, padding, metadata.
        given: bytes of the tensor.
    """
    return stored < given


class Codec(ABC):
    """Stores tensors: ``encode(Tensor) -> Packed``, ``decode(Packed) -> Tensor``.

    An implementation has no state that changes what an existing :class:`Packed` decodes to.

    NOTE [ A codec answers for itself ]
    Policies, hooks, plans and compiled graphs never ask which class a codec has. They ask the codec for:

    * a codec with another width: :meth:`variant`, :meth:`at_least`,
    * a codec without averages: :attr:`per_element`,
    * the codec of a call site: :meth:`at_site`,
    * its form in a compiled graph: :meth:`in_graph`,
    * its quantizers: :meth:`quantizers`.

    Each of these has a default, for codecs without the feature. A codec without any of these features
    needs only ``encode`` and ``decode``. It should also have ``tensor_types`` and ``stored_nbytes``.
    """

    #: Shown in reports.
    name: str = "codec"
    #: Whether encoding is useful only if the result is smaller.
    compresses: bool = True
    #: The recipe it was built from; None: unknown, so it cannot be built again with other settings.
    recipe: Recipe | None = None
    #: Whether the stored tensors are the codec's own memory, which nobody else may write to.
    owns: bool = True
    #: Whether it keeps the given tensor itself, not a copy.
    keeps: bool = False
    #: Whether the decoded tensor may differ from the encoded one.
    lossy: bool = True
    #: Whether its payload is that of another codec, whose ``Packed`` is in the facts.
    wraps: bool = False
    #: Dtypes of the tensors that it can restore; None: any.
    restores: tuple[torch.dtype, ...] | None = None
    #: Whether each decode returns new memory, which the caller may write to.
    decodes_anew: bool = False
    #: Whether it decodes no negative number if none was encoded.
    keeps_sign: bool = False
    #: Whether it stores any numbers in the range that they have, differences as well as the tensor.
    stores_differences: bool = False
    #: Elements of a bucket; 0: buckets end with rows, but have any number of elements; None: unknown.
    bucket_elements: int | None = None
    #: Whether its first stored tensor is a packed mask of the elements inside a region.
    masks: bool = False
    #: Widths of its codes, if it has variants with other widths; otherwise empty.
    bit_widths: tuple[int, ...] = ()
    #: Whether it stores nothing of the tensor, but computes it from others.
    computes: bool = False
    #: Whether compiled graphs can store with it; see :meth:`in_graph`.
    in_graphs: bool = False

    @abstractmethod
    def encode(self, x: Tensor, *, seed: int, where: str = "") -> Packed:
        """Stores ``x``; all randomness comes from ``seed``."""

    @abstractmethod
    def decode(self, packed: Packed) -> Tensor:
        """Restores an encoded tensor. Call :meth:`Packed.decode` instead, which checks it first."""

    def layout_of(self, x: Tensor, where: str = "") -> TensorLayout:
        """Returns the layout of a tensor that is to be stored.

        Raises:
            UnsupportedTensorError: the codec does not restore its dtype.
        """
        if self.restores is not None and x.dtype not in self.restores:
            named = ", ".join(str(dtype).removeprefix("torch.") for dtype in self.restores)
            raise UnsupportedTensorError(
                f"brevitas_bp: the codec {self.name!r} stores tensors of {named}, got {x.dtype} "
                f"{list(x.shape)}{' saved by ' + where if where else ''}; to keep the tensor as it is, "
                "the policy must return None")
        return TensorLayout.of(x)

    def tensor_types(self, packed: Packed) -> Sequence[TensorType] | None:
        """Returns what layout and facts require of the stored tensors; None if the codec cannot tell.

        Raises:
            CorruptPayloadError: facts and layout disagree.
        """
        return None

    def stored_nbytes(self, layout: TensorLayout) -> int | None:
        """Returns the least bytes that a tensor of this layout takes; None if only encoding can tell."""
        return None

    def in_rows(self, length: int, last: int) -> "Codec":
        """Returns this codec with buckets that end with each row; see :mod:`~brevitas_bp.codec.rows`.

        A codec without buckets returns itself. A new codec must not hold this one: the table that
        remembers the new one (:mod:`~brevitas_bp.codec.derived`) would keep both forever.

        Args:
            length: elements of a row, which are consecutive in memory.
            last: elements of the last dimension; a row is a multiple or a part of it.
        """
        return self

    @property
    def per_element(self) -> "Codec":
        """The codec with one code per element if this codec averages, else this codec."""
        return self

    def variant(
            self, bits: int, bucket_size: int | None = None, average_size: int = 1) -> "Codec | None":
        """Returns this codec with another width, bucket size or averages; None if it has no widths.

        Rounding, scale rule and all other parts are those of this codec. A mix of two widths becomes one
        width. Each variant is made once (:mod:`~brevitas_bp.codec.derived`). A codec that already has
        the width returns itself.

        Args:
            bits: width of each code.
            bucket_size: codes per bucket; None: the bucket size of this codec.
            average_size: elements whose mean is stored as one code.

        Raises:
            ValueError: the quantizer cannot have this width.
        """
        if average_size == 1 and bucket_size is None and self.bit_widths == (bits,):
            return self
        return variants.get(
            self, (bits, bucket_size, average_size),
            lambda: self._variant(bits, bucket_size, average_size))

    def _variant(self, bits: int, bucket_size: int | None, average_size: int) -> "Codec | None":
        """Makes the codec of :meth:`variant`, which must not hold this one (see :meth:`in_rows`)."""
        return None

    def is_finer_than(self, other: "Codec") -> bool:
        """Whether it can stand for ``other``: of one quantizer, with as many bits, in the same buckets.

        Its payload must depend on the elements in the order of memory, but not on the shape.
        """
        return False

    def as_given(self, packed: "Packed") -> "Packed":
        """Returns what another codec may take for given; it must decode to the same at all times."""
        return packed

    def factors(self, row: int) -> Tensor | None:
        """Returns by what it multiplies each element of a row [row] before it stores it; None: by 1."""
        return None

    def counted(self, packed: "Packed") -> Tensor | None:
        """Returns which elements, in the order of memory, get the rounding error; None: all."""
        return None

    def without_units(self, packed: "Packed") -> "Packed":
        """Returns a ``Packed`` of this codec as its innermost codec decodes it."""
        return packed.innermost

    def at_least(self, bits: int) -> "Codec":
        """Returns a codec with ``bits`` bits or more per element; itself if it has no widths.

        Averages become codes of elements: more bits would not remove the bias of an average.
        """
        if not self.bit_widths or min(self.bit_widths) >= bits:
            return self
        return self.variant(bits) or self

    def of_kind(self, kind: str) -> "Codec | None":
        """Returns this codec with another kind of code, for instance "rotated"; None if it has none."""
        return None

    @property
    def postponed(self) -> "Codec":
        """The codec that encodes when backward asks, if this codec waits until then; else this codec."""
        return self

    @property
    def for_factors(self) -> "Codec":
        """The codec for factors of passing gradients, such as derivatives."""
        return self

    def for_rest(self, spared: int) -> "Codec":
        """Returns the codec for what a derivative does not tell of a factor; itself, if it is fixed.

        Args:
            spared: bits by which its codes may be narrower.
        """
        return self

    @property
    def for_values(self) -> "Codec":
        """The codec for tensors whose zeros and signs matter."""
        return self

    @property
    def for_probabilities(self) -> "Codec | None":
        """The codec for numbers of which most are far below the largest; None if it has none."""
        return None

    @property
    def for_magnitudes(self) -> "Codec | None":
        """The codec for numbers that each need an error relative to themselves; None if it has none."""
        return None

    @property
    def precise(self) -> "Codec":
        """This codec, with metadata that are not rounded."""
        return self

    def is_variant_of(self, configured: "Codec") -> bool:
        """Whether this codec is ``configured``, perhaps with another width or for another use."""
        plain = configured.per_element
        return self is configured or self is plain or variants.has(plain, self)

    @property
    def per_site(self) -> bool:
        """Whether each call site has a codec of its own."""
        return False

    def at_site(self, key: Hashable) -> "Codec":
        """Returns the codec of the call site ``key``; itself unless ``per_site``."""
        return self

    def quantizers(self) -> Iterator[nn.Module]:
        """Yields the quantizers that it encodes with."""
        yield from ()

    def graph_key(self) -> Hashable | None:
        """Returns a key shared by codecs that store alike in compiled graphs; None: shared with none."""
        return None

    def in_graph(self, x: GraphTensor) -> GraphForm | None:
        """Returns its form for a tensor of a compiled graph; None: the graph keeps the tensor."""
        return None

    def encode_derivative(self, x: Tensor, name: str, *, seed: int, where: str = "") -> Packed:
        """Stores the derivative of an activation at ``x``.

        Args:
            x: the input or the output of the activation, whichever its derivative takes.
            name: a derivative in :mod:`~brevitas_bp.activations.derivatives` that supports ``x``.
            seed: seed of all randomness.
            where: operation and module, for messages.
        """
        return self.encode(derivative_at(x, name), seed=seed, where=where)

    def encode_normalized(self, x: Tensor, affine: Affine, *, seed: int, where: str = "") -> Packed:
        """Stores ``x`` normalized by ``affine``, whose statistics follow the order of memory."""
        layout = TensorLayout.of(x)
        with torch.no_grad():
            values = normalize(layout.flatten(x.detach()), affine).to(x.dtype)
        return self.encode(layout.restore_flat(values), seed=seed, where=where)

    def decode_normalized(self, packed: Packed, affine: Affine) -> Tensor:
        """Restores a tensor that :meth:`encode_normalized` stored; ``affine`` undoes its affine map."""
        values, layout = packed.decode(), packed.layout
        with torch.no_grad():
            flat = layout.flatten(values).to(compute_dtype(layout.dtype))
            return layout.restore_flat(denormalize(flat, affine, layout.dtype))
