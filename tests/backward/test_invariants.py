"""The twelve invariants of the design, one test each."""

import copy
import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.nn.modules import module as torch_module
from torch.overrides import _get_current_function_mode_stack

from brevitas_bp import (
    Codec,
    ModifiedInPlaceError,
    Packed,
    QuantBackwardWrapper,
    SavedTensor,
    codec_from,
    track_saved_memory,
)
from brevitas_bp.backward.seam import listening
from brevitas_bp.codec.quantized import LoweredCodec, ModuleCodec
from brevitas_bp.quant import ShiftedUint2DynamicActPerBucketFloatStochastic as Stochastic
from tests.backward.support import (
    NETS,
    QUANTIZING,
    SPIES,
    Apply,
    HalfCodec,
    SeeSaved,
    assert_same,
    naive_hooks,
    net,
    run,
    wrapped_run,
)

POLICIES = [*QUANTIZING, "all_but_relu", "exact"]


# 1. Wrapping changes no bit of the forward.


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", NETS)
def test_forward_is_bit_identical(name: str, policy: str) -> None:
    module, inputs = net(name)
    plain, wrapped = run(module, *inputs), wrapped_run(module, *inputs, policy=policy)
    assert torch.equal(wrapped.output, plain.output)  # dropout masks included
    assert_same(wrapped.buffers, plain.buffers)  # batch-norm statistics
    assert torch.equal(wrapped.rng, plain.rng)


# 2. With an exact policy every gradient equals plain autograd.


@pytest.mark.parametrize("storage", ["save_quantized", "quantize_on_backward"])
@pytest.mark.parametrize("name", NETS)
def test_exact_policy_gives_the_gradients_of_plain_autograd(name: str, storage: str) -> None:
    module, inputs = net(name)
    plain = run(module, *inputs)
    assert plain.grads
    assert_same(wrapped_run(module, *inputs, policy="exact", storage=storage).grads, plain.grads)


@pytest.mark.parametrize("name", sorted(set(NETS) - {"embedding"}))
def test_naive_hooks_do_change_these_gradients(name: str) -> None:
    module, inputs = net(name)
    plain = run(module, *inputs).grads
    with naive_hooks():
        naive = run(module, *inputs).grads
    assert any(not torch.equal(naive[key], plain[key]) for key in plain)


# 3. Parameters and buffers are never quantized (their disguises: test_parameters.py).


@pytest.mark.parametrize("policy", QUANTIZING)
@pytest.mark.parametrize("name", NETS)
def test_no_policy_is_asked_about_a_parameter_or_buffer(name: str, policy: str) -> None:
    module, inputs = net(name)
    spy = SPIES[policy]()
    model = QuantBackwardWrapper(module, policy=spy)
    model(*inputs)
    own = {t.untyped_storage()._cdata for t in (*module.parameters(), *module.buffers())}
    assert spy.asked
    assert not own & {saved.tensor.untyped_storage()._cdata for saved in spy.asked}


# 4. A tensor saved by several operations is encoded once (more: test_encode_once.py).


def test_tensor_saved_by_several_operations_is_encoded_once() -> None:
    half = HalfCodec()
    module = nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 3))
    QuantBackwardWrapper(module, policy=lambda saved: half)(torch.randn(2, 4, 8, 8) * 1)
    assert len(half.seeds) == 1


# 5. A payload is self-contained and immutable.


def test_decoding_twice_gives_the_same_bits() -> None:
    x = torch.randn(40, 64)
    packed = codec_from(Stochastic).encode(x, seed=3)
    first = packed.decode().clone()
    x.zero_()
    packed.decode().zero_()
    assert torch.equal(packed.decode(), first)


# 6. A kept tensor that is modified in place raises (more: test_in_place.py).


def test_kept_tensor_that_is_modified_raises() -> None:
    x = torch.randn(8, 8, requires_grad=True)
    kept = x * 1
    loss = QuantBackwardWrapper(Apply(torch.exp), policy="exact")(kept).sum()
    kept.zero_()
    loss.backward()  # exp saves its output, so its input may change
    loss = QuantBackwardWrapper(Apply(torch.sin), policy="exact")(kept).sum()
    kept.zero_()
    with pytest.raises(ModifiedInPlaceError, match="modified by an inplace operation"):
        loss.backward()


# 7. Decode restores shape, dtype, device and strides (more: test_layouts.py).


