"""Adapters on frozen models: saved tensors, and the keys of checkpoints."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torchvision_first  # noqa: F401
from lora import ALL, WAYS, LowRankLinear, base, by_hand, with_peft
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from brevitas_bp import QuantBackwardWrapper, track_saved_memory

pytestmark = pytest.mark.filterwarnings(
    r"ignore:`is_gradient_checkpointing` is deprecated:FutureWarning:transformers\..*")

IDS = torch.randint(0, 100, (4, 32), generator=torch.Generator().manual_seed(0))


def wrap_body(model: nn.Module) -> nn.Module:
    """Wraps a model without its head, in place."""
    model.model = QuantBackwardWrapper(
        model.model, bucket_size=256, metadata_dtype=torch.bfloat16, seed=0)
    return model


def small() -> nn.Module:
    return base(vocab_size=100, hidden_size=64, intermediate_size=128, num_hidden_layers=2)


#: Orders in which the wrapper and PEFT may be applied.
ORDERS: dict[str, Callable[[], nn.Module]] = {
    "body, then PEFT": lambda: with_peft(wrap_body(small()), ALL),
    "PEFT, then body": lambda: wrapped_inside(with_peft(small(), ALL)),
    "whole, then PEFT": lambda: with_peft(QuantBackwardWrapper(small(), seed=0), ALL),
    "PEFT, then whole": lambda: QuantBackwardWrapper(with_peft(small(), ALL), seed=0),
}


def wrapped_inside(model: nn.Module) -> nn.Module:
    wrap_body(model.get_base_model())
    return model


@pytest.fixture(scope="module")
def trained() -> Iterator[nn.Module]:
    """Yields a model without a wrapper, whose adapters have an effect."""
    with pytest.MonkeyPatch.context():
        model = with_peft(small(), ALL)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05, generator=generator)
    yield model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("order", ORDERS)
def test_adapters_move_between_plain_and_wrapped(
        order: str, trained: nn.Module, tmp_path: Path) -> None:
    adapters = get_peft_model_state_dict(trained)
    expected = logits(trained)
    assert not torch.equal(logits(small()), expected)
    model = ORDERS[order]()
    of_peft = model.module if isinstance(model, QuantBackwardWrapper) else model
    loaded = set_peft_model_state_dict(of_peft, adapters)
    assert not loaded.unexpected_keys
    assert torch.equal(logits(model), expected)
    assert get_peft_model_state_dict(of_peft).keys() == adapters.keys()
    model.save_pretrained(str(tmp_path))
    for again in (small(), wrap_body(small())):
        assert torch.equal(logits(PeftModel.from_pretrained(again, str(tmp_path))), expected)


@pytest.mark.parametrize("order", ORDERS)
def test_adapters_merge_into_the_wrapped_model(order: str, trained: nn.Module) -> None:
    model = ORDERS[order]()
    of_peft = model.module if isinstance(model, QuantBackwardWrapper) else model
    set_peft_model_state_dict(of_peft, get_peft_model_state_dict(trained))
    merged = model.merge_and_unload()
    assert merged.state_dict().keys() == small().state_dict().keys()
    # Merging rounds the weight once more: some tens of float32 sums of values below 10.
    torch.testing.assert_close(logits(merged), logits(trained), rtol=0, atol=1e-4)


class Recorded(nn.Module):
    """The control: a module inside another adds a part to every name."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def test_a_step_more_in_the_names_would_lose_adapters(trained: nn.Module) -> None:
    model = with_peft(small(), ALL)
    inner = model.base_model.model
    inner.model = Recorded(inner.model)
    found = set_peft_model_state_dict(model, get_peft_model_state_dict(trained))
    assert found.unexpected_keys


@pytest.mark.parametrize("way", WAYS)
def test_gradients_of_what_trains(way: str) -> None:
    found: dict[str, dict[str, Tensor]] = {}
    for policy in ("plain", "exact", "op_aware"):
        torch.manual_seed(0)
        model = WAYS[way](small()).train()
        if policy != "plain":
            model = QuantBackwardWrapper(model, policy=policy, seed=0)
        torch.manual_seed(2)
        model(input_ids=IDS, labels=IDS).loss.backward()
        found[policy] = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found["plain"].keys() == found["exact"].keys() == found["op_aware"].keys()
    for policy in ("exact", "op_aware"):
        same = all(torch.equal(found[policy][name], grad) for name, grad in found["plain"].items())
        assert same is (policy == "exact")
    assert ("lora" in next(iter(found["plain"]))) is (way.startswith("LoRA, "))


def saved(model: nn.Module, **inputs: Tensor) -> dict[str, tuple[int, int]]:
    """Returns operation -> exact and stored bytes."""
    with track_saved_memory(model.train()) as report:
        kept = model(**inputs)
    assert kept.loss.requires_grad
    total: dict[str, tuple[int, int]] = {}
    for row in report.rows:
        before = total.get(row.op, (0, 0))
        total[row.op] = before[0] + row.exact_bytes, before[1] + row.stored_bytes
    return total


def test_frozen_layers_save_no_input() -> None:
    inputs = {"input_ids": IDS, "labels": IDS}
    full, adapted, by_us = (
        saved(wrap(wrap_body(small())), **inputs) for wrap in (
            WAYS["full fine-tuning"], WAYS["LoRA, q and v"],
            lambda model: by_hand(model, ["q_proj", "v_proj"])))
    assert adapted["linear"][0] < full["linear"][0] / 3
    for operations in (full, adapted):
        assert sum(e for e, _ in operations.values()) > 2.5 * sum(s for _, s in operations.values())
    assert sum(e for e, _ in adapted.values()) < sum(e for e, _ in full.values())
    assert by_us["linear"] == adapted["linear"]


def test_adapters_by_hand_begin_as_the_layer() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 64), torch.randn(32, 64)
    model = QuantBackwardWrapper(LowRankLinear(layer), bucket_size=64, seed=0)
    assert torch.equal(model(x), layer(x))
    model(x).square().sum().backward()
    assert layer.weight.grad is None
    assert model.up.weight.grad is not None
