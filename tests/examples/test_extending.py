"""The examples of docs/extending.md run, and what they print is true.

Each runs in this process: imports take longer than the examples.
"""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from brevitas_bp import OpAware, QuantBackwardWrapper, codec_from, track_saved_memory
from brevitas_bp.backward import registry
from brevitas_bp.codec.quantized import LoweredCodec
from brevitas_bp.errors import CorruptPayloadError, UnsupportedTensorError
from brevitas_bp.format.stages import Transform

FOLDER = Path(__file__).parents[2] / "examples" / "extending"
NAMES = ("rounding", "statistic", "transform", "whole_codec", "policy", "operation")


@pytest.fixture(scope="module")
def examples() -> Iterator[dict[str, ModuleType]]:
    rows, before = dict(Transform.rows), dict(registry._by_object)
    loaded = {}
    for name in NAMES:
        spec = importlib.util.spec_from_file_location(f"extending_{name}", FOLDER / f"{name}.py")
        assert spec is not None and spec.loader is not None
        loaded[name] = importlib.util.module_from_spec(spec)
        # Dataclasses look up the module of their class.
        sys.modules[spec.name] = loaded[name]
        spec.loader.exec_module(loaded[name])
    yield loaded
    for name in NAMES:
        del sys.modules[f"extending_{name}"]
    for table, old in ((Transform.rows, rows), (registry._by_object, before)):
        for key in set(table) - set(old):
            del table[key]
    registry._found.clear()


def test_all_examples_are_tested() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_it_runs_and_the_page_shows_it(name: str, examples: dict[str, Any], capsys: Any) -> None:
    examples[name].main()
    assert capsys.readouterr().out.strip()
    page = (FOLDER.parents[1] / "docs" / "extending.md").read_text()
    assert f"examples/extending/{name}.py" in page


def test_the_bias_of_few_random_bits_is_what_the_docstring_says(examples: dict[str, Any]) -> None:
    # 8192 copies of a bucket. Hoeffding over 256 elements, false alarm 1e-9:
    # sqrt(ln(2 * 256 / 1e-9) / (2 * 8192)) = 0.041 steps.
    for bits in (1, 3):
        assert abs(examples["rounding"].bias(bits) - 2**-(bits + 1)) < 0.041
    # The control: two different numbers of bits have different biases.
    assert examples["rounding"].bias(1) > examples["rounding"].bias(3) + 0.1


def test_a_setting_of_the_rounding_is_a_keyword_of_the_wrapper(examples: dict[str, Any]) -> None:
    config = examples["rounding"].FewRandomBits2
    model = QuantBackwardWrapper(nn.Linear(64, 8), config, random_bits=5)
    assert codec_from(config).bucketwise  # pyright: ignore
    (quantizer,) = model._act_quant.codec.quantizers()  # pyright: ignore
    assert [part.steps for part in quantizer.modules() if hasattr(part, "steps")] == [32]


def test_clipping_trades_error_for_bias(examples: dict[str, Any]) -> None:
    statistic = examples["statistic"]
    torch.manual_seed(0)
    x = torch.distributions.StudentT(3.0).sample((64, 256))
    whole, whole_mean = statistic.errors(statistic.Clipped4, x, clipped=0)
    clipped, clipped_mean = statistic.errors(statistic.Clipped4, x)
    assert clipped < whole and whole_mean < whole / 8 and clipped_mean > clipped / 2
    x[3, 7] = torch.nan
    decoded = codec_from(statistic.Clipped4).encode(x, seed=0).decode()
    assert decoded[3].isnan().all() and decoded[[0, 1, 2, 4]].isfinite().all()


