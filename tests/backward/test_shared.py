"""Wrappers with equal settings share compiled graphs: blocks may be wrapped one by one."""

import copy
import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from brevitas_bp import Codec, OpAware, QuantBackwardWrapper, SavedTensor, track_saved_memory
from brevitas_bp.backward import wrapper as wrapper_module
from brevitas_bp.backward.compiled.hooks import GraphHooks
from brevitas_bp.backward.policy import Policy
from brevitas_bp.quant import (
    ShiftedUint2DynamicActPerBucketFloat,
    ShiftedUint2DynamicActPerBucketFloatStochastic,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",
    "ignore:Dynamo does not know how to trace:UserWarning",
    "ignore:.*torch.jit.script.* is deprecated:DeprecationWarning")

# More than the eight graphs per function that Dynamo makes.
DEPTH = 10


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """Removes everything compiled in a test when the test ends."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    gc.collect()


class Block(nn.Module):
    """The feed-forward part of a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


def compiled(module: Any) -> Any:
    """Compiles by AOTAutograd, which inlines hooks, without Inductor, which is slow."""
    return torch.compile(module, backend="aot_eager")


def compiled_in_place(module: nn.Module) -> nn.Module:
    module.compile(backend="aot_eager")
    return module


#: Ways to wrap and compile a block.
WAYS: dict[str, Callable[[nn.Module, int], Any]] = {
    "wrapper around compiled": lambda block, seed: QuantBackwardWrapper(compiled(block), seed=seed),
    "wrapper around compile()": lambda block, seed: QuantBackwardWrapper(
        compiled_in_place(block), seed=seed),
    "compiled around wrapper": lambda block, seed: compiled(QuantBackwardWrapper(block, seed=seed)),
}


def chain(way: str, depth: int = DEPTH) -> nn.Sequential:
    """Returns equal blocks, wrapped one by one."""
    torch.manual_seed(0)
    return nn.Sequential(*(WAYS[way](Block(), seed) for seed in range(depth)))


def wrappers(network: nn.Module) -> list[QuantBackwardWrapper]:
    return [part for part in network.modules() if isinstance(part, QuantBackwardWrapper)]


def tokens() -> Tensor:
    return torch.randn(128, 64, generator=torch.Generator().manual_seed(1))


def graphs() -> int:
    """Returns the number of graphs made since the test began."""
    return counters["stats"]["unique_graphs"]


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Returns the gradients of all parameters in one step."""
    model.zero_grad()
    model(x).square().sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def stored(model: QuantBackwardWrapper) -> dict[str, str]:
    """Returns module and operation -> how the last forward pass stored the tensor."""
    return {f"{s.module}:{s.op}": s.stored for s in model.explain().sites.values()}


def hooks(model: Any) -> GraphHooks:
    """Returns the pair of hooks of a wrapper that has run a compiled module."""
    model(tokens())
    assert model._graph_hooks is not None
    return model._graph_hooks


def a_pair_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes wrappers share nothing, as before sharing existed."""
    monkeypatch.setattr(wrapper_module, "hooks_of", lambda *args: GraphHooks(args[-1]))


@pytest.mark.parametrize("way", WAYS)
def test_equal_blocks_wrapped_one_by_one_have_the_graphs_of_one(way: str) -> None:
    network = chain(way)
    gradients(network, tokens())
    # The input of the first block needs no gradient; the inputs of the others do.
    assert graphs() == 2
    gradients(network, tokens())
    assert graphs() == 2
    first, *others = wrappers(network)
    assert len(others) == DEPTH - 1
    # The control: an eager block has its own operations, a graph has operations of aten.
    assert ":linear" not in {name for model in wrappers(network) for name in stored(model)}
    assert all(stored(other) == stored(others[0]) for other in others)
    assert set(stored(others[0]).values()) == set(stored(first).values())


