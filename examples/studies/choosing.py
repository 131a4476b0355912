"""Measures the advice of docs/choosing.md that no other study measures.

    python examples/studies/choosing.py norms [--markdown]    # norm_bits, by the size of the batch
    python examples/studies/choosing.py stock [--markdown]    # Brevitas' own quantizers as act_quant

``norms`` trains the small ResNet of ``networks.py`` on digits of 8x8 pixels for 30 steps, and measures
it with batches of several sizes. ``stock`` wraps a convolutional network with SiLU and batch norms, and
a GPT of two blocks, each with every quantizer. A quantizer that keeps statistics sees ten batches first.

The error is ``sqrt(E |g~ - g|^2) / |g|`` of all gradients, taken as one vector: what ``check_gradients``
calls the error of one gradient. "bias" is the part of it that the mean of the draws has too, less what
is there by chance. "median noise" is the noise of a parameter's gradient, relative to that gradient.
"""

import argparse
import inspect
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import brevitas.quant
import brevitas.quant.fixed_point
import brevitas.quant.float
import torch
from sklearn.datasets import load_digits
from small_gpt import SmallGPT
from tables import show_table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from brevitas_bp import OpAware, QuantBackwardWrapper
from brevitas_bp import quant as configs
from brevitas_bp.allocate import measure_gradient_error
from brevitas_bp.errors import UnsupportedQuantizerError
from brevitas_bp.quant import StochasticRounding

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from networks import small_resnet
from variants import saved_bytes

Loss = Callable[[nn.Module], Tensor]

#: Settings of the policy, and bits.
NORMS: dict[str, tuple[int, OpAware]] = {
    "2 bits": (2, OpAware()), "2 bits, norms 4": (2, OpAware(norm_bits=4)), "3 bits": (3, OpAware()),
    "3 bits, norms 4": (3, OpAware(norm_bits=4)), "4 bits": (4, OpAware())}

#: Stock quantizers, and the settings without which they cannot be built.
ONE_RANGE = {"min_val": -3.0, "max_val": 3.0}
STOCK: dict[str, dict[str, Any]] = {
    "Int8ActPerTensorFloat": {}, "Int8ActPerTensorFloatMSE": {}, "Uint8ActPerTensorFloat": {},
    "Uint8ActPerTensorFloatMSE": {}, "ShiftedUint8ActPerTensorFloat": {},
    "ShiftedUint8ActPerTensorFloatMSE": {}, "ShiftedUint8ActPerTensorFloatHQO": {},
    "Int8ActPerTensorFloatMinMaxInit": ONE_RANGE, "Uint8ActPerTensorFloatMaxInit": {"max_val": 3.0},
    "Int8ActPerTensorFixedPoint": {}, "Uint8ActPerTensorFixedPoint": {}, "MXInt8Act": {"group_dim": 1},
    "Fp8e4m3Act": {}, "Fp8e5m2Act": {}, "Fp8e4m3ActPerTensorFloat": {},
    "Fp8e4m3OCPActPerTensorFloat": {},
    "Fp8e5m2OCPActPerTensorFloat": {}, "Fp8e4m3FNUZActPerTensorFloat": {},
    "MXFloat8e4m3Act": {"group_dim": 1}, "SignedTernaryActPerTensorConst": {},
    "SignedBinaryActPerTensorConst": {}, "Int8ActPerTensorFloatBatchQuant2d": {},
    "Fp8e4m3ActPerChannelFloat2d": {}}


def digits(size: int) -> tuple[Tensor, Tensor]:
    """Returns all digits, enlarged to ``size`` pixels, and their labels."""
    pixels, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    images = pixels.float().reshape(-1, 1, 8, 8) / 16
    return interpolate(images, size=size, mode="bilinear", align_corners=False), labels


def error_of(model: QuantBackwardWrapper, loss: Loss, draws: int = 4) -> tuple[float, float, float]:
    """Returns error and bias relative to the gradient, and the median noise of the parameters."""
    measured = measure_gradient_error(model, loss, draws=draws)
    total, bias = measured.total, max(measured.total.offset, 0.0)
    return (total.variance + bias)**0.5 / total.size, bias**0.5 / total.size, measured.median("noise")