def test_the_row_serves_the_transform_everywhere(examples: dict[str, Any]) -> None:
    transform = examples["transform"]
    assert transform.same_values()
    codec = codec_from(transform.Cosines4)
    assert isinstance(codec, LoweredCodec) and codec.spec.transform is transform.ROW
    assert transform.error(transform.Cosines4, 30.0) < transform.error(transform.Plain4, 30.0) / 3
    x = torch.randn(7, 192)
    draws = [codec.encode(x, seed=seed).decode() for seed in range(400)]
    noise = (torch.stack(draws) - x).norm(dim=(1, 2)).mean() / 20
    assert float((torch.stack(draws).mean(0) - x).norm()) < 1.5 * float(noise)
    model = QuantBackwardWrapper(
        torch.compile(nn.Linear(192, 8), backend="aot_eager"),  # pyright: ignore
        transform.Cosines4)
    with track_saved_memory(model) as report:
        loss = model(torch.randn(64, 192)).sum()
    loss.backward()
    assert report.stored_bytes < report.exact_bytes / 5


@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (3, 4, 5)])
def test_the_codec_restores_every_layout_and_special_value(
        shape: tuple[int, ...], examples: dict[str, Any]) -> None:
    codec = examples["whole_codec"].StochasticBfloat16()
    x = torch.randn(shape)
    for given in (x, x.mT if x.dim() > 1 else x, x.expand(2, *shape)):
        packed = codec.encode(given, seed=3)
        back = packed.decode()
        assert (back.shape, back.dtype) == (given.shape, given.dtype)
        assert torch.allclose(back, given, rtol=2**-7)
        assert torch.equal(back, codec.encode(given, seed=3).decode())
        assert packed.nbytes == codec.stored_nbytes(packed.layout)


def test_the_codec_is_unbiased_and_keeps_what_is_not_finite(examples: dict[str, Any]) -> None:
    codec = examples["whole_codec"].StochasticBfloat16()
    # A step is 2**-7 of the value, at most. Hoeffding over 64 values, false alarm 1e-9:
    # sqrt(ln(2 * 64 / 1e-9) / (2 * 4096)) * 2**-7 = 4.4e-4.
    assert examples["whole_codec"].bias() < 4.4e-4
    # The control: rounding to nearest is biased by nearly half a step.
    x = torch.linspace(1, 2, 64)
    assert float(((x.bfloat16().float() - x) / x).abs().max()) > 1e-3
    largest = torch.finfo(torch.float32).max
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, largest, 0.0, 1e-40, -1.0])
    back = codec.encode(x, seed=0).decode()
    assert back[0].isnan() and back[1] == torch.inf and back[2] == -torch.inf
    assert back[3].isfinite() and back[4] == 0 and back[5] < 1e-39 and back[6] == -1


def test_the_codec_refuses_other_dtypes_and_damage(examples: dict[str, Any]) -> None:
    codec = examples["whole_codec"].StochasticBfloat16()
    with pytest.raises(UnsupportedTensorError, match="'stochastic bfloat16' stores tensors of float32"):
        codec.encode(torch.randn(3, dtype=torch.float64), seed=0)
    packed = codec.encode(torch.randn(8), seed=0)
    with pytest.raises(CorruptPayloadError):
        packed.with_tensors((packed.tensors[0][:4],)).decode()


def test_the_policy_spends_few_bytes_and_gains_much(examples: dict[str, Any]) -> None:
    policy = examples["policy"]
    stored, error = policy.measure(OpAware())
    more, less = policy.measure(policy.Careful())
    assert more < 1.25 * stored and less < error / 3
    same, equal = policy.measure(policy.Careful(exact_below=0, norms_below=0))
    assert (same, equal) == (stored, error)


def test_registered_operations_are_known_and_unbiased(examples: dict[str, Any]) -> None:
    operation = examples["operation"]
    for name in ("snake", "Scale"):
        registry._by_object.pop(getattr(operation, name), None)
    registry._found.clear()
    torch.manual_seed(0)
    x = torch.randn(512, 64)
    before, unknown = operation.stored(x)
    assert set(unknown) == {"snake", "custom function"}
    operation.register()
    after, unknown = operation.stored(x)
    assert not unknown and after < before / 6
    one, many = operation.gradient_error(x, 1), operation.gradient_error(x, 64)
    # Independent draws: an eighth. A third more is the margin.
    assert many < one / 8 * 1.33
