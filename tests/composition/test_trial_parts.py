"""A rounding, a transform and a codec defined only here work everywhere that users meet them.

Each is one row or one class. Wrapper, plan, least width, report and compiled graph do not know it.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from brevitas.quant.solver.act import ActQuantSolver
from torch import Tensor, nn

from brevitas_bp import Codec, Packed, QuantBackwardWrapper, codec_from, track_saved_memory
from brevitas_bp.codec.quantized import LoweredCodec
from brevitas_bp.format.stages import Rounding, Stage, Transform
from brevitas_bp.kernels import dispatch
from brevitas_bp.quant.base import PerBucketL2, PerBucketMinMax, StochasticRounding


def _dithered(u: Tensor, noise: Tensor | None, top: int) -> Tensor:
    """Computes ``floor(u + noise)``: rounds up with a probability equal to the fraction."""
    assert noise is not None
    return u.add_(noise).floor_()


DITHERED = Rounding("trial dithered", 2001, _dithered, encoding_draws=True)


class DitheredRound(nn.Module):
    """The module of :data:`DITHERED`."""

    def __init__(self) -> None:
        super().__init__()

    def bucket_stage(self, slot: str) -> Rounding | None:
        return DITHERED if slot == "float_to_int_impl" else None

    def forward(self, x: Tensor) -> Tensor:
        return torch.floor(x + torch.ops.brevitas_bp.noise_like(x))


def _butterfly(x: Tensor, buckets: Tensor | None = None, seed: int = 0) -> Tensor:
    """Computes sums and differences of both halves of a bucket; it is its own inverse."""
    a, b = x.chunk(2, -1)
    return torch.cat((a + b, a - b), -1) * 0.5**0.5


BUTTERFLY = Transform("trial butterfly", 2002, _butterfly, _butterfly)


class Butterfly(nn.Module):
    """The module of :data:`BUTTERFLY`."""

    def __init__(self) -> None:
        super().__init__()

    def bucket_stage(self, slot: str) -> Transform | None:
        return BUTTERFLY if slot == "transform_impl" else None

    def forward(self, x: Tensor) -> Tensor:
        return _butterfly(x)

    def inverse(self, y: Tensor) -> Tensor:
        return _butterfly(y)


class Dithered2(PerBucketMinMax, ActQuantSolver):
    float_to_int_impl = DitheredRound
    bit_width = 2
    bucket_size = 64


class Butterfly2(StochasticRounding, PerBucketMinMax, ActQuantSolver):
    transform_impl = Butterfly
    bit_width = 2
    bucket_size = 64


class DitheredL2(PerBucketL2, ActQuantSolver):
    float_to_int_impl = DitheredRound
    bit_width = 4
    bucket_size = 64


class UnknownRound(nn.Module):
    """A :class:`DitheredRound` without a row of a stage table, so it runs as a module."""

    bucketwise = True

    def __init__(self) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return torch.floor(x + torch.ops.brevitas_bp.noise_like(x))


class Unknown2(PerBucketMinMax, ActQuantSolver):
    float_to_int_impl = UnknownRound
    bit_width = 2
    bucket_size = 64


class AcrossRound(nn.Module):
    """Looks at all buckets, and has a ``bucket_stage`` that names no row."""

    def __init__(self) -> None:
        super().__init__()

    def bucket_stage(self, slot: str) -> Rounding | None:
        return None

    def forward(self, x: Tensor) -> Tensor:
        return torch.floor(x + x.mean())


class NumberedRound(nn.Module):
    """Rounds to the nearest. Its ``bucket_stage`` is a number of its own, not a method."""

    bucket_stage = 3

    def __init__(self) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return torch.round(x)


class ByteSwap(Codec):
    """A lossless codec: reorders the bytes of the tensor, and compresses them if all are zero."""

    name = "trial bytes"
    lossy = False

    def encode(self, x: Tensor, *, seed: int, where: str = "") -> Packed:
        layout = self.layout_of(x, where)
        return Packed(self, (layout.flatten(x.detach()).flip(0).clone(),), layout, None, where)

    def decode(self, packed: Packed) -> Tensor:
        return packed.layout.restore_flat(packed.tensors[0].flip(0))


@pytest.fixture(scope="module", autouse=True)
def _rows_go_when_the_tests_have_run() -> Iterator[None]:
    yield
    rows: list[Stage] = [DITHERED, BUTTERFLY]
    for row in rows:
        del type(row).rows[row.name]


CONFIGS: list[Any] = [Dithered2, Butterfly2, DitheredL2]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 32))


@pytest.mark.parametrize("config", CONFIGS)
def test_it_lowers_to_its_row_and_the_reference_serves_it(config: Any) -> None:
    codec = codec_from(config)
    assert isinstance(codec, LoweredCodec)
    assert {codec.spec.rounding, codec.spec.transform} & {DITHERED, BUTTERFLY}
    served = dispatch.backend(torch.device("cpu"), codec.spec, 4096, torch.float32)
    assert served.__name__ == "brevitas_bp.format.reference"


@pytest.mark.parametrize("config", CONFIGS)
def test_the_row_gives_the_bytes_of_the_modules(config: Any) -> None:
    from brevitas_bp.codec.general import ModuleCodec

    lowered = codec_from(config)
    assert isinstance(lowered, LoweredCodec)
    x = torch.randn(37, 50)
    expected = lowered.encode(x, seed=3)
    got = ModuleCodec(lowered.quantizer).encode(x, seed=3)
    for a, b in zip(expected.tensors, got.tensors, strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    assert torch.equal(expected.decode(), got.decode())


@pytest.mark.parametrize("config", [*CONFIGS, Unknown2])
def test_more_bits_keep_the_part(config: Any) -> None:
    wide = codec_from(config).at_least(5)
    assert wide.bit_widths == (5,)
    x = torch.randn(64, 64)
    narrow = codec_from(config)
    errors = [
        float((c.encode(x, seed=1).decode() - x).square().mean()) for c in (narrow, wide)]
    assert errors[1] < errors[0] / 2
    if isinstance(wide, LoweredCodec):
        assert {wide.spec.rounding, wide.spec.transform} & {DITHERED, BUTTERFLY}
        assert wide.spec.scale_rule is narrow.spec.scale_rule  # pyright: ignore
    else:
        (quantizer,) = wide.quantizers()
        assert any(type(part) is UnknownRound for part in quantizer.modules())


@pytest.mark.parametrize("config", [*CONFIGS, Unknown2])
def test_gradients_of_a_wrapped_network_are_unbiased(config: Any) -> None:
    x = torch.randn(128, 64)
    plain = network()
    plain(x).square().sum().backward()
    expected = plain[0].weight.grad
    assert isinstance(expected, Tensor)
    total, draws = torch.zeros_like(expected), 60
    own = network()
    model = QuantBackwardWrapper(own, config, seed=1)
    singles = []
    for _ in range(draws):
        model.zero_grad()
        model(x).square().sum().backward()
        grad = own[0].weight.grad
        assert isinstance(grad, Tensor)
        total += grad
        singles.append(float((grad - expected).norm() / expected.norm()))
    # The mean of independent draws has 1 / sqrt(draws) of their error; a third of that is the margin.
    noise = sum(singles) / draws
    assert 0 < float((total / draws - expected).norm() / expected.norm()) < noise / draws**0.5 * 1.33


@pytest.mark.parametrize("config", [*CONFIGS, Unknown2])
def test_a_plan_chooses_its_width_and_the_report_counts_its_bytes(config: Any) -> None:
    x = torch.randn(512, 64)
    stored = {}
    for bits in (2, 8):
        model = QuantBackwardWrapper(network(), config, plan={"0:linear:*": bits})
        with track_saved_memory(model) as report:
            loss = model(x).sum()
        rows = {(row.module, row.op): row.stored_bytes for row in report.rows}
        stored[bits] = rows["0", "linear"]
        loss.backward()
    metadata = 512 * 4 * (1 if config is DitheredL2 else 2)
    assert stored == {bits: 512 * 64 * bits // 8 + metadata for bits in (2, 8)}


@pytest.mark.parametrize("config", CONFIGS)
def test_a_compiled_graph_stores_with_it(config: Any) -> None:
    x = torch.randn(512, 64)
    model = QuantBackwardWrapper(torch.compile(network(), backend="aot_eager"), config)
    with track_saved_memory(model) as report:
        loss = model(x).sum()
    assert report.stored_bytes < report.exact_bytes / 2
    loss.backward()


def test_a_compiled_graph_says_why_it_does_not_store_with_modules() -> None:
    model = QuantBackwardWrapper(torch.compile(network(), backend="aot_eager"), Unknown2)
    with pytest.warns(UserWarning, match="compiled graphs cannot store"):
        model(torch.randn(8, 64)).sum().backward()


def of_rounding(part: Any) -> Any:
    class Config(PerBucketMinMax, ActQuantSolver):
        float_to_int_impl = part
        bit_width = 2
        bucket_size = 64

    return codec_from(Config)


def test_a_part_that_names_no_row_is_not_taken_for_one_that_works_bucket_by_bucket() -> None:
    codec = of_rounding(AcrossRound)
    assert not codec.bucketwise and not isinstance(codec, LoweredCodec)
    # Large enough for chunks, with buckets that differ from chunk to chunk.
    x = torch.randn(1 << 18)
    x[:1 << 16].exp_()
    assert torch.equal(codec.encode(x, seed=1).decode(), codec.quantizer(x)[0])


def test_an_attribute_that_is_no_method_names_no_row() -> None:
    codec = of_rounding(NumberedRound)
    assert not isinstance(codec, LoweredCodec)
    x = torch.randn(1024)
    assert torch.equal(codec.encode(x, seed=1).decode(), codec.quantizer(x)[0])


def test_a_codec_of_the_users_own_runs_through_all_of_it() -> None:
    x, codec = torch.randn(512, 64), ByteSwap()
    own = network()
    model = QuantBackwardWrapper(own, Dithered2, policy=lambda saved: codec)
    with track_saved_memory(model) as report:
        loss = model(x).square().sum()
    # The codec saves no bytes here, so the tensor is kept.
    assert report.stored_bytes == report.exact_bytes
    loss.backward()
    plain = network()
    plain(x).square().sum().backward()
    assert torch.equal(own[0].weight.grad, plain[0].weight.grad)  # pyright: ignore
    assert codec.at_least(4) is codec and codec.variant(4) is None and codec.bit_widths == ()
    assert torch.equal(codec.encode(x, seed=0).decode(), x)
