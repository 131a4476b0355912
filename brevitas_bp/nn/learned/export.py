"""Learned tensors as integers with scales: export, files, and weights from them."""

import io
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from brevitas_bp.nn.learned.integers import integers_of
from brevitas_bp.nn.learned.tensors import LearnedTensor, placed_learned_tensors

_WHERE = "brevitas_bp.nn.learned"
_ENTRY = "tensors.pt"
_PARTS = ("integers", "scales", "others")


@dataclass(frozen=True)
class ExportedIntegers:
    """A trained model with integers in place of its learned tensors.

    Names are those of the model without quantization: "0.weight".

    Attributes:
        integers: name -> int8, int16 or int32, the smallest that holds the tensor.
        scales: name -> scale, 0-d or with the dimensions of the tensor.
        others: everything else of the ``state_dict``.
    """

    integers: dict[str, Tensor]
    scales: dict[str, Tensor]
    others: dict[str, Any]

    def state_dict(self) -> dict[str, Any]:
        """Returns weights of the model without quantization: integers times scales.

        They are bit for bit what the layers computed with.
        """
        return {**self.others, **{
            name: _values(integers, self.scales[name]) for name, integers in self.integers.items()}}

    def save(self, path: str | Path) -> int:
        """Writes a zip file with one deflated entry, and returns its bytes."""
        _write_zip(path, {part: getattr(self, part) for part in _PARTS})
        return Path(path).stat().st_size

    @classmethod
    def load(cls, path: str | Path) -> "ExportedIntegers":
        """Reads a file of :meth:`save`.

        Raises:
            ValueError: the file is of another kind.
        """
        try:
            with zipfile.ZipFile(path) as file:
                found = torch.load(io.BytesIO(file.read(_ENTRY)), weights_only=True)
            return cls(**found)
        except (zipfile.BadZipFile, pickle.UnpicklingError, KeyError, TypeError, RuntimeError) as error:
            raise ValueError(
                f"{_WHERE}.ExportedIntegers.load: expected a file written by save, got {path} "
                f"({error})") from error

    def zipped_nbytes(self) -> int:
        """Returns the bytes of the file that :meth:`save` writes."""
        return zipped_nbytes({part: getattr(self, part) for part in _PARTS})


@torch.no_grad()
def _values(integers: Tensor, scale: Tensor) -> Tensor:
    dtype = torch.promote_types(scale.dtype, torch.float32)
    return (integers.to(dtype) * scale.to(dtype)).to(scale.dtype)


def _write_zip(target: str | Path | IO[bytes], tensors: Mapping[str, Any]) -> None:
    buffer = io.BytesIO()
    torch.save(dict(tensors), buffer)
    # ZipInfo has a fixed date, so that equal tensors give equal files.
    with zipfile.ZipFile(target, "w") as file:
        file.writestr(zipfile.ZipInfo(_ENTRY), buffer.getvalue(), zipfile.ZIP_DEFLATED, 9)


def zipped_nbytes(tensors: Mapping[str, Any]) -> int:
    """Returns the bytes of a zip file of tensors (``torch.save``, deflated).

    >>> zipped_nbytes({"x": torch.zeros(10_000)}) < 2_000
    True
    """
    buffer = io.BytesIO()
    _write_zip(buffer, tensors)
    return len(buffer.getvalue())


@torch.no_grad()
def export_integers(model: nn.Module) -> ExportedIntegers:
    """Returns the learned tensors of ``model`` as integers and scales, and all other tensors, on CPU.

    Raises:
        ValueError: no learned tensors, or NaN or Inf in one.
        OverflowError: an integer needs more than 32 bits: nothing overflows in silence.

    >>> from brevitas_bp.nn.learned import learn_quantization
    >>> layer = nn.Linear(3, 2)
    >>> _ = learn_quantization(layer, granularity="row", lam=1e-10, scale_init=0.25)
    >>> exported = export_integers(layer)
    >>> exported.integers["weight"].dtype, exported.scales["weight"].shape
    (torch.int8, torch.Size([1, 3]))
    >>> plain = nn.Linear(3, 2)
    >>> plain.load_state_dict(exported.state_dict())
    <All keys matched successfully>
    >>> torch.equal(plain.weight, layer.weight)
    True
    """
    where = f"{_WHERE}.export_integers"
    placed = placed_learned_tensors(where, model)
    own = tuple(place.own for place in placed)
    keys = {place.key for place in placed}
    others = {
        key: _on_cpu(value) for key, value in model.state_dict().items()
        if key not in keys and not key.startswith(own)}
    named = {place.name: tensor for place, tensor in placed.items()}
    return ExportedIntegers(
        {name: _on_cpu(integers_of(where, name, tensor)) for name, tensor in named.items()},
        {name: _on_cpu(_wide_scale(tensor)) for name, tensor in named.items()},
        others)


def _wide_scale(tensor: LearnedTensor) -> Tensor:
    """Returns the scale in a dtype that also holds the parameter's values."""
    scale = tensor.scale
    return scale.to(torch.promote_types(scale.dtype, tensor.parameter.dtype))


def _on_cpu(value: Any) -> Any:
    return value.detach().cpu().clone() if isinstance(value, Tensor) else value
