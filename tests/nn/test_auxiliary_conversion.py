"""Networks are converted in place, and their runs begin and end where they should."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

from brevitas_bp import quant
from brevitas_bp.errors import UnknownNameError
from brevitas_bp.nn import (
    AuxiliaryResidualConv2d,
    AuxiliarySignConv2d,
    AuxiliarySignLinear,
    convert_to_auxiliary_residual,
    convert_to_auxiliary_sign,
    resnet_runs,
)
from tests.support import import_torchvision

Rotated2 = quant.RotatedNormal2DynamicActPerBucketFloat
import_torchvision()


class Block(nn.Module):
    """A residual block whose second convolution is ordinary; ``skipped`` leaves it out."""

    def __init__(self, channels: int = 4, wider: int | None = None) -> None:
        super().__init__()
        out = wider or channels
        self.conv1 = nn.Conv2d(channels, out, 3, 1 if wider is None else 2, padding=1)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.downsample = None if wider is None else nn.Sequential(nn.Conv2d(channels, out, 1, 2))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        return F.relu(shortcut + self.conv2(F.relu(self.conv1(x))))


class Net(nn.Module):
    """Four blocks: two runs of three and of one."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block(), Block(wider=6), Block(6)])
        self.checkpointed: list[list[int]] = []
        self.skipped: set[int] = set()
        self.reentrant = False

    def part(self, numbers: list[int], x: Tensor) -> Tensor:
        for i in numbers:
            if i not in self.skipped:
                x = self.blocks[i](x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        if not self.checkpointed:
            return self.part([0, 1, 2, 3], x)
        for numbers in self.checkpointed:
            made: Any = checkpoint(self.part, numbers, x, use_reentrant=self.reentrant)
            x = made
        return x


def network() -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net()


def images() -> Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def gradients(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    net.zero_grad()
    net(x).square().mean().backward()
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def converted(**options: Any) -> Any:
    return convert_to_auxiliary_residual(network(), resnet_runs(network(), None), **options)


def oracle(net: Net, x: Tensor) -> dict[str, Tensor]:
    """Gradients of runs [0, 1, 2] and [3], by plain autograd on functions with the same values."""
    net = copy.deepcopy(net)

    def auxiliary(layer: nn.Conv2d, x: Tensor, a: Tensor) -> Tensor:
        weight, bias = layer.weight, layer.bias
        exact = F.conv2d(x, weight.detach(), bias, layer.stride, layer.padding)
        other = F.conv2d(a.detach(), weight, None, layer.stride, layer.padding)
        return exact + other - other.detach()

    for run in ([0, 1, 2], [3]):
        a = x
        for i in run:
            block: Any = net.blocks[i]
            inner = F.relu(auxiliary(block.conv1, x, a))
            shortcut = x if block.downsample is None else auxiliary(block.downsample[0], x, a)
            x = F.relu(shortcut + block.conv2(inner))
    x.square().mean().backward()
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-4, atol=1e-7), name


def test_the_runs_of_a_network() -> None:
    assert resnet_runs(network(), None) == [["blocks.0", "blocks.1", "blocks.2"], ["blocks.3"]]
    assert resnet_runs(network()) == [["blocks.0", "blocks.1"], ["blocks.2"], ["blocks.3"]]
    assert resnet_runs(network(), 1) == [[f"blocks.{i}"] for i in range(4)]
    for wrong in (0, -1, 1.5):
        with pytest.raises(ValueError, match="blocks_per_run"):
            resnet_runs(network(), wrong)  # pyright: ignore
    with pytest.raises(ValueError, match="has no block that begins with conv1"):
        resnet_runs(nn.Linear(4, 4))


def test_gradients_are_those_of_the_rule() -> None:
    x = images()
    expected = oracle(network(), x)
    assert_close(gradients(converted(), x), expected)
    # The control: gradients of the ordinary network differ, but not behind the last run.
    plain = gradients(network(), x)
    assert not torch.allclose(plain["blocks.1.conv1.weight"], expected["blocks.1.conv1.weight"])
    name = "blocks.0.conv1.weight"
    assert torch.equal(plain[name], gradients(network(), x)[name])


def test_runs_of_one_block_are_the_ordinary_network() -> None:
    x, net = images(), network()
    net = convert_to_auxiliary_residual(net, resnet_runs(net, 1))
    plain = gradients(network(), x)
    assert all(torch.equal(grad, plain[name]) for name, grad in gradients(net, x).items())


def test_what_stays() -> None:
    net = network()
    weight, seen = net.blocks[1].conv1.weight, []  # pyright: ignore
    layer: Any = net.blocks[1].conv1  # pyright: ignore
    layer.register_forward_hook(lambda *args: seen.append(1))
    before, y = net.state_dict(), net(images())
    made: Any = convert_to_auxiliary_residual(net, resnet_runs(net, None))
    assert made is net and made.blocks[1].conv1 is layer and layer.weight is weight
    assert torch.equal(net(images()), y) and len(seen) == 2
    assert list(net.state_dict()) == list(before)
    net.load_state_dict(network().state_dict())
    network().load_state_dict(net.state_dict())
    names = [n for n, m in net.named_modules() if isinstance(m, AuxiliaryResidualConv2d)]
    assert names == [
        "blocks.0.conv1", "blocks.1.conv1", "blocks.2.conv1", "blocks.2.downsample.0", "blocks.3.conv1"]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(copied: Any) -> None:
    net, x = converted(codec=Rotated2, seed=0), images()
    other = copied(net)
    assert other.blocks[0].conv1.run is other.blocks[1].conv1.run is not net.blocks[0].conv1.run
    other.blocks[1].register_forward_pre_hook(lambda *args: assert_open(other, net))
    assert gradients(other, x).keys() == gradients(net, x).keys()


def assert_open(one: Any, other: Any) -> None:
    assert one.blocks[0].conv1.run.is_open and not other.blocks[0].conv1.run.is_open


def test_names_of_layers_may_be_given() -> None:
    x, net = images(), network()
    net = convert_to_auxiliary_residual(
        net, [["blocks.0", "blocks.1", "blocks.2"], ["blocks.3"]], layers=["conv1", "downsample.0"])
    assert_close(gradients(net, x), oracle(network(), x))


def test_any_residual_network() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Linear(6, 6)

        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            return x + scale * self.mix(x).tanh()

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = Residual(), Residual()

        def forward(self, x: Tensor) -> Tensor:
            return self.two(x=self.one(x=x, scale=0.5))

    net = convert_to_auxiliary_residual(Tokens(), [["one", "two"]], layers=["mix"])
    x = torch.randn(2, 3, 6, requires_grad=True)
    net(x).sum().backward()
    assert x.grad is not None and net.two.mix.weight.grad is not None  # pyright: ignore


def test_a_run_that_never_ends_is_noticed_at_once() -> None:
    net, x = converted(), images()
    net.skipped = {2, 3}
    with pytest.raises(RuntimeError, match=r"AuxiliaryRun.'blocks.0', exact. has begun .* never ended"):
        net(x)
    net.skipped = set()
    assert_close(gradients(net, x), oracle(network(), x))


def test_a_run_that_never_begins() -> None:
    net, x = converted(), images()
    net.skipped = {0}
    with pytest.raises(RuntimeError, match=r"run 'blocks.0' is not open"):
        net(x)
    with torch.no_grad():
        net.part([1], x)
    with pytest.raises(RuntimeError, match=r"run 'blocks.0' is not open"):
        net.part([1], x)


def test_a_block_that_runs_twice_in_a_pass() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = Block(), Block()

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(self.one(x)))

    net = convert_to_auxiliary_residual(Twice())
    with pytest.raises(RuntimeError, match=r"begins again before it has ended.*runs twice"):
        net(images())


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("where", [0, 1, 2, 3])
def test_an_exception_leaves_nothing_open(error: type[BaseException], where: int) -> None:
    net, x = converted(), images()

    def fail(*args: Any) -> None:
        raise error

    handle = net.blocks[where].conv2.register_forward_pre_hook(fail)
    with pytest.raises(error):
        net(x)
    if error is ValueError:
        assert not any(block.conv1.run.is_open for block in net.blocks)
    handle.remove()
    assert_close(gradients(net, x), oracle(network(), x))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("parts", [[[0, 1, 2, 3]], [[0, 1, 2], [3]]])
