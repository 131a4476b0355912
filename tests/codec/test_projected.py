"""Random projections: unbiased, with the error that theory predicts, from signs that are not stored."""

import pytest
import torch
from torch import Tensor, nn

from brevitas_bp import QuantBackwardWrapper
from brevitas_bp.codec import ProjectedCodec
from brevitas_bp.codec.rows import Rows, in_rows
from tests.stats import bernstein, normal
from tests.strategies import normals


@pytest.mark.parametrize(("features", "kept", "bits", "numbers"), [
    (64, 1 / 8, 2, 8), (256, 1 / 8, 2, 32), (256, 1 / 4, 4, 64), (100, 1 / 2, 1, 56),
    (72, 1 / 3, 8, 24)])
def test_bits_per_row(features: int, kept: float, bits: int, numbers: int) -> None:
    packed = ProjectedCodec(kept, bits).encode(normals((50, features)).float(), seed=0)
    assert packed.nbytes * 8 == 50 * (bits * numbers + 32)


def test_long_rows_are_projected_in_parts() -> None:
    x = normals((3, 5000)).float()
    packed = ProjectedCodec(1 / 8).encode(x, seed=0)
    # 3 parts of 1667 features; 216 numbers of each.
    assert packed.nbytes * 8 == 3 * 3 * (2 * 216 + 32)
    assert packed.decode().shape == x.shape


def test_the_error_of_one_feature_is_that_of_the_formula() -> None:
    """E |h R R' - h|^2 = (D - 1) / k |h|^2, for h = (1, 0, ..., 0).

    There h~_0 is 1, and each other h~_d is the mean of k independent signs. So its square has the mean
    1/k and the variance 2 (1 - 1/k) / k^2, and the squares of different d and seeds are independent.
    With k = 16 all numbers p are one of +-1/4, which one bit stores exactly.
    """
    features, draws, h = 64, 400, torch.zeros(1, 64)
    h[0, 0] = 1

    def decoded(kept: int) -> Tensor:
        codec = ProjectedCodec(kept / features, bits=1)
        return torch.stack([codec.encode(h, seed=seed).decode()[0] for seed in range(draws)])

    def is_right(kept: int, expected: int) -> bool:
        squares = decoded(kept)[:, 1:].double().square()
        tolerance = bernstein(2 * (1 - 1 / expected) / expected**2, squares.numel())
        return abs(float(squares.mean()) - 1 / expected) < float(tolerance)

    assert torch.equal(decoded(16)[:, 0], torch.ones(draws))
    assert is_right(16, 16)
    # The control: half as many numbers again.
    assert not is_right(24, 16)


def test_rows_have_the_error_of_the_formula_on_average_over_their_directions() -> None:
    # For every h, the mean over signs is (D - 1) / k. Over many directions, the error of one seed is the
    # sum of (S_d S_e)^2 / (D k^2) over pairs of rows of S, which are uncorrelated, with deviation 2 / k.
    x, features, kept, draws = normals((400, 64)).float(), 64, 16, 40
    ratios = []
    for seed in range(draws):
        decoded = ProjectedCodec(kept / features, bits=8).encode(x, seed=seed).decode()
        ratios.append(float((decoded - x).square().sum() / x.square().sum()))
    # Rounding to 8 bits adds less than 0.01. 400 rows are not all directions: twice the deviation.
    tolerance = normal() * 2 * 2 / kept / draws**0.5 + 0.01
    assert sum(ratios) / draws == pytest.approx((features - 1) / kept, abs=tolerance)


def test_it_is_unbiased() -> None:
    """The error of h~_d is a mean of k sums of h_e s_d s_e, over draws of independent signs.

    Such a sum is sub-Gaussian with the proxy |h|^2. The rounding error of p is below one step; its share
    in h~_d is sub-Gaussian with the proxy step^2.
    """
    features, kept, draws = 32, 16, 800
    codec = ProjectedCodec(kept / features, bits=8)
    h = normals((1, features), 3).float()
    packed = [codec.encode(h, seed=seed) for seed in range(draws)]
    mean = torch.stack([p.decode()[0] for p in packed]).double().mean(0)
    # |p| is at most |h|_1 / sqrt(k), and a step is 1/255 of the range.
    step = 2 * float(h.abs().sum()) / kept**0.5 / 255 * 1.01
    proxy = float(h.double().square().sum()) / kept + step**2
    tolerance = normal(tests=features) * (proxy / draws) ** 0.5
    assert bool(((mean - h[0].double()).abs() < tolerance).all())
    # The control: other signs than those of the encoder.
    other = [p.codec.encode(h, seed=0) for p in packed]
    wrong = torch.stack([
        p.codec.decode(type(p)(p.codec, p.tensors, p.layout, p.facts._replace(seed=seed + 1)))[0]
        for seed, p in enumerate(other)]).double().mean(0)
    assert not bool(((wrong - h[0].double()).abs() < tolerance).all())


def matrix_of(codec: ProjectedCodec, features: int, seed: int) -> Tensor:
    """Returns S S' / k, from the projections of unit vectors."""
    return codec.encode(torch.eye(features), seed=seed).decode()


