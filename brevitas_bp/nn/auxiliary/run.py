"""A run of layers that share one auxiliary tensor: the input of the run."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import disable, is_compiling

from brevitas_bp.backward.noise import Noise
from brevitas_bp.backward.rows import RowsOf
from brevitas_bp.backward.saved import NO_CALL
from brevitas_bp.codec import Codec, codec_from
from brevitas_bp.codec.base import FLOATS
from brevitas_bp.codec.rows import in_rows
from brevitas_bp.nn.auxiliary.stored import ITSELF, Stored, encoded

_WHERE = "brevitas_bp.nn.AuxiliaryRun"
# Stands for the network, which the noise asks for its group of processes.
_NOTHING = nn.Module()


def _call(function: Callable[..., None], *arguments: Any) -> None:
    function(*arguments)


#: Calls a function that Dynamo must not trace.
_in_python: Any = disable(_call)


class _State(threading.local):
    """What a run holds while its layers run, in one thread; replicas of DataParallel have one each."""

    is_open: bool = False
    a: Tensor | None = None
    stored: Stored | None = None


class AuxiliaryRun:
    """Hands one auxiliary tensor, the input of a run, to all layers of the run.

    A run begins with the input ``A`` of its first block. Each block adds something to its input, so the
    input of each later block contains ``A``. The auxiliary layers of the run use ``A`` in backward
    in the place of their own inputs, and store ``A`` once. The first block's own input is ``A``, so its
    gradients are exact.

    ``A`` is detached: it is no path for gradients. The run holds ``A`` from :meth:`begin` to
    :meth:`end`; after that, only autograd's graph does.

    Source: Woo and Jeon, "Learning with Auxiliary Activation for Memory-Efficient Training", 2023.
    Biased: the gradient of each weight but those of the first block is that at ``A``.

    Args:
        codec: stores ``A``: a codec, or a config of :func:`~brevitas_bp.codec.codec_from`; None: exact.
            With a codec, ``A`` is rounded once for the whole run.
        seed: seed of the run's private noise; None derives it from ``torch.initial_seed()``.
        name: shown in messages.
        **overrides: settings of the config.

    Raises:
        TypeError: there is nothing to apply the overrides to, or ``codec`` is no quantizer.

    Example:
        >>> from brevitas_bp.nn import AuxiliaryResidualLinear
        >>> run = AuxiliaryRun()
        >>> first, second = (AuxiliaryResidualLinear(8, 8, run=run) for _ in range(2))
        >>> x = torch.randn(4, 8)
        >>> with run.over(x):
        ...     y = x + first(x)
        ...     z = y + second(y)
        >>> z.sum().backward()
        >>> torch.allclose(second.weight.grad, x.sum(0).expand(8, 8), atol=1e-5)
        True
    """

    def __init__(
            self, codec: Any = None, *, seed: int | None = None, name: str = "",
            **overrides: Any) -> None:
        if codec is None or isinstance(codec, Codec):
            if overrides:
                raise TypeError(
                    f"{_WHERE}: the settings {sorted(overrides)} would do nothing, because codec is "
                    f"{'None' if codec is None else 'built already'}; pass a config class")
            self.codec: Codec | None = codec
        else:
            self.codec = codec_from(codec, **overrides)
        self.name = name
        self._noise = Noise(seed)
        self._state = _State()

    @property
    def leaves_graphs(self) -> bool:
        """Whether compiled graphs end before all that the run does: Dynamo cannot trace a codec."""
        return self.codec is not None

    @property
    def is_open(self) -> bool:
        """Whether it has begun in this thread, and has not ended."""
        return self._state.is_open

    def begin(self, x: Tensor) -> None:
        """Takes the input of the run. Without gradients, it holds no tensor.

        Raises:
            RuntimeError: the run is open already.
            TypeError: ``x`` is not a tensor of floats.
        """
        if self.leaves_graphs and is_compiling():
            _in_python(self.begin, x)
            return
        state = self._state
        if state.is_open:
            raise RuntimeError(
                f"{_WHERE}: {self._name} begins again before it has ended. Either a block of it runs "
                "twice in one forward pass, or its last block did not run. Make a run for each use, and "
                "end each run at a block that always runs; reset() drops a run that was interrupted")
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(
                f"{_WHERE}: {self._name} begins with a tensor of floats, the input of its first "
                f"block, got {x.dtype if isinstance(x, Tensor) else type(x).__name__}")
        state.is_open = True
        if torch.is_grad_enabled():
            # If it were not detached, it would be a second path for gradients of x.
            state.a = x.detach()

    def end(self) -> None:
        """Drops the auxiliary tensor; layers that run after this need another :meth:`begin`.

        Raises:
            RuntimeError: the run is not open.
        """
        if self.leaves_graphs and is_compiling():
            _in_python(self.end)
            return
        if not self._state.is_open:
            raise RuntimeError(
                f"{_WHERE}: {self._name} ends, but it has not begun. Its first block did not run before "
                "its last one; list the blocks of a run in the order in which they run")
        self.reset()

    def reset(self) -> None:
        """Drops the auxiliary tensor, if any: for runs that an exception has interrupted."""
        if self.leaves_graphs and is_compiling():
            _in_python(self.reset)
            return
        state = self._state
        state.is_open, state.a, state.stored = False, None, None

    @contextmanager
    def over(self, x: Tensor) -> Iterator["AuxiliaryRun"]:
        """Within the block, layers of this run use ``x`` as their auxiliary tensor."""
        self.begin(x)
        try:
            yield self
        finally:
            self.reset()

    def auxiliary_for(self, x: Tensor, layer: str) -> Tensor:
        """Returns the auxiliary tensor for a layer with input ``x``.

        Raises:
            RuntimeError: the run is not open, or has begun without gradients.
            ValueError: ``x`` has another shape, or is on another device.
        """
        a = self._state.a
        if a is None:
            raise RuntimeError(
                f"brevitas_bp.nn.{layer}: {self._name} is not open, so there is no auxiliary "
                "activation. " + (
                    "It began without gradients; enable them before its first block runs"
                    if self._state.is_open else
                    "Its first block must run before, in the same forward pass and the same "
                    "checkpointed part; a layer that runs alone can run under torch.no_grad()"))
        if a.shape != x.shape or a.device != x.device:
            raise ValueError(
                f"brevitas_bp.nn.{layer}: the auxiliary activation of {self._name} has shape "
                f"{list(a.shape)} on {a.device}, but the layer's input has {list(x.shape)} on "
                f"{x.device}; end the run at the block that changes stride, channels or device, and "
                "give the layers behind it another run")
        return a

    def stored_for(self, x: Tensor, layer: str, rows: RowsOf) -> Stored:
        """Returns what a layer with input ``x`` saves: the same tensors for all layers of the run."""
        a, state = self.auxiliary_for(x, layer), self._state
        if state.stored is None:
            codec = self.codec
            state.stored = (ITSELF, (a,)) if codec is None else self._encode(codec, a, rows)
        return state.stored

    @torch.no_grad()
    def _encode(self, codec: Codec, a: Tensor, rows: RowsOf) -> Stored:
        if codec.per_site:
            codec = codec.at_site(self.name)
        found = rows(a, NO_CALL) if a.numel() and a.dtype in FLOATS else None
        if found is not None:
            codec = in_rows(codec, found)
        seed = self._noise.seeds(_NOTHING)()
        return encoded(codec, a, seed, f"the auxiliary activation of {self._name}")

    def noise_state(self) -> dict[str, int]:
        """Returns the state of the private noise, for a checkpoint that resumes bit for bit."""
        return self._noise.stream.state()

    def set_noise_state(self, state: dict[str, int]) -> None:
        """Continues the noise from :meth:`noise_state`."""
        self._noise.stream.set_state(state)

    @property
    def _name(self) -> str:
        return f"run {self.name!r}" if self.name else "the run"

    def __repr__(self) -> str:
        stored = "exact" if self.codec is None else self.codec.name
        return f"AuxiliaryRun({self.name!r}, {stored})" if self.name else f"AuxiliaryRun({stored})"

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles begin closed.
        return {key: value for key, value in self.__dict__.items() if key != "_state"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _state=_State())
