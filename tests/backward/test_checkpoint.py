"""H16: ``torch.utils.checkpoint`` around a wrapper, and a wrapper around checkpointed parts."""

import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)

from brevitas_bp import OpAware, QuantBackwardWrapper, codec_from, track_saved_memory
from brevitas_bp.quant import (
    ShiftedUint2DynamicActPerBucketFloat,
    ShiftedUint2DynamicActPerBucketFloatStochastic,
    ShiftedUint8DynamicActPerBucketFloatStochastic,
)
from tests.backward.support import (
    NETS,
    QUANTIZING,
    Apply,
    assert_same,
    naive_hooks,
    net,
    run,
    wrapped_run,
)

FORMS = pytest.mark.parametrize("reentrant", [False, True], ids=["new", "reentrant"])
STOCHASTIC = ShiftedUint2DynamicActPerBucketFloatStochastic
SELECTED = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]


class Body(nn.Module):
    """Linear layers, a smooth activation and dropout; counts its runs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 64), nn.Linear(64, 64)
        self.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return self.last(F.dropout(F.gelu(self.first(x)), 0.2))


class Checkpointed(nn.Module):
    """Checkpointed parts between ordinary layers."""

    def __init__(self, part: Callable[[], nn.Module] = Body, parts: int = 3, **options: Any) -> None:
        super().__init__()
        self.stem = nn.Linear(64, 64)
        self.parts = nn.ModuleList(part() for _ in range(parts))
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        for part in self.parts:
            x = x + checkpoint(part, x, **self.options)
        return x


class Whole(nn.Module):
    """A network with a single checkpointed part."""

    def __init__(self, module: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.part, self.reentrant = module, reentrant

    def forward(self, *inputs: Tensor) -> Any:
        return checkpoint(self.part, *inputs, use_reentrant=self.reentrant)


def checkpointed(reentrant: bool, **options: Any) -> Checkpointed:
    torch.manual_seed(3)
    return Checkpointed(use_reentrant=reentrant, **options)


def images() -> Tensor:
    return torch.randn(256, 64, generator=torch.Generator().manual_seed(4))


def runs(module: nn.Module) -> int:
    return sum(getattr(part, "runs", 0) for part in module.modules())


# A wrapper around checkpointed parts.


@FORMS
@pytest.mark.parametrize("storage", ["save_quantized", "quantize_on_backward"])
def test_exact_policy_around_checkpoints_changes_no_bit(reentrant: bool, storage: Any) -> None:
    module = checkpointed(reentrant)
    ours = wrapped_run(module, images(), policy="exact", storage=storage)
    plain = run(module, images())
    assert torch.equal(ours.output, plain.output)
    assert torch.equal(ours.rng, plain.rng)  # the second run redraws dropout from the first run's state
    assert_same(ours.grads, plain.grads)


@FORMS
@pytest.mark.parametrize("policy", [*QUANTIZING, OpAware(checkpoint_quant=STOCHASTIC)])
def test_parts_run_twice_and_the_forward_is_the_same(policy: Any, reentrant: bool) -> None:
    module = checkpointed(reentrant)
    plain = run(module, images())
    wrapped = QuantBackwardWrapper(copy.deepcopy(module), policy=policy, seed=1)
    ours = run(wrapped, images(), copied=False)
    assert torch.equal(ours.output, plain.output)
    assert torch.equal(ours.rng, plain.rng)
    assert runs(wrapped) == 6
    assert ours.grads.keys() == plain.grads.keys()
    assert all(grad.isfinite().all() for grad in ours.grads.values())


@pytest.mark.parametrize("name", [n for n in NETS if n not in ("embedding", "in_place")])
@FORMS
def test_whole_networks_as_one_part(name: str, reentrant: bool) -> None:
    module, inputs = net(name)
    whole = Whole(module, reentrant)
    plain, ours = run(whole, *inputs), wrapped_run(whole, *inputs, policy="exact")
    assert torch.equal(ours.output, plain.output)
    assert_same(ours.grads, plain.grads)
    assert_same(ours.buffers, plain.buffers)


def stored(module: nn.Module, **options: Any) -> int:
    """Returns the bytes kept for the backward of a module, wrapped or not."""
    model = QuantBackwardWrapper(copy.deepcopy(module), metadata_dtype=torch.bfloat16, **options)
    with track_saved_memory(model) as report:
        y = model(images().requires_grad_())
    del y
    return report.stored_bytes


@FORMS
def test_checkpoint_with_rounded_inputs_takes_less_than_either(reentrant: bool) -> None:
    module = checkpointed(reentrant)
    plain = copy.deepcopy(module)
    plain.forward = lambda x: sum(part(torch.tanh(plain.stem(x))) for part in plain.parts)
    only_ours, only_checkpoint = stored(plain), stored(module, policy="exact")
    both = stored(module, policy=OpAware(checkpoint_quant=STOCHASTIC))
    assert both < only_ours
    # Bits per element. The three inputs of parts are in buckets of a row of 64, with float32 metadata.
    # The derivative of tanh has 4 bits in buckets of 256. The input of the stem has 2 bits in rows. The
    # last two have bfloat16 metadata.
    numel = images().numel()
    assert both == numel * (3 * (2 + 64 / 64) + (4 + 32 / 256) + (2 + 32 / 64)) / 8
    assert only_checkpoint == 4 * 4 * numel


@FORMS
def test_gradient_is_the_one_at_the_rounded_input(reentrant: bool) -> None:
    part = Body()
    h = images().tanh().requires_grad_()
    quantizer = codec_from(ShiftedUint2DynamicActPerBucketFloat)  # to nearest: needs no seed
    quantizer = quantizer.in_rows(64, 64)
    rounded = quantizer.encode(h.detach(), seed=0).decode().requires_grad_()
    model = QuantBackwardWrapper(
        Apply(lambda x: checkpoint(part, x * 1, use_reentrant=reentrant)),
        policy=OpAware(checkpoint_quant=ShiftedUint2DynamicActPerBucketFloat))
    torch.manual_seed(0)
    model(h).square().sum().backward()
    ours = [h.grad, *(p.grad for p in part.parameters())]
    torch.manual_seed(0)
    y = part(h.detach())
    torch.manual_seed(0)
    expected = torch.autograd.grad(part(rounded), [rounded, *part.parameters()], 2 * y)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected) if a is not None)
    torch.manual_seed(0)
    exact = torch.autograd.grad(part(h), part.first.weight, 2 * y)[0]
    assert not torch.equal(exact, expected[1])  # the control


def test_masks_indices_and_constants_beside_the_input_stay_exact() -> None:
    mask = torch.rand(256, 64) > 0.5
    additive = torch.zeros(256, 64).masked_fill(mask, float("-inf"))
    index = torch.randint(64, (256, 64))
    part = Apply(lambda x, m, a, i: ((x * m).gather(1, i) + a).softmax(1))
    model = QuantBackwardWrapper(
        Apply(lambda x: checkpoint(part, x * 1, mask, additive, index, use_reentrant=False)),
        policy=OpAware(checkpoint_quant=STOCHASTIC))
    x = images().requires_grad_()
    with track_saved_memory(model) as report:
        y = model(x)
    y.square().sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    stored_as = {site.stored: site.tensors for site in model.explain().sites.values()}
    assert stored_as == {"bit mask": 1, "2-bit stochastic": 1, "exact": 2}
    # Buckets hold a row of 64.
    quantized, masked = x.numel() * (2 + 64 / 64) / 8, x.numel() / 8
    assert report.stored_bytes == quantized + masked + 4 * x.numel() + 8 * x.numel()


def test_override_of_none_keeps_the_inputs_of_its_parts() -> None:
    module = nn.Sequential(checkpointed(False), checkpointed(False))
    policy = OpAware(checkpoint_quant=STOCHASTIC)
    both = QuantBackwardWrapper(module, policy=policy)
    one = QuantBackwardWrapper(module, policy=policy, overrides={"0": None})
    kept = []
    for model in (both, one):
        model(images().requires_grad_())
        kept.append({
            (s.module, s.stored) for s in model.explain().sites.values() if s.op == "checkpoint"})
    assert kept[0] == {("0", "2-bit stochastic"), ("1", "2-bit stochastic")}
    assert kept[1] == {("0", "exact"), ("1", "2-bit stochastic")}


def test_input_that_is_modified_before_backward_raises() -> None:
    model = QuantBackwardWrapper(
        Apply(lambda x: checkpoint(torch.sin, x, use_reentrant=False).add(x.mul_(3))))
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation.*saved by checkpoint in"):
        model(images().requires_grad_() * 1).sum().backward()


# Checkpointing around a wrapper.


def test_naive_hooks_inside_switch_recomputing_off() -> None:
    part = Body()

    def hooked(x: Tensor) -> Tensor:
        with naive_hooks():
            return part(x)

    y = checkpoint(hooked, images().requires_grad_(), use_reentrant=False)
    assert isinstance(y, Tensor)
    y.sum().backward()
    assert part.runs == 1  # checkpointing silently had no effect


@pytest.mark.parametrize("policy", [*QUANTIZING, "exact"])
def test_wrapper_inside_leaves_the_part_to_checkpointing_and_says_so(policy: str) -> None:
    module = checkpointed(False)
    plain = run(module, images())
    wrapped = copy.deepcopy(module)
    wrapped.parts = nn.ModuleList(QuantBackwardWrapper(p, policy=policy) for p in wrapped.parts)
    with pytest.warns(UserWarning, match=r"inside of torch.utils.checkpoint.*Wrap around"):
        ours = run(wrapped, images(), copied=False)
    assert runs(wrapped) == 6
    assert_same({k.replace(".module", ""): g for k, g in ours.grads.items()}, plain.grads)
    outer = QuantBackwardWrapper(wrapped, policy=OpAware(checkpoint_quant=STOCHASTIC))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with track_saved_memory(outer) as report:
            y = outer(images().requires_grad_())
        y.sum().backward()
    assert {row.op for row in report.rows} == {"checkpoint", "linear", "tanh"}


def test_warning_comes_once() -> None:
    module = checkpointed(False)
    module.parts = nn.ModuleList(QuantBackwardWrapper(part) for part in module.parts)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            module(images()).sum().backward()
    assert len(caught) == 1


def test_wrapper_inside_a_reentrant_part_stores_its_second_run() -> None:
    module = checkpointed(True)
    plain = run(module, images())
    wrapped = copy.deepcopy(module)
    wrapped.parts = nn.ModuleList(
        QuantBackwardWrapper(p, ShiftedUint8DynamicActPerBucketFloatStochastic, seed=1)
        for p in wrapped.parts)
    ours = run(wrapped, images(), copied=False)
    assert torch.equal(ours.output, plain.output)
    assert runs(wrapped) == 6
    for name, grad in ours.grads.items():
        exact = plain.grads[name.replace(".module", "")]
        # A step at 8 bits is 1/255 of about 6 deviations, averaged over 256 rows; 2 % is far above that.
        assert (grad - exact).norm() <= 0.02 * exact.norm()
    inside = wrapped.parts[0].explain()
    assert {site.stored for site in inside.sites.values()} >= {"8-bit stochastic"}


# Other forms of checkpointing.


@pytest.mark.parametrize("policy", ["exact", *QUANTIZING])
def test_selective_checkpoint_keeps_its_choice(policy: str) -> None:
    def choose(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return (
            CheckpointPolicy.MUST_SAVE if op in SELECTED else CheckpointPolicy.PREFER_RECOMPUTE)

    module = checkpointed(
        False, context_fn=functools.partial(create_selective_checkpoint_contexts, choose))
    plain, ours = run(module, images()), wrapped_run(module, images(), policy=policy)
    assert torch.equal(ours.output, plain.output)
    if policy == "exact":
        assert_same(ours.grads, plain.grads)
    # The part's own layers see selected or recomputed tensors, not rounded ones. Only the rounded
    # input of the part itself ("all") or nothing ("op_aware") is off.
    if policy == "op_aware":
        assert torch.equal(ours.grads["parts.2.last.weight"], plain.grads["parts.2.last.weight"])


@pytest.mark.parametrize("early_stop", [False, True])
def test_checkpoint_within_checkpoint(early_stop: bool) -> None:
    def part() -> nn.Module:
        return Checkpointed(parts=2, use_reentrant=False, early_stop=early_stop)

    torch.manual_seed(0)
    module = Checkpointed(part, parts=2, use_reentrant=False, early_stop=early_stop)
    plain, ours = run(module, images()), wrapped_run(module, images(), policy="exact")
    assert_same(ours.grads, plain.grads)
    rounded = wrapped_run(
        module, images(), policy=OpAware(
            multiplier_bits=8, checkpoint_quant=ShiftedUint8DynamicActPerBucketFloatStochastic),
        act_quant=ShiftedUint8DynamicActPerBucketFloatStochastic)
    assert torch.equal(rounded.output, plain.output)
    for name, exact in plain.grads.items():
        assert (rounded.grads[name] - exact).norm() <= 0.05 * exact.norm()


@FORMS
def test_checkpoint_sequential(reentrant: bool) -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(*(Body() for _ in range(4)))
    module = Apply(lambda x: checkpoint_sequential(layers, 2, x, use_reentrant=reentrant))
    module.layers = layers
    plain, ours = run(module, images()), wrapped_run(module, images(), policy="exact")
    assert_same(ours.grads, plain.grads)


def test_nothing_is_asked_without_gradients() -> None:
    model = QuantBackwardWrapper(checkpointed(False), policy=OpAware(checkpoint_quant=STOCHASTIC))
    with torch.no_grad(), track_saved_memory(model) as report:
        model(images())
    assert report.tensors == 0


def test_bad_checkpoint_quant_is_refused() -> None:
    with pytest.raises(Exception, match="codec_from"):
        OpAware(checkpoint_quant="2 bits")
