"""Random networks, wrapped and plain: equal bits with ``policy="exact"``, equal outputs with any policy.

A failure prints the program; ``compare(Program.parse("..."))`` runs it again.
"""

import copy
from dataclasses import dataclass

import pytest
import torch
from hypothesis import event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from torch import Tensor, nn

from brevitas_bp import QuantBackwardWrapper, codec_from
from brevitas_bp.quant import ShiftedUint2DynamicActPerBucketFloatStochastic as Stochastic2
from tests.backward.support import identity_hooks, naive_hooks
from tests.backward.test_isolation import installed
from tests.robustness.counting import COUNTS
from tests.robustness.networks import NAMES, Network, Program, Step
from tests.support import same_bits

# Small buckets: most values are large enough to be quantized.
CODEC = codec_from(Stochastic2, bucket_size=16, metadata_dtype=torch.bfloat16)


@dataclass(frozen=True)
class Result:
    """Every result to compare two runs on; ``grads`` are None if backward raised."""

    outputs: list[Tensor]
    buffers: list[Tensor]
    rng: Tensor
    grads: list[Tensor | None] | None
    error: str = ""


def run(network: nn.Module, program: Program) -> Result:
    """Runs forward and backward, with torch's generator at 0."""
    inputs = program.inputs()
    torch.manual_seed(0)
    values = network(*inputs)
    rng = torch.get_rng_state()
    outputs = [v.detach().clone() for v in values]
    buffers = [b.clone() for b in network.buffers()]
    leaves = [*inputs, *network.parameters()]
    try:
        # Each element of each value has its own weight. Some overwritten views raise here.
        loss = sum(
            (v.double() * torch.linspace(-1, 2, v.numel(), dtype=torch.double).cos().view(v.shape)).sum()
            for v in values if v.requires_grad)
        grads = list(torch.autograd.grad(loss, leaves, allow_unused=True))  # pyright: ignore
    except RuntimeError as error:
        return Result(outputs, buffers, rng, None, str(error))
    return Result(outputs, buffers, rng, grads)