def norms(only: list[str]) -> tuple[list[str], list[list[str]]]:
    """Measures ``norm_bits``."""
    torch.manual_seed(0)
    images, labels = digits(8)
    net = small_resnet(1, 8).model
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    for batch in torch.randperm(1500)[:1200].split(40):
        optimizer.zero_grad()
        cross_entropy(net(images[batch]), labels[batch]).backward()
        optimizer.step()
    cells = []
    for size in (4, 16, 64, 256):
        x, y = images[:size], labels[:size]
        ways = [w for w in NORMS if not only or {str(size), f"{size}, {w}"} & set(only)]
        exact = saved_bytes(QuantBackwardWrapper(net, policy="exact"), x) if ways else 0
        for way, (bits, policy) in ((w, NORMS[w]) for w in ways):
            config = getattr(configs, f"RotatedNormal{bits}DynamicActPerBucketFloat")
            model = QuantBackwardWrapper(net, config, metadata_dtype=torch.bfloat16, policy=policy)
            error, _, noise = error_of(model, lambda m, x=x, y=y: cross_entropy(m(x), y))
            ratio = exact / saved_bytes(model, x)
            cells.append([str(size), way, f"{ratio:.1f}", f"{error:.2f}", f"{noise:.2f}"])
            print(*cells[-1], sep=" | ", file=sys.stderr, flush=True)
    return ["batch", "stored as", "ratio", "error", "median noise"], cells


def vision_task() -> tuple[nn.Module, Tensor, Loss]:
    """Returns a small convolutional network with a batch of digits."""
    images, labels = digits(16)
    x, y = images[:60], labels[:60]
    net = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.SiLU(),
        nn.Conv2d(32, 64, 3, 2, padding=1),
        nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.SiLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    return net, x, lambda m: cross_entropy(m(x), y)


def text_task() -> tuple[nn.Module, Tensor, Loss]:
    """Returns a GPT of two blocks with a batch of random tokens."""
    tokens = torch.randint(256, (8, 65))
    x, y = tokens[:, :-1], tokens[:, 1:].flatten()
    return SmallGPT(width=64, layers=2), x, lambda m: cross_entropy(m(x).flatten(0, 1), y)


def config_of(name: str, stochastic: bool) -> Any:
    # An injector class is false, so this compares with None.
    homes = (brevitas.quant, brevitas.quant.fixed_point, brevitas.quant.float)
    stock = next(found for home in homes if (found := getattr(home, name, None)) is not None)
    return type(name + "Stochastic", (StochasticRounding, stock), {}) if stochastic else stock


def stock(only: list[str]) -> tuple[list[str], list[list[str]]]:
    """Measures stock quantizers."""
    tasks = []
    for make in (vision_task, text_task):
        torch.manual_seed(0)
        net, x, loss = make()
        tasks.append((net, x, loss, saved_bytes(QuantBackwardWrapper(net, policy="exact"), x)))
    ours: dict[Any, dict[str, Any]] = {
        configs.RotatedNormal8DynamicActPerBucketFloat: {},
        configs.ShiftedUint8DynamicActPerBucketFloatStochastic: {},
        configs.RotatedNormal2DynamicActPerBucketFloat: {}}
    ways = [(name, False, settings) for name, settings in STOCK.items()]
    ways += [(name, True, STOCK[name]) for name in (
        "Int8ActPerTensorFloat", "ShiftedUint8ActPerTensorFloat", "MXInt8Act")]
    cells = []
    for kind, stochastic, settings in [*ways, *((c, False, s) for c, s in ours.items())]:
        label = f"{kind}{', stochastic' * stochastic}" if isinstance(kind, str) else kind.__name__
        if only and label not in only:
            continue
        line = [label, ", ".join(f"{k}={v}" for k, v in settings.items())]
        for net, x, loss, exact in tasks:
            try:
                config = config_of(kind, stochastic) if isinstance(kind, str) else kind
                model = QuantBackwardWrapper(net, config, **settings)
                for _ in range(10):
                    loss(model).backward()
                net.zero_grad()
                ratio = exact / saved_bytes(model, x)
                error, bias, _ = error_of(model, loss)
                line += [f"{ratio:.1f}", f"{error:.3f}", f"{bias:.3f}"]
            except (UnsupportedQuantizerError, ValueError) as problem:
                line += [type(problem).__name__, str(problem)[:150], ""]
        cells.append(line)
        print(*cells[-1], sep=" | ", file=sys.stderr, flush=True)
    names = ("CNN", "GPT")
    return ["act_quant", "needs", *(
        f"{name}: {what}" for name in names for what in ("ratio", "error", "bias"))], cells


TABLES = {"norms": norms, "stock": stock}


def main() -> None:
    parser = argparse.ArgumentParser(description=inspect.cleandoc(__doc__ or "").partition("\n")[0])
    parser.add_argument("table", choices=TABLES)
    parser.add_argument(
        "--only", nargs="*", default=[], help="such as '16', '16, 3 bits'; or quantizers")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "brevitas_bp: this process runs")
        show_table(*TABLES[options.table](options.only), options.markdown)


if __name__ == "__main__":
    main()