def test_decode_restores_the_layout() -> None:
    x = torch.randn(4, 6, 8, 10, dtype=torch.float64).permute(0, 2, 3, 1).requires_grad_()
    QuantBackwardWrapper(Apply(SeeSaved.apply), policy="all")(x).backward()
    seen = SeeSaved.seen
    assert not torch.equal(seen, x)  # really quantized
    assert (seen.shape, seen.dtype, seen.device, seen.stride()) == (
        x.shape, x.dtype, x.device, x.stride())


# 8. No parameters, no keys; checkpoints move both ways (more: test_module_state.py).


def test_wrapper_adds_no_parameters_and_no_keys() -> None:
    module, _ = net("conv")
    model = QuantBackwardWrapper(copy.deepcopy(module))
    assert len(list(model.parameters())) == len(list(module.parameters()))
    assert list(model.state_dict()) == list(module.state_dict())
    model.load_state_dict(module.state_dict())
    module.load_state_dict(model.state_dict())


# 9. No global state (more: test_isolation.py).


@pytest.mark.parametrize("policy", QUANTIZING)
@pytest.mark.parametrize("name", NETS)
def test_nothing_is_left_installed_after_forward(name: str, policy: str) -> None:
    module, inputs = net(name)
    QuantBackwardWrapper(module, policy=policy)(*inputs)
    assert not torch_module._global_forward_pre_hooks
    assert not torch_module._global_forward_hooks
    assert not _get_current_function_mode_stack()
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None


# 10. The same seed gives the same bytes on the general path (backends: tests/kernels).


@pytest.mark.parametrize("policy", QUANTIZING)
def test_lowered_and_general_path_store_the_same_bytes_through_the_wrapper(policy: str) -> None:
    module, inputs = net("conv")
    lowered = codec_from(Stochastic, bucket_size=64)
    assert type(lowered) is LoweredCodec
    general = ModuleCodec(lowered.quantizer)
    payloads = []
    for codec in (lowered, general):
        packed: list[Packed] = []
        model = QuantBackwardWrapper(copy.deepcopy(module), codec, seed=7, policy=policy)
        torch.manual_seed(0)

        def note(
                saved: Any, p: Packed, decision: Any, originals: Any,
                to: list[Packed] = packed) -> None:
            # Codes for probabilities are not made of the quantizer's own parts.
            if "softmax" not in saved.op:
                to.append(p)

        with listening(model, note):
            output = model(*inputs)
        payloads.append([t.clone() for p in packed for t in p.tensors])
        del output
    assert len(payloads[0]) == len(payloads[1])
    assert all(torch.equal(a, b) for a, b in zip(*payloads))


# 11. eval() does not change rounding; no_grad spends nothing (more: test_noise.py).


@pytest.mark.parametrize("policy", QUANTIZING)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_grad_nothing_is_packed(context: Any, policy: str) -> None:
    spy = SPIES[policy]()
    model = QuantBackwardWrapper(nn.Sequential(nn.Linear(64, 64), nn.Tanh()), policy=spy, seed=3)
    x = torch.randn(32, 64, requires_grad=True)
    with context():
        model(x)
    assert not spy.asked
    assert model.noise_state()["position"] == 0
    model(x)
    assert spy.asked
    assert model.noise_state()["position"] > 0


# 12. Reported bytes equal the bytes of live tensors (more: test_memory.py).


def test_reported_bytes_are_those_of_live_tensors() -> None:
    packed: list[Packed] = []

    class Keeper(Codec):
        def encode(self, x: Tensor, *, seed: int, where: str = "") -> Packed:
            packed.append(codec_from(Stochastic).encode(x, seed=seed))
            return packed[-1]

        def decode(self, packed: Packed) -> Tensor:
            return packed.decode()

    def policy(saved: SavedTensor) -> Codec:
        return Keeper()

    model = QuantBackwardWrapper(Apply(F.silu), policy=policy)
    with track_saved_memory(model) as report:
        loss = model(torch.randn(64, 64, requires_grad=True) * 1).sum()
    # Scale and offset share one storage.
    memory = {s.data_ptr(): s for s in (t.untyped_storage() for t in packed[0].tensors)}
    storages = [StorageWeakRef(s) for s in memory.values()]
    assert report.stored_bytes == sum(s.nbytes() for s in memory.values())
    packed.clear()
    memory.clear()
    del loss
    gc.collect()
    assert all(storage.expired() for storage in storages)
    assert report.live_bytes == 0
