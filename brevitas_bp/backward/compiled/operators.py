"""Operators that encode a tensor in a compiled graph, with a seed of the pass that runs the graph."""

from typing import Any

import torch
from torch import Tensor

from brevitas_bp.backward.location import current_location
from brevitas_bp.codec.graph_forms import FLEXIBLE
from brevitas_bp.format.arithmetic import compute_dtype, stored_metadata_dtype
from brevitas_bp.format.normalizing import Affine
from brevitas_bp.format.packing import packed_nbytes
from brevitas_bp.format.reference import bucket_shape
from brevitas_bp.format.spec import BucketQuantSpec
from brevitas_bp.kernels import dispatch

_library = torch.library.Library("brevitas_bp", "FRAGMENT")
_DRAWS = FLEXIBLE + tuple(
    getattr(torch.Tag, name) for name in ("nondeterministic_seeded", "cudagraph_unsafe")
    if hasattr(torch.Tag, name))
# See NOTE [ Graphs call the kernels ]. ``site`` numbers the calls, so that calls with otherwise equal
# arguments are not merged.
_library.define(
    "encode(Tensor x, str spec, int graph, int site, int? filled_row=None) -> (Tensor, Tensor)",
    tags=_DRAWS)
_library.define(
    "encode_channels(Tensor x, str spec, int graph, int site, int dim, Tensor? variance=None, "
    "Tensor? mean=None) -> (Tensor, Tensor, Tensor)",
    tags=_DRAWS)
# The same, if decoding needs the seed. The seed is an int64 tensor [1] on the host.
_library.define(
    "encode_seeded(Tensor x, str spec, int graph, int site, int? filled_row=None) -> "
    "(Tensor, Tensor, Tensor)",
    tags=_DRAWS)
_library.define(
    "encode_channels_seeded(Tensor x, str spec, int graph, int site, int dim, Tensor? variance=None, "
    "Tensor? mean=None) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=_DRAWS)


def _seed_in(graph: int) -> int:
    """Returns the next seed of this thread's forward pass, and notes that the graph ran."""
    location = current_location()
    assert location is not None and location.next_seed is not None, "graph outside of its wrapper"
    location.graphs.add(graph)
    return location.next_seed()


def _encode_channels_seeded(
        x: Tensor, spec: str, graph: int, site: int, dim: int, variance: Tensor | None = None,
        mean: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Encodes like :func:`_encode_seeded`, but in units of channels.

    Returns means and deviations [2, K] before the seed. ``variance`` and ``mean`` come from the norm
    that reads ``x``. Without them, this operator computes them from ``x``.
    """
    seed = _seed_in(graph)
    flat = x.reshape(-1).resolve_neg().contiguous()
    channels = x.shape[dim]
    if variance is None or mean is None:
        variance, mean = torch.var_mean(
            x.to(compute_dtype(x.dtype)), [d for d in range(x.dim()) if d != dim], correction=0)
    statistics = torch.stack((mean.reshape(-1), variance.reshape(-1).sqrt())).to(
        compute_dtype(x.dtype))
    scale = torch.where(statistics[1] > 0, statistics[1].reciprocal(), 0)
    affine = Affine(scale, statistics[0], x[0].numel() // channels if dim == 1 else 1)
    launcher = dispatch.launcher_from_text(spec, x.numel(), x.dtype, x.device)
    return *launcher.encode(flat, seed, affine=affine), statistics, _stored(seed)


def _encode_channels(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _encode_channels_seeded(*arguments)[:3]


def _encode_seeded(
        x: Tensor, spec: str, graph: int, site: int,
        filled_row: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Returns payload, metadata and seed of a tensor that a graph saves in this forward pass.

    ``filled_row``: elements of the rows whose zeros are filled, because their place is stored; 0: the
    tensor is one row; None: no zeros are filled.
    """
    seed = _seed_in(graph)
    launcher = dispatch.launcher_from_text(spec, x.numel(), x.dtype, x.device)
    flat = x.reshape(-1).resolve_neg().contiguous()
    if filled_row is not None:
        flat = dispatch.fill_zeros(flat, filled_row or flat.numel())
    return *launcher.encode(flat, seed), _stored(seed)


def _encode(*arguments: Any) -> tuple[Tensor, Tensor]:
    return _encode_seeded(*arguments)[:2]


def _stored(seed: int) -> Tensor:
    return torch.tensor([seed - (1 << 64) if seed >= 1 << 63 else seed], device="cpu")


for _name, _function in (
        ("encode", _encode), ("encode_seeded", _encode_seeded), ("encode_channels", _encode_channels),
        ("encode_channels_seeded", _encode_channels_seeded)):
    _library.impl(_name, _function, "CompositeExplicitAutograd")


def _fake_seed() -> Tensor:
    return torch.empty(1, dtype=torch.int64, device="cpu")


@torch.library.register_fake("brevitas_bp::encode_channels_seeded", lib=_library)
def _encode_channels_seeded_fake(
        x: Tensor, spec: str, graph: int, site: int, dim: int, variance: Tensor | None = None,
        mean: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *_encode_channels_fake(x, spec, graph, site, dim), _fake_seed()


@torch.library.register_fake("brevitas_bp::encode_seeded", lib=_library)
def _encode_seeded_fake(
        x: Tensor, spec: str, graph: int, site: int,
        filled_row: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    return *_encode_fake(x, spec, graph, site), _fake_seed()


@torch.library.register_fake("brevitas_bp::encode_channels", lib=_library)
def _encode_channels_fake(
        x: Tensor, spec: str, graph: int, site: int, dim: int, variance: Tensor | None = None,
        mean: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    statistics = x.new_empty((2, x.shape[dim]), dtype=compute_dtype(x.dtype))
    return *_encode_fake(x, spec, graph, site), statistics


@torch.library.register_fake("brevitas_bp::encode", lib=_library)
def _encode_fake(
        x: Tensor, spec: str, graph: int, site: int,
        filled_row: int | None = None) -> tuple[Tensor, Tensor]:
    own = BucketQuantSpec.from_text(spec)
    n, size = bucket_shape(x.numel(), own.bucket_size, own.row_size)
    stored = stored_metadata_dtype(own.metadata_dtype, compute_dtype(x.dtype))
    return (
        x.new_empty(n * packed_nbytes(size, own.bit_width), dtype=torch.uint8),
        x.new_empty(n * (1 + own.affine), dtype=stored))