@pytest.mark.parametrize("way", WAYS)
def test_sharing_changes_no_bit_of_any_gradient(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = gradients(chain(way, 3), tokens())
    assert graphs() == 2
    torch._dynamo.reset()
    a_pair_each(monkeypatch)
    apart = gradients(chain(way, 3), tokens())
    assert graphs() == 2 + 3
    assert all(map(torch.equal, shared, apart))


def test_each_wrapper_draws_from_its_own_stream() -> None:
    torch.manual_seed(0)
    block = Block()
    same, other, last = (
        QuantBackwardWrapper(compiled(copy.deepcopy(block)), seed=seed) for seed in (1, 2, 1))
    first = gradients(same, tokens())
    state = same.noise_state()
    assert not all(map(torch.equal, first, gradients(other, tokens())))
    assert same.noise_state() == state
    assert all(map(torch.equal, first, gradients(last, tokens())))
    assert graphs() == 1 and hooks(same) is hooks(other) is hooks(last)


class Mine(OpAware):
    """A policy with state that its fields do not show."""


def as_configured(saved: SavedTensor) -> Codec | None:
    return saved.codec


def exact_first(saved: SavedTensor) -> Codec | None:
    return None if saved.module.startswith("0") else saved.codec


def wrapped(**settings: Any) -> QuantBackwardWrapper:
    """Returns a wrapper whose pair of hooks is found fast, since no graph calls it."""
    return QuantBackwardWrapper(torch.compile(Block(), backend="eager"), **settings)


POLICY = Mine()


@pytest.mark.parametrize("settings", [
    {},
    {"bit_width": 4, "bucket_size": 64},
    {"overrides": {"_orig_mod.up": 4, "_orig_mod.down": None}},
    {"policy": OpAware(norm_bits=4)},
    {"policy": "all"},
    {"policy": as_configured},
    {"policy": POLICY},
    {"plan": {"_orig_mod.up:*": 3}},
    {"act_quant": ShiftedUint2DynamicActPerBucketFloat},
], ids=lambda settings: "-".join(settings) or "none")
def test_equal_settings_share(settings: dict[str, Any]) -> None:
    model, other = wrapped(seed=1, **settings), wrapped(seed=2, **copy.copy(settings))
    assert hooks(model) is hooks(other)
    assert hooks(copy.deepcopy(model)) is hooks(model) or "policy" in settings
    # The control: other settings.
    assert hooks(wrapped(bit_width=7)) is not hooks(model)


@pytest.mark.parametrize("settings", [
    {"bit_width": 4},
    {"bucket_size": 64},
    {"metadata_dtype": torch.bfloat16},
    {"act_quant": ShiftedUint2DynamicActPerBucketFloat},
    {"act_quant": None},
    {"overrides": {"_orig_mod.up": None}},
    {"overrides": {"_orig_mod.up": 4}},
    {"policy": OpAware(norm_bits=4)},
    {"policy": Mine()},
    {"policy": "all"},
    {"plan": {"_orig_mod.up:*": 3}},
], ids=str)
def test_other_settings_do_not_share(settings: dict[str, Any]) -> None:
    assert hooks(wrapped(**settings)) is not hooks(wrapped())


def test_plans_and_policies_that_differ_do_not_share() -> None:
    assert hooks(wrapped(plan={"_orig_mod.up:*": 3})) is not hooks(wrapped(plan={"_orig_mod.up:*": 4}))
    # For a class of the user's, only the identity of the object is known.
    assert hooks(wrapped(policy=Mine())) is not hooks(wrapped(policy=Mine()))


def test_other_modules_do_not_share() -> None:
    plain = nn.Sequential(Block(), Block())
    named, some, all_ = nn.Sequential(), copy.deepcopy(plain), copy.deepcopy(plain)
    named.append(Block()).add_module("last", Block())
    pairs = []
    for network, parts in ((plain, [0]), (named, [0]), (some, [1]), (all_, [0, 1])):
        for part in parts:
            network[part].compile(backend="eager")
        pairs.append(hooks(QuantBackwardWrapper(network)))
    assert len(set(map(id, pairs))) == 4


class Scaled(nn.Module):
    """Eager code that passes its buffer, or another tensor, to a compiled module."""

    class _Product(nn.Module):
        def forward(self, x: Tensor, factor: Tensor) -> Tensor:
            return x * factor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(128, 64))
        self.inner = compiled(Scaled._Product())

    def forward(self, x: Tensor, factor: Tensor | None = None) -> Tensor:
        return self.inner(x, self.table if factor is None else factor)


def test_a_buffer_of_one_module_is_not_stored_as_another_modules_activation_was() -> None:
    """A graph knows which of its inputs are parameters or buffers from the pass that made it."""
    x, other = tokens().requires_grad_(), torch.randn(128, 64)

    def gradient(model: nn.Module, *inputs: Tensor) -> Tensor:
        return torch.autograd.grad(model(*inputs).sum(), inputs[0])[0]

    first, second = (QuantBackwardWrapper(Scaled(), seed=1) for _ in range(2))
    rounded = gradient(first, x, other)
    # The control: an activation in the same place is rounded.
    assert not torch.equal(rounded, other)
    assert torch.equal(gradient(second, x), second.module.table)


def test_eager_code_with_parameters_does_not_share_but_compiled_code_with_parameters_does() -> None:
    def around(*eager: nn.Module) -> QuantBackwardWrapper:
        return QuantBackwardWrapper(nn.Sequential(compiled_in_place(Block()), *eager))

    assert hooks(around()) is hooks(around())
    assert hooks(around(nn.Tanh())) is hooks(around(nn.Tanh()))
    assert hooks(around(nn.Linear(64, 64))) is not hooks(around(nn.Linear(64, 64)))
    assert hooks(around(nn.BatchNorm1d(64, affine=False))) is not hooks(
        around(nn.BatchNorm1d(64, affine=False)))


