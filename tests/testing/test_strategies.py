"""Strategies, their names, and what happens without hypothesis."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from brevitas_bp import testing
from brevitas_bp.errors import UnknownNameError
from brevitas_bp.testing import LAYOUTS, VALUES, float_tensors, positions, seeds, shapes
from tests.test_readme import ROOT


@given(float_tensors(dtypes=(torch.bfloat16,), values=("inf",), layouts=("gapped",)))
def test_choices_are_kept(x: Tensor) -> None:
    assert x.dtype == torch.bfloat16 and (x.isinf().any() or not x.numel())
    assert x.dim() == 0 or x.shape[-1] == 1 or x.stride(-1) == 2


@given(float_tensors(shape=shapes(max_dims=2, min_size=0, max_size=3)), seeds)
def test_shapes_may_be_given(x: Tensor, seed: int) -> None:
    assert x.dim() <= 2 and max(x.shape, default=0) <= 3 and 0 <= seed < 2**64


@given(positions((torch.float64,), top=7))
def test_positions_lie_in_their_range(u: Tensor) -> None:
    assert u.dim() == 2 and u.dtype == torch.float64 and bool(((u >= 0) & (u <= 7)).all())


@pytest.mark.parametrize(("settings", "told"), [
    ({"values": ["nann"]}, "no 'nann'; did you mean 'nan'"),
    ({"layouts": "channels_lost"}, "did you mean 'channels_last'")])
def test_names_that_are_none(settings: dict, told: str) -> None:
    with pytest.raises(UnknownNameError, match=told):
        find(float_tensors(**settings))


def find(strategy: st.SearchStrategy[Tensor]) -> None:
    @given(strategy)
    def test(x: Tensor) -> None:
        assert x is not None

    test()


def test_tables_are_those_of_the_strategies() -> None:
    assert "channels_last" in LAYOUTS and "nan" in VALUES
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        testing.nonsense  # noqa: B018


def without_hypothesis(statement: str) -> subprocess.CompletedProcess[str]:
    code = f"import sys; sys.modules['hypothesis'] = None\n{statement}"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


def test_only_strategies_need_hypothesis() -> None:
    checks = (
        "from brevitas_bp.testing import *\nimport torch\nfrom brevitas_bp import StochasticRound\n"
        "assert_unbiased(StochasticRound(), torch.linspace(0, 3, 20))\nprint(hoeffding(100) > 0)\n"
        "from brevitas_bp.codec import BitMask\nprint(len(check_codec(BitMask())) > 10)")
    done = without_hypothesis(checks)
    assert (done.returncode, done.stdout) == (0, "True\nTrue\n"), done.stderr
    done = without_hypothesis("from brevitas_bp.testing import float_tensors")
    assert done.returncode == 1
    assert "ImportError: brevitas_bp.testing: strategies need the package hypothesis" in done.stderr
    assert "the extra 'test'" in done.stderr
