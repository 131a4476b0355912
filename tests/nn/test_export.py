"""Integers of learned tensors: types, files, reports, and weights from them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from brevitas.nn import QuantLinear
from torch import nn

from brevitas_bp.nn.learned import (
    ExportedIntegers,
    export_integers,
    learn_quantization,
    named_learned_tensors,
    report_integers,
    zipped_nbytes,
)
from brevitas_bp.nn.learned.integers import bits_of, smallest_integers
from brevitas_bp.quant import LearnedFloorIntBias, LearnedFloorIntWeightPerRowFloat
from tests.nn.support import X, learned_mlp, mlp
from tests.strategies import DTYPES, dtype_name

BOUNDS = [(torch.int8, 2**7), (torch.int16, 2**15), (torch.int32, 2**31)]


@pytest.mark.parametrize(("dtype", "bound"), BOUNDS)
def test_the_smallest_type_that_holds_all(dtype: torch.dtype, bound: int) -> None:
    for values in ([-bound, 0], [bound - 1], [-bound, bound - 1]):
        found = smallest_integers("here", torch.tensor(values, dtype=torch.float64))
        assert found.dtype == dtype and found.tolist() == values
    for values in ([-bound - 1], [bound]):
        wide = torch.tensor(values, dtype=torch.float64)
        if dtype == torch.int32:
            with pytest.raises(OverflowError, match="here: integers must fit in 32 bits, got"):
                smallest_integers("here", wide)
        else:
            assert smallest_integers("here", wide).dtype != dtype


def test_overflow_at_the_edge_of_float32() -> None:
    # 2**31 - 1 is no float32: the nearest one is 2**31.
    assert smallest_integers("here", torch.tensor([-(2.0**31), 2.0**31 - 128])).dtype == torch.int32
    with pytest.raises(OverflowError):
        smallest_integers("here", torch.tensor([2.0**31 - 1]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite(bad: float) -> None:
    with pytest.raises(ValueError, match="here: integers must be finite, got 1 NaN or Inf"):
        smallest_integers("here", torch.tensor([0.0, bad]))
    net = learned_mlp()
    with torch.no_grad():
        named_learned_tensors(net)["0.weight"].parameter[0, 0] = bad
    for call in (export_integers, report_integers):
        with pytest.raises(ValueError, match=r"'0\.weight': integers must be finite"):
            call(net)


def test_too_many_bits_for_the_scale() -> None:
    net = nn.Linear(2, 2)
    nn.init.constant_(net.weight, 1e6)
    learn_quantization(net, granularity="scalar", lam=None)
    with pytest.raises(OverflowError, match=r"'weight': integers must fit in 32 bits, got 83886080000"):
        export_integers(net)


def brevitas_mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        QuantLinear(
            8, 6, bias=True, weight_quant=LearnedFloorIntWeightPerRowFloat, weight_scale_init=0.02,
            bias_quant=LearnedFloorIntBias, bias_scale_init=0.02),
        nn.ReLU(),
        QuantLinear(
            6, 4, bias=True, weight_quant=LearnedFloorIntWeightPerRowFloat, weight_scale_init=0.02,
            bias_quant=LearnedFloorIntBias, bias_scale_init=0.02))


@pytest.mark.parametrize("make", [learned_mlp, brevitas_mlp])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_weights_from_the_export_are_bit_for_bit_those_of_the_layers(
        make: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    net, plain = make().to(dtype), mlp().to(dtype)
    exported = export_integers(net)
    assert list(exported.integers) == list(plain.state_dict()) and exported.others == {}
    nbytes = exported.save(tmp_path / "x.zip")
    assert nbytes == exported.zipped_nbytes() == (tmp_path / "x.zip").stat().st_size
    loaded = ExportedIntegers.load(tmp_path / "x.zip")
    plain.load_state_dict(loaded.state_dict())
    for name, tensor in named_learned_tensors(net).items():
        assert torch.equal(plain.get_parameter(name), tensor.values())
        assert loaded.integers[name].dtype == torch.int8
    assert torch.equal(plain(X.to(dtype)), net(X.to(dtype)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_scale_and_parameter_of_different_dtypes(dtype: torch.dtype) -> None:
    net = learned_mlp()
    for tensor in named_learned_tensors(net).values():
        tensor.quantizer.to(dtype)
    plain = mlp()
    plain.load_state_dict(export_integers(net).state_dict())
    assert torch.equal(plain(X), net(X))


def test_everything_else_of_the_model_is_kept() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    net.register_buffer("0_weight_like", torch.ones(2))
    learn_quantization(net, granularity="channel", lam=0.0, scale_init=0.01)
    net(torch.randn(2, 3, 8, 8))
    exported = export_integers(net)
    assert set(exported.others) == {"0_weight_like", *(f"1.{name}" for name in plain[1].state_dict())}
    plain.load_state_dict(exported.state_dict(), strict=False)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(plain.eval()(x), net.eval()(x))


def test_names_that_begin_alike_are_not_mixed_up() -> None:
    class Layer(nn.Linear):
        def __init__(self) -> None:
            super().__init__(3, 2)
            self.weight_of_another = nn.Parameter(torch.ones(2))

    net = Layer()
    learn_quantization(net, granularity="row", lam=0.0, include="weight")
    assert set(export_integers(net).others) == {"bias", "weight_of_another"}


def test_an_export_shares_no_memory_with_the_model() -> None:
    net = learned_mlp()
    exported = export_integers(net)
    before = exported.scales["0.weight"].clone()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    assert torch.equal(exported.scales["0.weight"], before)


def test_fewer_distinct_integers_make_smaller_files() -> None:
    sizes = []
    for scale in (1e-4, 1e-2, 0.1):
        torch.manual_seed(0)
        net = nn.Linear(256, 64)
        floats = zipped_nbytes({"weight": net.weight.detach(), "bias": net.bias.detach()})
        learn_quantization(net, granularity="scalar", lam=None, scale_init=scale)
        sizes.append(export_integers(net).zipped_nbytes() / floats)
    # int16; int8 with 14 values; 2 values. A float of a uniform distribution hardly shrinks.
    assert sizes[0] > sizes[1] > sizes[2] and sizes[1] < 0.2 and sizes[2] < 0.1


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    path.write_bytes(b"no zip file")
    with pytest.raises(ValueError, match="expected a file written by save"):
        ExportedIntegers.load(path)
    torch.save({"a": 1}, path)
    with pytest.raises(ValueError, match="expected a file written by save"):
        ExportedIntegers.load(path)


def test_the_report_counts_what_is_exported() -> None:
    net = learned_mlp()
    report, exported = report_integers(net), export_integers(net)
    for row in report.tensors:
        integers = exported.integers[row.name]
        assert row.elements == integers.numel() and row.scales == exported.scales[row.name].numel()
        assert (row.low, row.high) == (int(integers.min()), int(integers.max()))
        assert row.distinct == len(set(integers.flatten().tolist()))
        assert row.bits == bits_of(row.low, row.high)
    pooled = {q for x in exported.integers.values() for q in x.flatten().tolist()}
    assert report.pooled.distinct == len(pooled)
    assert report.pooled.largest == max(abs(q) for q in pooled)
    lines = str(report).splitlines()
    assert len(lines) == 8 and lines[0].split()[0] == "tensor" and lines[-1].split()[0] == "total"


@pytest.mark.parametrize("call", [export_integers, report_integers, named_learned_tensors])
def test_models_without_learned_tensors(call: Any) -> None:
    with pytest.raises(ValueError, match="expected a model with learned tensors, got Sequential"):
        call(mlp())


def test_bits_of_all_small_ranges() -> None:
    for low in range(-40, 1):
        for high in range(41):
            bits = bits_of(low, high)
            assert -2**(bits - 1) <= low and high < 2**(bits - 1)
            assert bits == 1 or low < -2**(bits - 2) or high >= 2**(bits - 2)
