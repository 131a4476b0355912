"""Valid and invalid specs of bucket quantizers."""

from typing import Any

import pytest
import torch

from brevitas_bp.format.spec import BucketQuantSpec
from brevitas_bp.format.stages import MAX, NARROW, CodeRange

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"bit_width": 0}, "bit_width must be an integer in 1..8, got 0"),
    ({"bit_width": 9}, "got 9; a code has to fit into one byte"),
    ({"bit_width": 2.5}, "got 2.5"),
    ({"mix_bit_width": 9, "mix_prob": 0.5}, "got 9"),
    ({"bucket_size": 12}, "bucket_size must be a positive multiple of 8"),
    ({"bucket_size": 0}, "got 0"),
    ({"bucket_size": -8}, "got -8"),
    ({"bucket_size": 8.0}, "got 8.0"),
    ({"mix_prob": -0.1}, r"mix_prob must be a number in \[0, 1\], got -0.1"),
    ({"mix_prob": 1.1}, "got 1.1"),
    ({"mix_prob": float("nan")}, "got nan"),
    ({"mix_prob": "half"}, "got 'half'"),
    ({"metadata_dtype": torch.int32}, "metadata_dtype must be torch.float32 or torch.bfloat16"),
    ({"scale_rule": MAX}, "the scale rule 'max' goes with signed codes, got 'unsigned'"),
    ({"code_range": NARROW}, "the scale rule 'min_max' goes with unsigned codes, got 'narrow'"),
    ({"scale_rule": MAX, "code_range": NARROW, "bit_width": 1}, "need bit_width >= 2, got 1"),
    ({"integer_zero_point": True, "metadata_dtype": torch.bfloat16}, "an integer zero point needs")]


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_a_bad_setting_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BucketQuantSpec(**settings)


@pytest.mark.parametrize(("code_range", "bit_width", "lowest", "top"), [
    ("unsigned", 1, 0, 1), ("unsigned", 8, 0, 255), ("narrow", 2, -1, 1), ("narrow", 8, -127, 127),
    ("sign_magnitude", 2, -1, 1), ("sign_magnitude", 4, -4, 4), ("sign_magnitude", 8, -64, 64)])
def test_code_ranges_fit_their_width(
        code_range: str, bit_width: int, lowest: int, top: int) -> None:
    codes = CodeRange.named(code_range)
    assert (codes.lowest(bit_width), codes.top(bit_width)) == (lowest, top)
    assert top - lowest < 2**bit_width


def test_widths_are_the_base_then_the_mixed_one() -> None:
    assert BucketQuantSpec(bit_width=3).bit_widths == (3,)
    assert BucketQuantSpec(bit_width=3, mix_bit_width=6, mix_prob=0.4).bit_widths == (3, 6)
