"""A codec defined only in this file: wrapper, plan, widths, report, compiled graph."""

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from brevitas_bp import (
    Codec,
    OpAware,
    Packed,
    QuantBackwardWrapper,
    SavedTensor,
    track_saved_memory,
)
from brevitas_bp.allocate import plan_bit_widths
from brevitas_bp.codec.integrity import TensorType
from brevitas_bp.codec.layout import TensorLayout
from brevitas_bp.quant import ShiftedUint2DynamicActPerBucketFloatStochastic as Uint2

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace:UserWarning")]


class UpperHalves(Codec):
    """Lossless: stores only the upper halves of float32 values if all lower 16 bits are zero."""

    name = "upper halves"
    lossy = False
    restores = (torch.float32,)

    def encode(self, x: Tensor, *, seed: int, where: str = "") -> Packed:
        layout = self.layout_of(x, where)
        flat = layout.flatten(x.detach())
        short = flat.to(torch.bfloat16)
        stored = short if torch.equal(short.float(), flat) else flat.clone()
        return Packed(self, (stored,), layout, stored.dtype, where)

    def decode(self, packed: Packed) -> Tensor:
        return packed.layout.restore_flat(packed.tensors[0].float())

    def tensor_types(self, packed: Packed) -> Sequence[TensorType]:
        return [TensorType.flat(packed.layout.numel, packed.facts)]

    def stored_nbytes(self, layout: TensorLayout) -> int | None:
        return 2 * layout.numel


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))


def x() -> Tensor:
    """Returns whole numbers, whose lower halves are zero."""
    return torch.randint(-8, 8, (128, 64), generator=torch.Generator().manual_seed(1)).float()


def gradients(model: nn.Module) -> list[Tensor]:
    model.zero_grad()
    model(x()).square().mean().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def compiled(module: nn.Module) -> Any:
    return torch.compile(module, backend="aot_eager")


def stored(model: QuantBackwardWrapper) -> dict[str, str]:
    return {f"{s.module}:{s.op}": s.stored for s in model.explain().sites.values()}


@pytest.mark.parametrize("policy", ["op_aware", "all", OpAware(multiplier_bits=8)])
@pytest.mark.parametrize("verify", [False, True])
def test_it_configures_a_wrapper_and_leaves_every_gradient_exact(policy: Any, verify: bool) -> None:
    module = net()
    expected = gradients(module)
    model = QuantBackwardWrapper(copy.deepcopy(module), UpperHalves(), policy=policy, verify=verify)
    found = gradients(model)
    # The derivative of tanh is computed by other operations than in plain backward.
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert torch.equal(found[-2], expected[-2]) and torch.equal(found[-1], expected[-1])
    assert stored(model)["0:linear"] == "upper halves"
    # The upper halves alone cannot hold the other tensors, and the whole values save no bytes.
    assert stored(model)["2:linear"] == "exact"


def test_a_policy_may_choose_it_and_the_report_counts_its_bytes() -> None:
    def policy(saved: SavedTensor) -> Codec | None:
        return UpperHalves() if saved.op == "linear" and saved.tensor.is_floating_point() else None

    model = QuantBackwardWrapper(net(), policy=policy)
    with track_saved_memory(model) as report:
        loss = model(x()).sum()
    rows = {row.module: row for row in report.rows}
    assert rows["0"].stored_bytes == 2 * x().numel() and rows["0"].exact_bytes == 4 * x().numel()
    assert all(map(torch.equal, gradients(model), gradients(model.module)))
    del loss


def test_a_plan_of_widths_leaves_it_alone_and_a_wrapper_of_it_alone_takes_none() -> None:
    model = QuantBackwardWrapper(net(), Uint2, overrides={"0": UpperHalves()}, plan={"*": 8})
    gradients(model)
    assert stored(model) == {
        "0:linear": "upper halves", "1:tanh": "8-bit stochastic", "2:linear": "8-bit stochastic"}
    plan = plan_bit_widths(
        QuantBackwardWrapper(net(), Uint2, overrides={"0": UpperHalves()}), x(),
        lambda model, batch: model(batch).square().mean(), average_bits=4)
    assert {site.partition(":")[0] for tensor in plan.tensors for site in tensor.sites} == {"1", "2"}
    with pytest.raises(TypeError, match=r"a plan chooses widths .* but act_quant is 'upper halves'"):
        QuantBackwardWrapper(net(), UpperHalves(), plan={"*": 4})


def test_it_has_no_other_width() -> None:
    codec = UpperHalves()
    assert codec.at_least(8) is codec and codec.variant(4) is None and list(codec.quantizers()) == []
    with pytest.raises(TypeError, match="'upper halves', built before it was handed over"):
        QuantBackwardWrapper(net(), codec).configure(bit_width=4)
    with pytest.raises(ValueError, match="'upper halves' is no bucket quantizer"):
        QuantBackwardWrapper(net(), codec, overrides={"0": 4})


def test_it_may_quantize_on_backward() -> None:
    model = QuantBackwardWrapper(net(), UpperHalves(), policy="all", storage="quantize_on_backward")
    assert all(map(torch.equal, gradients(model), gradients(model.module)))
    assert stored(model)["0:linear"] == "upper halves on backward"


def test_a_compiled_graph_keeps_its_tensors_and_says_why() -> None:
    torch._dynamo.reset()
    module = net()
    model = QuantBackwardWrapper(compiled(copy.deepcopy(module)), UpperHalves())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = gradients(model)
    assert any("compiled graphs cannot store" in str(w.message) and "upper halves" in str(w.message)
               for w in caught)
    expected = gradients(compiled(module))
    assert all(map(torch.equal, found, expected))
    sites = model.explain().sites.values()
    assert {site.stored for site in sites} == {"exact"}
    assert any("no form for compiled graphs" in site.reason for site in sites)
    torch._dynamo.reset()