def test_rows_share_their_signs_so_more_rows_do_not_help() -> None:
    codec = ProjectedCodec(1 / 4, bits=1)
    matrix = matrix_of(codec, 64, 7)
    assert torch.equal(matrix.diagonal(), torch.ones(64)) and torch.equal(matrix, matrix.T)
    fine = ProjectedCodec(1 / 4, bits=8)
    x = normals((2000, 64)).float()
    decoded = fine.encode(x, seed=7).decode()
    # Both round p: by at most one step, 1/255 of a range below 12 times the deviation.
    torch.testing.assert_close(decoded, x @ matrix, rtol=0, atol=12 / 255 * 4)


def test_the_gradient_of_a_linear_weight_has_the_error_of_the_projection() -> None:
    torch.manual_seed(0)
    net = nn.Linear(256, 8, bias=False)
    errors = {}
    for rows in (64, 4096):
        x, delta = normals((rows, 256), rows).float(), normals((rows, 8), 1).float()
        exact = delta.T @ x
        total = 0.0
        for seed in range(20):
            model = QuantBackwardWrapper(net, ProjectedCodec(1 / 4, bits=4), seed=seed)
            model.zero_grad()
            model(x).backward(delta)
            assert net.weight.grad is not None
            total += float((net.weight.grad - exact).square().sum() / exact.square().sum())
        errors[rows] = total / 20
    # (256 - 1) / 64 = 3.98 and the rounding; 64 times more rows change nothing.
    assert all(3.5 < error < 5 for error in errors.values()), errors


def test_in_a_norm_it_would_be_biased_because_rows_share_their_signs() -> None:
    """Backward of a batch norm has the term xhat~_p mean_q(dy_q xhat~_q), for each feature e.

    The errors n of two rows have the mean product E n_pe n_qe = 1/k sum_(d != e) h_pd h_qd. With
    independent signs, it would be 0 for p != q. So the gradient of the input is off by ::

        -rstd / M sum_q dy_qe / k sum_(d != e) h_pd h_qd
    """
    features, kept, rows, draws = 64, 16, 48, 600
    norm = nn.BatchNorm1d(features, affine=False)
    x, dy = normals((rows, features)).float(), normals((rows, features), 1).float()
    # Gradients that go along with the input, as of a loss that grows with it.
    dy = dy + x
    codec = ProjectedCodec(kept / features, bits=8)

    def gradient(model: nn.Module) -> Tensor:
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(model(leaf), leaf, dy)
        return grad.double()

    exact = gradient(norm)
    # What autograd saves is the input. Its errors are those of the input, which is normalized already.
    found = torch.stack([
        gradient(QuantBackwardWrapper(
            norm, seed=seed, policy=lambda saved: codec if saved.tensor.dim() == 2 else None))
        for seed in range(draws)]) - exact
    h, g = x.double(), dy.double()
    rstd = (h.var(0, correction=0) + 1e-5).rsqrt()
    similar = (h @ h.T).unsqueeze(-1) - h.unsqueeze(1) * h.unsqueeze(0)
    predicted = -(rstd**3 / rows / kept) * torch.einsum("qe,pqe->pe", g, similar)
    along = (found * predicted).sum((1, 2)) / predicted.square().sum()
    # The deviation of the mean, from the draws themselves: with 600 of them, known to a few percent.
    tolerance = normal() * float(along.std()) / draws**0.5 * 1.1
    assert tolerance < 0.5 and abs(float(along.mean()) - 1) < tolerance
    # It is no small part of the gradient. The policy leaves such inputs to the fallback.
    assert float(predicted.norm() / exact.norm()) > 0.15
    assert codec.at_least(1) is codec.fallback


@pytest.mark.parametrize("shape", [(2, 64, 5, 7), (2, 64, 3, 4, 5)])
def test_the_features_of_a_map_are_its_channels(shape: tuple[int, ...]) -> None:
    codec, x = ProjectedCodec(1 / 4, bits=8), normals(shape).float()
    decoded = codec.encode(x, seed=3).decode()
    moved = codec.encode(x.movedim(1, -1).reshape(-1, 64), seed=3).decode()
    assert torch.equal(decoded.movedim(1, -1).reshape(-1, 64), moved)
    # The policy names rows of heads of attention: the last dimension.
    heads = normals((2, 3, 5, 64)).float()
    rowed = in_rows(codec, Rows(64, 64)).encode(heads, seed=3).decode()
    assert torch.equal(rowed.view(-1, 64), codec.encode(heads.view(-1, 64), seed=3).decode())
    # A Conv1d names samples as rows: features are its channels.
    sound = normals((2, 64, 40)).float()
    of_channels = in_rows(codec, Rows(64 * 40, 40)).encode(sound, seed=3).decode()
    expected = codec.encode(sound.movedim(1, -1).reshape(-1, 64), seed=3).decode()
    assert torch.equal(of_channels.movedim(1, -1).reshape(-1, 64), expected)


def test_without_a_projection_nothing_is_lost_to_it() -> None:
    x = normals((10, 64)).float()
    packed = ProjectedCodec(1.0).encode(x, seed=0)
    assert packed.codec.name == "2-bit stochastic"


def test_large_numbers_stay_finite() -> None:
    x = torch.full((4, 64), 3.3e38)
    assert bool(ProjectedCodec(1 / 8).encode(x, seed=0).decode().isfinite().all())