def all_same(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(same_bits(a, b) for a, b in zip(first, second))


def same_grads(first: list[Tensor | None], second: list[Tensor | None]) -> bool:
    """Whether bits are equal, and None occurs at the same places."""
    return all(
        (a is None and b is None) or (a is not None and b is not None and same_bits(a, b))
        for a, b in zip(first, second, strict=True))


def network_of(program: Program) -> Network:
    """Returns the network with all parameters, which the first run makes, and the initial buffers."""
    network = Network(program)
    network(*program.inputs())
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
    return network


def compare(program: Program) -> Result:
    """Asserts that the wrapped network does the same; returns the result of plain autograd."""
    network = network_of(program)
    plain = run(copy.deepcopy(network), program)
    for policy in ("exact", "op_aware", "all"):
        wrapper = QuantBackwardWrapper(copy.deepcopy(network), CODEC, policy=policy, seed=1)
        ours = run(wrapper, program)
        assert all_same(ours.outputs, plain.outputs), (policy, "outputs")
        assert all_same(ours.buffers, plain.buffers), (policy, "buffers")
        assert torch.equal(ours.rng, plain.rng), (policy, "random state")
        assert not installed()
        compare_gradients(policy, ours, plain)
    return plain


def compare_gradients(policy: str, ours: Result, plain: Result) -> None:
    """Compares bits under "exact", else shapes and dtypes. Packed tensors may be modified in place."""
    if plain.grads is None:
        assert ours.grads is None or policy != "exact", (policy, "plain autograd raised", plain.error)
        return
    assert ours.grads is not None, (policy, ours.error)
    if policy == "exact":
        assert same_grads(ours.grads, plain.grads), (policy, "gradients")
        return
    COUNTS[f"random networks with rounded gradients ({policy})"] += not same_grads(
        ours.grads, plain.grads)
    for a, b in zip(ours.grads, plain.grads, strict=True):
        assert (a is None) == (b is None), policy
        assert a is None or b is None or (a.shape, a.dtype) == (b.shape, b.dtype), policy


numbers = st.integers(0, 11)


class RandomNetwork(RuleBasedStateMachine):
    """Adds operations that plain autograd can run forward, and compares in the end."""

    @initialize(shape=numbers, dtype=st.sampled_from((2, 2, 2, 0, 1, 3)), layout=numbers)
    def start(self, shape: int, dtype: int, layout: int) -> None:
        self.extend(Program((shape, dtype, layout)))

    @rule(name=st.sampled_from(NAMES["layers"]), i=numbers, j=numbers, k=numbers)
    def layer(self, name: str, i: int, j: int, k: int) -> None:
        self.step(name, i, j, k)

    @rule(name=st.sampled_from(NAMES["activations"]), i=numbers, k=numbers)
    def activation(self, name: str, i: int, k: int) -> None:
        self.step(name, i, 0, k)

    @rule(name=st.sampled_from(NAMES["pairs"]), i=numbers, j=numbers, k=numbers)
    def pair(self, name: str, i: int, j: int, k: int) -> None:
        self.step(name, i, j, k)

    @rule(name=st.sampled_from(NAMES["in place"]), i=numbers, j=numbers)
    def in_place(self, name: str, i: int, j: int) -> None:
        self.step(name, i, j, 0)

    @rule(name=st.sampled_from(NAMES["views"]), i=numbers, j=numbers, k=numbers)
    def view(self, name: str, i: int, j: int, k: int) -> None:
        self.step(name, i, j, k)

    def step(self, name: str, i: int, j: int, k: int) -> None:
        step = Step(name, i, j, k)
        try:
            self.values.append(self.network.apply_step(step, self.values))
        except (RuntimeError, ValueError, IndexError, UserWarning):
            self.extend(self.program)  # the step may have written to a value before it raised
        else:
            self.program = Program(self.program.start, (*self.program.steps, step))

    def extend(self, program: Program) -> None:
        self.program, self.network = program, Network(program)
        self.values = self.network(*program.inputs())

    def teardown(self) -> None:
        if not hasattr(self, "program") or not self.program.steps:
            return
        print(self.program)
        plain = compare(self.program)
        COUNTS["random networks"] += 1
        COUNTS["operations in random networks"] += len(self.program.steps)
        COUNTS["random networks in which backward raises"] += plain.grads is None
        for step in self.program.steps:
            event(step.op)


# Another part of the library may warn about checkpoints.
@pytest.mark.filterwarnings("ignore:.*checkpoint")
class TestRandomNetworks(RandomNetwork.TestCase):
    settings = settings(
        max_examples=2 * settings.default.max_examples, stateful_step_count=14)


def test_programs_are_replayed_from_their_description() -> None:
    program = Program((1, 2, 3), (Step("conv", 0, 0, 5), Step("other_dtype", 3, 1, 2)))
    assert str(program) == "start 1 2 3; conv 0 0 5; other_dtype 3 1 2"
    assert Program.parse(str(program)) == program
    assert same_grads(compare(program).grads or [], compare(Program.parse(str(program))).grads or [])


class Hooked(nn.Module):
    """A rival: naive hooks around a network."""

    def __init__(self, network: nn.Module, hooks: object) -> None:
        super().__init__()
        self.network, self.hooks = network, hooks

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        with self.hooks():  # pyright: ignore
            return self.network(*inputs)


def test_naive_hooks_fail_the_comparison() -> None:
    # The control: quantizing saved tensors shows in the gradients ...
    program = Program.parse("start 0 2 0; linear 0 0 1; gelu 3 0 0")
    plain = run(network_of(program), program)
    naive = run(Hooked(network_of(program), naive_hooks), program)
    with pytest.raises(AssertionError, match="gradients"):
        compare_gradients("exact", naive, plain)
    # ... and hooks that keep the tensor itself raise nothing where plain autograd raises.
    program = Program.parse("start 0 2 0; linear 0 0 1; tanh 3 0 0; double_ 4 0 0")
    plain = run(network_of(program), program)
    kept = run(Hooked(network_of(program), identity_hooks), program)
    assert plain.grads is None
    with pytest.raises(AssertionError, match="plain autograd raised"):
        compare_gradients("exact", kept, plain)
    assert compare(program).grads is None