def test_checkpointed_parts_with_whole_runs(reentrant: bool, parts: list[list[int]]) -> None:
    net, x = converted(), images().requires_grad_()
    net.checkpointed, net.reentrant = parts, reentrant
    assert_close(gradients(net, x), oracle(network(), x))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_network(reentrant: bool) -> None:
    net, x = converted(), images().requires_grad_()
    # The second run of the forward stops early, in the middle of a run.
    for block in net.blocks[1:]:
        block.requires_grad_(False)
    plain = gradients(net, x)
    net.zero_grad()
    y: Any = checkpoint(net, x, use_reentrant=reentrant)
    y.square().mean().backward()
    assert_close({n: p.grad for n, p in net.named_parameters() if p.grad is not None}, plain)
    assert not any(block.conv1.run.is_open for block in net.blocks)


def test_layers_that_blocks_share() -> None:
    net: Any = network()
    net.blocks[1].conv1 = net.blocks[0].conv1
    with pytest.raises(ValueError, match=r"'blocks.0.conv1' is shared by blocks of two runs"):
        convert_to_auxiliary_residual(copy.deepcopy(net), [["blocks.0"], ["blocks.1"]])
    expected = oracle(net, images())
    net = convert_to_auxiliary_residual(net, resnet_runs(net, None))
    assert_close(gradients(net, images()), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_parts_of_runs(reentrant: bool) -> None:
    net, x = converted(), images().requires_grad_()
    net.checkpointed, net.reentrant = [[0, 1], [2, 3]], reentrant
    with pytest.raises(RuntimeError, match=r"not open.*checkpointed part|began without gradients|twice"):
        net(x).sum().backward()


def test_autocast_gives_what_ordinary_layers_give() -> None:
    x, nets = images(), [network(), convert_to_auxiliary_residual(network(), resnet_runs(network(), 1))]
    found = []
    for net in nets:
        with torch.autocast("cpu", torch.bfloat16):
            y = net(x)
        y.float().square().mean().backward()
        found.append([y, *(p.grad for p in net.parameters())])
    assert found[0][0].dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_arguments() -> None:
    def convert(runs: Any = None, network: Any = None, **options: Any) -> None:
        convert_to_auxiliary_residual(Net() if network is None else network, runs, **options)

    with pytest.raises(UnknownNameError, match=r"'block.0'; did you mean 'blocks.0'"):
        convert([["block.0"]])
    with pytest.raises(ValueError, match="two places"):
        convert([["blocks.0"], ["blocks.0"]])
    for empty in ([], [[]]):
        with pytest.raises(ValueError, match="at least one block"):
            convert(empty)
    with pytest.raises(UnknownNameError, match="no block has a layer 'conv3'; did you mean 'conv"):
        convert([["blocks.0"]], layers=["conv3"])
    with pytest.raises(ValueError, match="no layer to convert"):
        convert([["blocks.0"]], layers=lambda block: [])
    with pytest.raises(TypeError, match="list of names"):
        convert([["blocks.0"]], layers="conv1")
    with pytest.raises(TypeError, match=r"is Block, but only nn.Conv2d"):
        convert([["blocks.0"]], layers=[""])
    with pytest.raises(TypeError, match="converted already"):
        convert(network=converted())
    with pytest.raises(TypeError, match="compiled"):
        convert(network=torch.compile(Net(), backend="eager"))
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module"):
        convert(network="net")
    net = Net()
    weight_norm(net.blocks[0].conv1)  # pyright: ignore
    with pytest.raises(TypeError, match=r"'blocks.0.conv1' is ParametrizedConv2d.*before"):
        convert(network=net)
    assert type(net.blocks[1].conv1) is nn.Conv2d  # a refused conversion changes nothing


def test_arguments_of_sign_conversion() -> None:
    with pytest.raises(UnknownNameError, match=r"'blocks.0.conv' matches no Conv2d"):
        convert_to_auxiliary_sign(Net(), ["blocks.0.conv"])
    with pytest.raises(TypeError, match=r"pass \['blocks.*'\]"):
        convert_to_auxiliary_sign(Net(), "blocks.*")
    with pytest.raises(ValueError, match="epsilon must be a finite number > 0, got 0"):
        convert_to_auxiliary_sign(Net(), ["*"], epsilon=0)
    with pytest.raises(TypeError, match="converted already"):
        convert_to_auxiliary_sign(converted(), ["*"])
    net: Any = convert_to_auxiliary_sign(Net(), ["blocks.?.conv2"], relu=True, epsilon=0.5)
    assert isinstance(net.blocks[0].conv2, AuxiliarySignConv2d) and net.blocks[0].conv2.signs.relu
    assert type(net.blocks[0].conv1) is nn.Conv2d and "epsilon=0.5" in repr(net)


@pytest.mark.parametrize(("make", "runs", "layers"), [
    ("resnet18", [3, 2, 2, 1], 11), ("resnet50", [1, 3, 4, 6, 2], 20)])
def test_networks_of_torchvision(make: str, runs: list[int], layers: int) -> None:
    torch.manual_seed(0)
    plain = getattr(import_torchvision("torchvision.models"), make)(num_classes=4)
    assert [len(run) for run in resnet_runs(plain, None)] == runs
    check_resnet(plain, layers)


@pytest.mark.parametrize(("make", "layers"), [("resnet18", 11), ("resnet26d", 9)])
def test_networks_of_timm(make: str, layers: int) -> None:
    from timm import create_model

    torch.manual_seed(0)
    plain = create_model(make, pretrained=False, num_classes=4)
    check_resnet(plain, layers)


def test_blocks_that_normalize_before_they_convolve_are_not_taken_for_others() -> None:
    from timm import create_model

    with pytest.raises(ValueError, match="a convolution that reads the input of its block"):
        convert_to_auxiliary_residual(create_model("resnetv2_50", pretrained=False))


def check_resnet(plain: nn.Module, layers: int) -> None:
    """Outputs are bit-equal, and so are gradients behind the last run and of the first block."""
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            # timm's blocks begin as the identity, and then all their inputs are equal.
            nn.init.ones_(module.weight)
    x = torch.randn(2, 3, 32, 32)
    net = convert_to_auxiliary_residual(copy.deepcopy(plain), resnet_runs(plain, None))
    assert sum(isinstance(m, AuxiliaryResidualConv2d) for m in net.modules()) == layers
    found, expected = gradients(net, x), gradients(plain, x)
    assert found.keys() == expected.keys()
    assert torch.equal(net(x), plain(x))
    assert torch.equal(found["fc.weight"], expected["fc.weight"])
    # Gradients of inputs are exact, so those of weights that are not converted are exact, too.
    changed = {name for name in found if not torch.equal(found[name], expected[name])}
    auxiliary = {f"{n}.weight" for n, m in net.named_modules() if isinstance(m, AuxiliaryResidualConv2d)}
    assert changed and changed < auxiliary


def test_a_linear_sign_layer_of_a_transformer() -> None:
    torch.manual_seed(0)
    net = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    convert_to_auxiliary_sign(net, ["linear2"], relu=True)
    assert isinstance(net.linear2, AuxiliarySignLinear)
    net(torch.randn(2, 5, 16)).sum().backward()
    assert net.linear2.weight.grad is not None