@pytest.mark.parametrize("policy", ["op_aware", "exact"])
def test_reports_name_each_block_and_what_it_ran(policy: Policy) -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(
                QuantBackwardWrapper(compiled_in_place(Block()), policy=policy) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    network = QuantBackwardWrapper(Network(), policy="exact")
    with track_saved_memory(network) as report:
        output = network(tokens())
    assert graphs() == 2
    inside = {f"blocks.{i}.up" for i in range(3)}
    assert inside <= {row.module for row in report.rows}
    output.sum().backward()
    assert report.live_bytes == 0
    of_block = [{s.module: s.tensors for s in block.explain().sites.values()}
                for block in network.module.blocks]
    assert [f"blocks.{i}.up" in modules for i, modules in enumerate(of_block)] == [True] * 3
    # Each block has run one of the two graphs.
    assert [modules[f"blocks.{i}.up"] for i, modules in enumerate(of_block)] == [1] * 3
    assert not any(name.startswith("blocks.0") for name in of_block[1])


def test_a_policy_that_asks_for_names_is_asked_for_each() -> None:
    blocks = nn.Sequential(*(
        QuantBackwardWrapper(compiled_in_place(Block()), policy=exact_first) for _ in range(3)))
    gradients(QuantBackwardWrapper(blocks, policy="exact"), tokens())
    exact, *rounded = (set(stored(model).values()) for model in wrappers(blocks))
    assert exact == {"exact"} and all("2-bit rotated" in kinds for kinds in rounded)


def test_settings_that_come_back_find_their_graphs_again() -> None:
    model = QuantBackwardWrapper(compiled(Block()), seed=1)
    for bits in (2, 4, 2, 4):
        model.configure(bit_width=bits)
        gradients(model, tokens())
        assert f"{bits}-bit rotated" in stored(model).values()
    assert graphs() == 2


def test_pairs_are_freed_with_what_their_settings_hold() -> None:
    class Holding:
        """A policy that holds its wrapper."""

        wrapper: QuantBackwardWrapper

        def __call__(self, saved: SavedTensor) -> Codec | None:
            return saved.codec

    policy = Holding()
    policy.wrapper = QuantBackwardWrapper(compiled(Block()), policy=policy)
    gradients(policy.wrapper, tokens())
    pair, held = weakref.ref(policy.wrapper._graph_hooks), weakref.ref(policy)
    del policy
    torch._dynamo.reset()
    gc.collect()
    assert pair() is None and held() is None


def test_policies_without_weak_references_do_not_share() -> None:
    class Slotted:
        __slots__ = ()

        def __call__(self, saved: SavedTensor) -> Codec | None:
            return saved.codec

    policy = Slotted()
    assert hooks(wrapped(policy=policy)) is not hooks(wrapped(policy=policy))


def variants(kind: type[nn.Module], count: int, inside: bool) -> list[Any]:
    """Returns modules of a class, each wrapped with other settings."""
    sizes = range(64, 64 + 8 * count, 8)
    quant = ShiftedUint2DynamicActPerBucketFloatStochastic
    if inside:
        return [compiled(QuantBackwardWrapper(kind(), quant, bucket_size=size)) for size in sizes]
    return [QuantBackwardWrapper(compiled(kind()), quant, bucket_size=size) for size in sizes]


@pytest.mark.parametrize("inside", [False, True])
def test_more_settings_than_graphs_are_told_of_once(inside: bool) -> None:
    class Crowded(Block):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    models = variants(Crowded, 10, inside)
    for model in models[:8]:
        gradients(model, tokens())
    with pytest.warns(UserWarning, match=r"Crowded runs without compilation.*recompile_limit") as caught:
        gradients(models[8], tokens())
    assert len(caught) == 1
    for model in models:
        gradients(model, tokens())
    assert graphs() == 8


def test_a_higher_limit_is_a_remedy() -> None:
    class Roomy(Block):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    with torch._dynamo.config.patch(recompile_limit=16):
        for model in variants(Roomy, 9, inside=False):
            gradients(model, tokens())
    assert graphs() == 9


def test_compiled_wrappers_of_many_classes_have_graphs_of_their_own() -> None:
    kinds = [type(f"Block{i}", (Block,), {}) for i in range(DEPTH)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kind in kinds:
            gradients(compiled(QuantBackwardWrapper(kind(), seed=1)), tokens())
    # The control would stop at eight graphs of one frame that all modules share.
    assert graphs() == DEPTH


def test_quantizers_of_equal_configs_are_equal() -> None:
    class SmallBuckets(ShiftedUint2DynamicActPerBucketFloatStochastic):
        bucket_size = 64

    plain = ShiftedUint2DynamicActPerBucketFloatStochastic
    assert hooks(wrapped(act_quant=SmallBuckets)) is hooks(wrapped(act_quant=plain, bucket_size=64))
