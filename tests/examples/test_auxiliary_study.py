"""The study of auxiliary activations: its policy without a quantizer is exact; which rows are less."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

STUDIES = Path(__file__).parents[2] / "examples" / "studies"


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports the script."""
    monkeypatch.syspath_prepend(str(STUDIES))
    return importlib.import_module("auxiliary")


def gradients(study: Any, model: Any, batch: tuple[Tensor, Tensor]) -> list[Tensor]:
    model.zero_grad()
    study.loss_of(model, batch).backward()
    return [p.grad.clone() for p in model.parameters()]


def test_masks_change_no_gradient(study: Any) -> None:
    torch.manual_seed(0)
    network = study.narrow_resnet()
    batch = torch.randn(8, 3, 32, 32), torch.randint(10, (8,))
    exact, stored = gradients(study, network, batch), study.bytes_of(network, batch[0])
    model = study.masks(network)
    assert all(torch.equal(a, b) for a, b in zip(gradients(study, model, batch), exact))
    # Convolutions keep the outputs of all ReLUs but those that auxiliary layers read.
    assert study.bytes_of(model, batch[0]) == stored


def test_rows(study: Any) -> None:
    x = torch.randn(8, 3, 32, 32)
    rows = study.memory_rows(study.RESNET, study.narrow_resnet, x)
    ratios = {way: float(ratio) for way, _, ratio in rows}
    assert ratios["ARA"] == ratios["exact"] == 1
    for less, more in (("ARA, masks", "masks"), ("ASA, masks", "masks"), ("ASA, masks", "ASA"),
                       ("ARA at 2 bits, masks", "ARA, masks"),
                       ("ARA, default policy, 2 bits", "default policy, 2 bits"),
                       ("ASA, default policy, 2 bits", "default policy, 2 bits")):
        assert ratios[less] > ratios[more]
    x = torch.randn(4, 16, 64)
    rows = study.memory_rows(study.TRANSFORMER, lambda: study.transformer(64, 4, 2), x)
    ratios = {way: float(ratio) for way, _, ratio in rows}
    assert ratios["exact"] < ratios["ARA"] < ratios["ARA at 2 bits"] < ratios["default policy, 2 bits"]
