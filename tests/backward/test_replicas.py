"""Shallow copies: replicas of nn.DataParallel, whose parameters are set from outside, and copy.copy."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from brevitas_bp import QuantBackwardWrapper, track_saved_memory
from brevitas_bp.quant import ShiftedUint2DynamicActPerBucketFloatStochastic as Stochastic2


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU(),
        nn.Sequential(nn.Flatten(), nn.LayerNorm(8 * 36), nn.Linear(8 * 36, 10)))


def replicas_of(network: nn.Module, count: int) -> list[Any]:
    """Does what ``torch.nn.parallel.replicate`` does, with copies on the CPU instead of broadcasts."""
    modules = list(network.modules())
    index = {module: i for i, module in enumerate(modules)}
    copies: list[list[Any]] = []
    for _ in range(count):
        copies.append([module._replicate_for_data_parallel() for module in modules])
    for i, module in enumerate(modules):
        for replica in (row[i] for row in copies):
            replica._former_parameters = {}
        for key, child in module._modules.items():
            for row in copies:
                setattr(row[i], key, row[index[child]])
        for key, parameter in module._parameters.items():
            for row in copies:
                value = parameter * 1
                setattr(row[i], key, value)
                row[i]._former_parameters[key] = value
        for key, buffer in module._buffers.items():
            for row in copies:
                setattr(row[i], key, buffer.clone())
    return [row[0] for row in copies]


def test_replicas_leave_the_network_as_it_is() -> None:
    model = QuantBackwardWrapper(network(), Stochastic2, seed=0)
    before = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
    keys, inner = list(model.state_dict()), model.module
    replicas_of(model, 2)
    assert model.module is inner and list(model.state_dict()) == keys
    after = dict(model.named_parameters())
    assert {name: id(p) for name, p in after.items()} == {name: i for name, (i, _) in before.items()}
    assert all(torch.equal(p, before[name][1]) for name, p in after.items())


def test_replicas_give_the_gradients_of_the_network() -> None:
    x = torch.randn(8, 3, 8, 8)
    for wrapped in (False, True):
        plain = network()
        whole = QuantBackwardWrapper(plain, policy="exact") if wrapped else plain
        for replica, part in zip(replicas_of(whole, 2), x.chunk(2)):
            replica(part).square().sum().backward()
        grads = [p.grad for p in plain.parameters()]
        if not wrapped:
            expected = grads
    assert all(torch.equal(a, b) for a, b in zip(grads, expected))


def test_replicas_store_in_few_bits_with_noise_of_their_own() -> None:
    model, x = QuantBackwardWrapper(network(), Stochastic2, seed=0), torch.randn(16, 3, 8, 8)
    found: list[list[Tensor]] = []
    for replica in replicas_of(model, 2):
        with track_saved_memory(replica) as report:
            output = replica(x)
        # Neither parameters nor their copies are counted: copies would be exact.
        assert report.ratio > 3 and not report.unknown_operations
        model.zero_grad()
        output.sum().backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(found[0]) == 8 and any(not torch.equal(a, b) for a, b in zip(*found))


def test_a_shallow_copy_is_one_of_the_module_too() -> None:
    model = QuantBackwardWrapper(network(), Stochastic2, seed=0)
    model.register_buffer("scale", torch.ones(3))
    model.module.note = "original"
    other = copy.copy(model)
    other.note = "copy"
    assert (model.note, other.note) == ("original", "copy")
    assert other.module is not model.module and list(other.state_dict()) == list(model.state_dict())
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(other(x), model(x))
