"""Windows: the sign is exact, bins are those of the formula, and few values are clipped."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

from brevitas_bp import OpAware, QuantBackwardWrapper, SavedTensor, track_saved_memory
from brevitas_bp.backward.saved import Decision
from brevitas_bp.codec import Codec, WindowedCodec
from brevitas_bp.codec.plain import plain_codec
from brevitas_bp.codec.rows import Rows
from tests.codec.test_published import maps
from tests.stats import hoeffding
from tests.strategies import FINITE, MODERATE, normals

#: The least magnitude that counts: smaller numbers may vanish when they are decoded.
_TINY = {torch.float16: 6e-8, torch.bfloat16: 1e-38, torch.float32: 1e-38, torch.float64: 1e-307}


@given(x=maps(tuple(FINITE), (4,)), bits=st.integers(1, 8))
def test_the_sign_is_exact(x: Tensor, bits: int) -> None:
    packed = WindowedCodec(bits).encode(x, seed=0)
    assume(isinstance(packed.codec, WindowedCodec))
    decoded = packed.decode()
    visible = (x.abs() >= _TINY[x.dtype]) | (x == 0)
    assume(bool(visible.all()))
    positive = decoded > 0
    # A bin of subnormal or half-precision numbers may have a middle that rounds to 0.
    assert not bool((positive & (x <= 0)).any())
    assert not bool(((decoded < 0) & (x > 0)).any())
    if x.dtype in (torch.float32, torch.float64) and float(x.abs().max()) > 1e-30:
        assert torch.equal(positive, x > 0)


def test_a_codec_with_its_bins_elsewhere_loses_signs() -> None:
    # The control: the ordinary quantizer of as many bits.
    x = normals((8, 4, 16, 16)).float().relu()
    decoded = plain_codec(4).encode(x, seed=0).decode()
    assert not torch.equal(decoded > 0, x > 0)
    assert torch.equal(WindowedCodec(4).encode(x, seed=0).decode() > 0, x > 0)


def oracle(x: float, mean: float, deviation: float, count: int) -> float:
    """Returns the decoded value of a channel with both signs, whose window needs no widening."""
    step = 6 * deviation / count
    shift = min(max(count // 2 - round(mean / step), 1), count - 1)
    code = min(max(math.ceil(x / step) - 1 + shift, 0), count - 1)
    return (code - shift + 0.5) * step


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shift", [0.0, 0.7, -0.4])
def test_bins_are_those_of_the_formula(bits: int, shift: float) -> None:
    x = normals((4, 1, 16, 16)) + shift
    mean, deviation = float(x.mean()), float(x.var(correction=0).sqrt())
    decoded = WindowedCodec(bits).encode(x, seed=0).decode()
    expected = torch.tensor([oracle(v, mean, deviation, 1 << bits) for v in x.flatten().tolist()])
    torch.testing.assert_close(decoded.flatten(), expected.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
def test_few_normals_are_clipped_and_the_others_lie_in_their_bins(bits: int) -> None:
    x = normals((16, 4, 32, 32)).float()
    error = (WindowedCodec(bits).encode(x, seed=0).decode() - x).abs()
    half = 3 / (1 << bits) * 1.02
    clipped = float((error > half).float().mean())
    # A window that is centred to the nearest bin reaches at least 3 - 3 / K deviations to a side.
    expected = 2 * (1 - 0.5 * (1 + math.erf((3 - 3 / (1 << bits)) / math.sqrt(2))))
    assert clipped < expected + hoeffding(x.numel())
    inside = error[error <= half].double().square().mean()
    # A uniform error of width 6 / K, up to 3 % because the density is not flat within a bin.
    assert float(inside) == pytest.approx((6 / (1 << bits)) ** 2 / 12, rel=0.03)


@given(x=maps(MODERATE, (4,), (torch.float32, torch.float64)), bits=st.integers(2, 8))
def test_no_error_exceeds_a_step_except_of_clipped_values(x: Tensor, bits: int) -> None:
    packed = WindowedCodec(bits).encode(x, seed=0)
    assume(isinstance(packed.codec, WindowedCodec) and float(x.abs().max()) > 1e-30)
    step = packed.tensors[1].view(1, -1, 1, 1)
    error = (packed.decode() - x).abs()
    mean = x.double().mean((0, 2, 3), keepdim=True)
    deviation = x.double().var((0, 2, 3), keepdim=True, correction=0).sqrt()
    # The nearest bin may leave half a step of the three deviations outside.
    near = (x.double() - mean).abs() < 3 * deviation - step / 2 - 1e-6 * mean.abs()
    assert bool((error <= step / 2 * (1 + 1e-3) + 1e-5 * mean.abs())[near].all())


def test_bytes_and_constant_channels() -> None:
    x = normals((4, 6, 10, 10)).float()
    x[:, 2], x[:, 3], x[:, 4] = 3.7, -1e-30, 0
    for bits in range(1, 9):
        packed = WindowedCodec(bits).encode(x, seed=0)
        assert packed.nbytes == x.numel() * bits // 8 + 6 * 9
        assert torch.equal(packed.decode()[:, 2:5], x[:, 2:5])
    assert WindowedCodec(4).encode(x.double(), seed=0).nbytes == x.numel() // 2 + 6 * 17


def test_it_is_biased_and_deterministic() -> None:
    x = normals((4, 6, 10, 10)).float()
    first, second = (WindowedCodec(2).encode(x, seed=seed).decode() for seed in (1, 2))
    assert torch.equal(first, second) and float((first - x).norm() / x.norm()) > 0.3


class MaskInWindows(OpAware):
    """Stores a ReLU's output as the next convolution stores it."""

    def decide(self, saved: SavedTensor) -> Decision:
        decision = super().decide(saved)
        x = saved.tensor
        return decision if saved.op != "relu" else decision._replace(
            codec=saved.codec, rows=lambda x, call: Rows(x[0].numel(), x.shape[-1])) if (
                x.dim() == 4) else decision


@pytest.mark.parametrize(("codec", "exact"), [(WindowedCodec(2), True), (plain_codec(2), False)])
def test_the_code_of_a_relus_output_serves_as_its_mask(codec: Codec, exact: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    x = torch.randn(4, 3, 16, 16)
    net(x).square().mean().backward()
    expected = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    model = QuantBackwardWrapper(net, codec, overrides={"0": None}, policy=MaskInWindows())
    model.zero_grad()
    with track_saved_memory(model) as report:
        loss = model(x).square().mean()
    loss.backward()
    stored = {row.op: row.stored_bytes for row in report.rows if row.module in ("1", "2")}
    # The two operations share one payload: 2 bits, and metadata.
    assert sum(v for k, v in stored.items() if k != "pow") < 4 * 8 * 14 * 14 * 2 // 8 + 8 * 9 + 600 * 2
    found = [p.grad for p in model.parameters() if p.grad is not None]
    # All gradients but that of the second weight use the mask alone.
    same = [torch.equal(a, b) for a, b in zip(found, expected)]
    assert not same[2] and (same[:2] == [exact, exact])
