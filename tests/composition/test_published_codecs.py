"""Published codes in a wrapper: policies, overrides, plans, reports, storage, compiled graphs."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from brevitas_bp import (
    Codec,
    OpAware,
    QuantBackwardWrapper,
    SavedTensor,
    check_gradients,
    plan_bit_widths,
    track_saved_memory,
)
from brevitas_bp.codec import (
    PooledCodec,
    ProjectedCodec,
    TopKCodec,
    TwoFrequencyCodec,
    WindowedCodec,
)
from brevitas_bp.codec.layout import TensorLayout
from brevitas_bp.quant import ShiftedUint2DynamicActPerBucketFloatStochastic as Uint2
from tests.codec.published import CODES

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace:UserWarning")]

each_code = pytest.mark.parametrize("make", CODES.values(), ids=CODES.keys())
Make = Callable[[], Codec]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.SiLU(), nn.Conv2d(32, 64, 1), nn.MaxPool2d(2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 10))


def images() -> Tensor:
    return torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).logsumexp(1).mean()


def gradients(model: nn.Module) -> list[Tensor]:
    model.zero_grad()
    loss_of(model, images()).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def stored(model: QuantBackwardWrapper) -> dict[str, str]:
    return {f"{s.module}:{s.op}": s.stored for s in model.explain().sites.values()
            if s.stored not in ("exact", "not kept")}


@each_code
@pytest.mark.parametrize("policy", ["op_aware", "all"])
def test_a_network_trains_with_it(make: Make, policy: Any) -> None:
    module = net()
    expected, output = gradients(module), module(images())
    model = QuantBackwardWrapper(copy.deepcopy(module), make(), policy=policy, seed=0)
    assert torch.equal(model(images()), output)
    with track_saved_memory(model) as report:
        loss = loss_of(model, images())
    assert report.exact_bytes > 3 * report.stored_bytes
    del loss
    found = gradients(model)
    assert all(g.isfinite().all() and g.shape == e.shape for g, e in zip(found, expected, strict=True))
    # The gradient of the last bias needs nothing that is stored.
    assert torch.equal(found[-1], expected[-1])


@each_code
def test_the_policy_uses_it_where_its_error_may_be(make: Make) -> None:
    codec: Any = make()
    model = QuantBackwardWrapper(net(), codec)
    gradients(model)
    names, fallback = stored(model), codec.fallback
    assert names["2:relu"] == "relu mask"
    # The derivative of SiLU multiplies the passing gradient: at least 4 bits, rounded without bias.
    assert names["4:silu"] == "4-bit stochastic"
    own = {codec.name, fallback.name}
    assert {names["5:conv2d"], names["9:linear"]} <= own and codec.name in names.values()
    biased = not codec.bit_widths
    assert (names["1:batch_norm"] == fallback.name) == biased


@each_code
def test_reported_bytes_are_those_of_the_payload(make: Make) -> None:
    codec = make()

    def policy(saved: SavedTensor) -> Codec | None:
        return codec if saved.op == "conv2d" and saved.module == "5" and (
            saved.tensor.shape == (16, 32, 16, 16)) else None

    model = QuantBackwardWrapper(net(), policy=policy)
    with track_saved_memory(model) as report:
        loss = loss_of(model, images())
    row = next(r for r in report.rows if r.module == "5" and r.op == "conv2d")
    x = torch.empty(16, 32, 16, 16)
    weight = net().get_parameter("5.weight").nbytes
    expected = codec.stored_nbytes(TensorLayout.of(x))
    assert row.stored_bytes in (expected, expected + weight if expected else None)
    del loss


@pytest.mark.parametrize("name", ["two frequencies", "largest", "random", "pooled", "windows"])
def test_a_check_of_gradients_tells_noise(name: str) -> None:
    model = QuantBackwardWrapper(net(), CODES[name](), seed=0)
    check = check_gradients(model, images(), loss_of)
    assert "error" in str(check)


@each_code
def test_overrides_choose_it_for_a_module(make: Make) -> None:
    codec = make()
    model = QuantBackwardWrapper(net(), Uint2, overrides={"5": codec, "0": None})
    gradients(model)
    names = stored(model)
    assert names["5:conv2d"] == codec.name or isinstance(codec, ProjectedCodec)
    assert "0:conv2d" not in names and names["9:linear"] == "2-bit stochastic"


@pytest.mark.parametrize("codec", [TwoFrequencyCodec(), WindowedCodec(2)])
def test_a_plan_chooses_its_widths(codec: Codec) -> None:
    model = QuantBackwardWrapper(net(), codec, plan={"5:*": 4, "*": 8})
    gradients(model)
    names = stored(model)
    assert names["5:conv2d"].startswith("4-bit") and names["5:conv2d"][5:] == codec.name[5:]
    assert names["1:batch_norm"].startswith("8-bit") and names["1:batch_norm"][5:] == codec.name[5:]
    assert names["4:silu"] == "8-bit stochastic"
    plan = plan_bit_widths(
        QuantBackwardWrapper(net(), codec), images(), loss_of, average_bits=4.5, candidates=(2, 4, 8))
    gradients(QuantBackwardWrapper(net(), codec, plan=plan))


def test_a_plan_leaves_codes_without_widths_alone() -> None:
    model = QuantBackwardWrapper(net(), Uint2, overrides={"5": TopKCodec()}, plan={"*": 8})
    gradients(model)
    assert stored(model)["5:conv2d"] == TopKCodec().name
    assert stored(model)["9:linear"] == "8-bit stochastic"
    with pytest.raises(TypeError, match=r"a plan chooses widths .* but act_quant is '16-bit means"):
        QuantBackwardWrapper(net(), PooledCodec(), plan={"*": 4})


@each_code
def test_it_may_quantize_on_backward_and_be_verified(make: Make) -> None:
    ways: tuple[dict[str, Any], ...] = ({}, {"storage": "quantize_on_backward"}, {"verify": True})
    plain, late, sealed = (
        gradients(QuantBackwardWrapper(net(), make(), seed=0, policy="all", **way)) for way in ways)
    assert all(map(torch.equal, plain, sealed)) and all(g.isfinite().all() for g in late)


def test_query_and_key_take_eight_bits_of_the_fallback() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(64, 192)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).view(4, 32, 3, 4, 16).permute(2, 0, 3, 1, 4)
            return nn.functional.scaled_dot_product_attention(q, k, v)

    for codec in (PooledCodec(), TwoFrequencyCodec(), TopKCodec()):
        torch.manual_seed(0)
        model = QuantBackwardWrapper(Attention(), codec)
        model(torch.randn(4, 32, 64)).square().mean().backward()
        names = [s.stored for s in model.explain().sites.values() if s.op != "linear"]
        # Heads of attention are no maps, and neither is the value.
        assert names.count("8-bit stochastic") >= 1 and codec.name not in names


@each_code
def test_batch_norms_of_evaluation_and_channels_last(make: Make) -> None:
    module = net().eval().to(memory_format=torch.channels_last)  # pyright: ignore
    x = images().contiguous(memory_format=torch.channels_last)
    model = QuantBackwardWrapper(module, make(), seed=0)
    loss_of(model, x).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@each_code
def test_other_dtypes(make: Make, dtype: torch.dtype) -> None:
    model = QuantBackwardWrapper(net().to(dtype), make(), seed=0)
    loss_of(model, images().to(dtype)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_an_overflow_reaches_the_loss_scaler() -> None:
    for make in CODES.values():
        model, x = QuantBackwardWrapper(net(), make(), policy="all"), images()
        x[3, 1, 4, 5] = torch.inf
        loss_of(model, x).backward()
        assert not bool(model.get_parameter("0.weight").grad.isfinite().all())  # pyright: ignore


def test_compiled_graphs_keep_their_tensors_and_say_why() -> None:
    torch._dynamo.reset()
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Conv2d(8, 4, 3))
    compiled: Any = torch.compile(copy.deepcopy(module), backend="aot_eager")
    model = QuantBackwardWrapper(compiled, TwoFrequencyCodec())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model(images()).square().mean().backward()
    assert any("compiled graphs cannot store" in str(w.message) and "two frequencies" in str(w.message)
               for w in caught)
    assert {site.stored for site in model.explain().sites.values()} == {"exact"}
    torch._dynamo.reset()


def test_two_wrappers_with_one_codec_draw_their_own_noise() -> None:
    codec, module = ProjectedCodec(1 / 2, 4), net()
    first, second, again = (
        gradients(QuantBackwardWrapper(copy.deepcopy(module), codec, seed=seed, policy=OpAware()))
        for seed in (1, 2, 1))
    assert all(map(torch.equal, first, again)) and not all(map(torch.equal, first, second))
