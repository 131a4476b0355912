"""Random rotation of buckets."""

import torch
from torch import Tensor, nn

from brevitas_bp.format.random import ROTATION, next_words
from brevitas_bp.format.rotation import rotate, rotate_back, word_indices
from brevitas_bp.format.stages import ROTATED, ROTATED_TWICE, Transform

# See NOTE [ The noise is an operator ] in brevitas_bp.format.random.
_library = torch.library.Library("brevitas_bp", "FRAGMENT")
_library.define("sign_words_like(Tensor x) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,))


def _sign_words_like(x: Tensor) -> Tensor:
    rows = torch.arange(len(x), dtype=torch.int64, device=x.device)
    return next_words(ROTATION, word_indices(rows, x.shape[-1]))


_library.impl("sign_words_like", _sign_words_like, "CompositeExplicitAutograd")


@torch.library.register_fake("brevitas_bp::sign_words_like", lib=_library)
def _sign_words_like_fake(x: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[1] // 16), dtype=torch.int32)


class RandomRotation(nn.Module):
    """Rotates each bucket at random, with fresh signs in each call. Fills ``transform_impl``.

    After a rotation, the elements of any bucket look like independent normal values of one variance. So
    outliers set no scale. See :mod:`brevitas_bp.format.rotation`.

    Args:
        rotations: 1 or 2. Two are needed if codes are unbiased only for normal values
            (:class:`~brevitas_bp.core.levels.BucketLevelQuant`).

    Raises:
        ValueError: another number of rotations.

    >>> rotation, buckets = RandomRotation(), torch.eye(16)
    >>> signs = rotation.draw(buckets)
    >>> bool(torch.allclose(rotation.inverse(rotation(buckets, signs), signs), buckets))
    True
    """

    bucketwise = True

    def __init__(self, rotations: int = 2) -> None:
        super().__init__()
        if rotations not in (1, 2):
            raise ValueError(
                f"brevitas_bp.core.RandomRotation: rotations must be 1 or 2, got {rotations!r}; a third "
                "would not change the statistics")
        self.rotations = rotations

    def bucket_stage(self, slot: str) -> Transform | None:
        """See :func:`brevitas_bp.codec.lowering.lower`."""
        if slot != "transform_impl":
            return None
        return ROTATED if self.rotations == 1 else ROTATED_TWICE

    def draw(self, buckets: Tensor) -> Tensor:
        """Draws the signs for ``buckets`` [N, B]: 32 random bits for 16 elements, int32 [N, B / 16]."""
        return torch.ops.brevitas_bp.sign_words_like(buckets)

    def forward(self, buckets: Tensor, signs: Tensor) -> Tensor:
        """Rotates buckets [N, B]."""
        return rotate(buckets, signs, self.rotations)

    def inverse(self, values: Tensor, signs: Tensor) -> Tensor:
        """Rotates values [N, B] back."""
        return rotate_back(values, signs, self.rotations)
