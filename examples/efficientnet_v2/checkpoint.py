"""Checkpoints that are never half written and never resumed with other knobs."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from faults import InputError
from files import write_atomically

FORMAT = 1


def save_checkpoint(path: Path, config: dict[str, Any], state: dict[str, Any]) -> None:
    """Replace `path` by a checkpoint of `state`, in one atomic step.

    Args:
        path: The file. The old file stays whole until the new file is on disk.
        config: Identity knobs, compared when the checkpoint is resumed.
        state: Tensors and plain values only, since loading uses `weights_only=True`.
    """
    content = {"format": FORMAT, "config": config, "state": state}
    write_atomically(path, lambda file: torch.save(content, file))


def load_checkpoint(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Return the state saved at `path`, on the CPU.

    Raises:
        InputError: The file is missing or damaged, or was saved with other identity knobs.
    """
    if not path.is_file():
        raise InputError(f"{path}: no checkpoint to resume; start again with --overwrite")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: damaged checkpoint ({error}); use --overwrite") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"{path}: expected a checkpoint of format {FORMAT}; use --overwrite")
    refuse_other_config(path, content["config"], config)
    return content["state"]


def refuse_other_config(where: Path, saved: dict[str, Any], config: dict[str, Any]) -> None:
    """Raise an `InputError` that lists every knob with different values in `saved` and `config`."""
    different = [
        f"  {name}: saved {saved.get(name)!r}, now {config.get(name)!r}"
        for name in sorted(saved.keys() | config.keys())
        if saved.get(name) != config.get(name)
    ]
    if different:
        lines = "\n".join(different)
        raise InputError(
            f"{where}: this run was started with other knobs:\n{lines}\n"
            "pass the saved values, choose another --out, or start again with --overwrite"
        )


def random_state(device: torch.device) -> dict[str, Any]:
    """Return the state of torch's global generators."""
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Restore what `random_state` returned."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
