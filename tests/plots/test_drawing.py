"""Names that are shortened stay different; pictures leave no state."""

import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from brevitas_bp.drawing import shortened

PARTS = st.sampled_from(["model", "encoder", "layers", "0", "11", "attention", "output", "dense"])
NAMES = st.lists(st.lists(PARTS, max_size=9).map(".".join), max_size=30)


@given(NAMES)
def test_different_names_stay_different(names: list[str]) -> None:
    short = shortened(names, 16)
    assert len(set(short)) == len(set(names))
    for name, text in zip(names, short, strict=True):
        assert name.endswith(text.lstrip("\u2026"))
        assert len(name) > 16 or text == name


def test_a_long_first_part_is_kept_if_nothing_else_tells_names_apart() -> None:
    assert shortened(["a" * 50 + ".x", "b" * 50 + ".x", "c.x"], 20) == [
        "a" * 50 + ".x", "b" * 50 + ".x", "c.x"]


def test_drawing_needs_no_pyplot_and_no_display() -> None:
    code = """
import sys
import torch
from torch import nn
from brevitas_bp import QuantBackwardWrapper, track_saved_memory
with track_saved_memory(net := QuantBackwardWrapper(nn.Linear(64, 64))) as report:
    kept = net(torch.randn(64, 64))
report.plot().draw_without_rendering()
sys.exit("matplotlib.pyplot" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
