"""Callbacks for PyTorch Lightning and for Transformers' ``Trainer``.

``LightningMemory`` and ``TransformersMemory`` log what training saves for backward. ``LightningNoise``
and ``TransformersNoise`` put the noise streams of the wrappers into checkpoints, so that a run resumes
bit for bit. A class is made, and its trainer imported, when the class is first asked for:

    from brevitas_bp.trainers import LightningMemory
"""

import importlib
from typing import TYPE_CHECKING, Any

from brevitas_bp.trainers.lightning_hooks import MemoryHooks as _LightningMemory
from brevitas_bp.trainers.lightning_hooks import NoiseHooks as _LightningNoise
from brevitas_bp.trainers.transformers_hooks import MemoryHooks as _TransformersMemory
from brevitas_bp.trainers.transformers_hooks import NoiseHooks as _TransformersNoise

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback
    from transformers import TrainerCallback
    from transformers.trainer_callback import ExportableState

    class LightningMemory(_LightningMemory, Callback):
        """Logs what training saves for backward."""

    class LightningNoise(_LightningNoise, Callback):
        """Keeps noise in checkpoints."""

    class TransformersMemory(_TransformersMemory, TrainerCallback):
        """Logs what training saves for backward."""

    class TransformersNoise(_TransformersNoise, TrainerCallback, ExportableState):
        """Keeps noise in checkpoints."""

__all__ = ["LightningMemory", "LightningNoise", "TransformersMemory", "TransformersNoise"]

_LIGHTNING = ("lightning.pytorch.callbacks:Callback",)
_TRANSFORMERS = ("transformers.trainer_callback:TrainerCallback",)
#: Class -> its methods, and the classes of the trainer that it derives from.
_PARTS: dict[str, tuple[type, tuple[str, ...]]] = {
    "LightningMemory": (_LightningMemory, _LIGHTNING),
    "LightningNoise": (_LightningNoise, _LIGHTNING),
    "TransformersMemory": (_TransformersMemory, _TRANSFORMERS),
    "TransformersNoise": (
        _TransformersNoise, (*_TRANSFORMERS, "transformers.trainer_callback:ExportableState"))}


def __getattr__(name: str) -> Any:
    if name not in _PARTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    methods, bases = _PARTS[name]
    made = type(name, (methods, *(_imported(base, name) for base in bases)), {
        "__module__": __name__, "__doc__": methods.__doc__})
    return globals().setdefault(name, made)


def _imported(path: str, name: str) -> Any:
    """Returns a class of a trainer.

    Raises:
        ImportError: the trainer is not installed.
    """
    module, _, attribute = path.partition(":")
    package = module.partition(".")[0]
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as missing:
        if (missing.name or "").partition(".")[0] != package:
            raise
        raise ImportError(
            f"brevitas_bp.trainers.{name}: needs {package}, which is not installed: pip install "
            f"{package}, or pip install brevitas-bp[trainers]") from missing
