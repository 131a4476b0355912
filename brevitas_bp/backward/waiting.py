"""Saved tensors about which the policy decides only when it knows the next call."""

from collections.abc import Callable
from typing import Any

import torch

from brevitas_bp.backward.kept import Kept
from brevitas_bp.backward.location import Location
from brevitas_bp.backward.saved import Call, SavedTensor, tensors_in
from brevitas_bp.backward.units import Deferred
from brevitas_bp.codec.keep import version_of
from brevitas_bp.private import in_forward_ad, is_functorch_wrapped

# Stores a tensor; returns what autograd gets in its place.
_Store = Callable[[], Any]


def may_wait(call: Call) -> bool:
    """Whether tensors that a call saves may be stored after the call has ended.

    Forward mode saves more tensors, some of them without memory. In transforms of ``torch.func``,
    tensors that are computed after the operation may have no memory.
    """
    return not in_forward_ad() and not any(
        is_functorch_wrapped(t) for t in tensors_in(call.arguments))


class Waiting:
    """The saved tensors of one forward pass that wait for the next call. The pass must end it.

    Args:
        location: of the forward pass.
    """

    def __init__(self, location: Location) -> None:
        self._location = location
        self._tensors: list[tuple[SavedTensor, Deferred, Kept, _Store]] = []

    def add(self, saved: SavedTensor, store: _Store) -> Deferred:
        """Lets a tensor wait.

        Args:
            saved: the tensor.
            store: stores the tensor, when ``saved.following`` is known.
        """
        deferred = Deferred(self._location.follow)
        self._tensors.append((
            saved, deferred, Kept(saved.tensor, saved.call.function, saved.module), store))
        if len(self._tensors) == 1:
            self._location.following.append(self.end)
        return deferred

    def end(self, following: Call) -> None:
        """Stores the tensors that wait; ``following`` is the next call, or NO_CALL.

        If a tensor was modified while it waited, backward raises
        :class:`~brevitas_bp.errors.ModifiedInPlaceError`, as plain autograd does.
        """
        if not self._tensors:
            # An exported graph would have a trace of the block below.
            return
        tensors, self._tensors = self._tensors, []
        # Autograd runs hooks like this; here we are outside of one.
        with torch.no_grad():
            for saved, deferred, kept, store in tensors:
                saved.following = following
                deferred.fill(store() if version_of(saved.tensor) == kept.version else kept)

    def drop(self) -> None:
        """Keeps the tensors that wait as they are, after an exception."""
        tensors, self._tensors = self._tensors, []
        for _, deferred, kept, _ in tensors:
            deferred.fill(kept)
