"""Uses the public API as a typed project would. Pyright checks this file in strict mode.

torch declares no types for ``Tensor.backward`` and ``Optimizer.step``. So the one rule that concerns
them is off; all others are on.
"""

# pyright: strict, reportUnknownMemberType=false

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import brevitas_bp
from brevitas_bp import (
    BrevitasBpError,
    Codec,
    CorruptPayloadError,
    MixProbScheduler,
    ModifiedInPlaceError,
    OpAware,
    Packed,
    QuantBackwardWrapper,
    SavedMemoryReport,
    SavedTensor,
    SecondDerivativeError,
    StochasticRound,
    UnknownNameError,
    UnsupportedQuantizerError,
    check_gradients,
    codec_from,
    plan_bit_widths,
    register_op,
    seeded,
    track_saved_memory,
)
from brevitas_bp.allocate import (
    BitPlan,
    Candidate,
    ClosedForm,
    Empirical,
    GradientCheck,
    GradientError,
    GradientErrorRow,
    GradientMonitor,
    GradientNorms,
    NoiseOfPlace,
    NoiseSources,
    QuantizerSchedule,
    Replanner,
    Sensitivity,
    attribute_noise,
    measure_gradient_error,
)
from brevitas_bp.backward import NoiseState
from brevitas_bp.backward.operations import elementwise
from brevitas_bp.codec import (
    ActQuant,
    BitMask,
    Copy,
    FewBitCodec,
    Keep,
    NarrowInt,
    PerSampleCodec,
    PooledCodec,
    ProjectedCodec,
    RandomKCodec,
    TopKCodec,
    TwoFrequencyCodec,
    WindowedCodec,
)
from brevitas_bp.core.bit_width import linear
from brevitas_bp.grad import QuantGradientWrapper
from brevitas_bp.memory import SavedMemory, SavedMemoryRow, SavedMemoryStep
from brevitas_bp.nn.auxiliary import (
    AuxiliaryResidualConv2d,
    AuxiliaryResidualLinear,
    AuxiliaryRun,
    AuxiliarySignConv2d,
    AuxiliarySignLinear,
    LearningIndicators,
    convert_to_auxiliary_residual,
    convert_to_auxiliary_sign,
    learning_indicator,
    resnet_runs,
    watch_learning_indicators,
)
from brevitas_bp.nn.learned import (
    Deviation,
    Difference,
    ExportedIntegers,
    IntegerReport,
    IntegerRow,
    InverseScale,
    LearnedTensor,
    MaxBin,
    Penalty,
    adam,
    export_integers,
    keep_scales_positive,
    learn_quantization,
    learned_tensors,
    named_learned_tensors,
    parameter_groups,
    ratio_gradients,
    report_integers,
    zipped_nbytes,
)
from brevitas_bp.plots import plot_gradient_error, plot_plan, plot_saved_memory
from brevitas_bp.quant import (
    ActQuantSolver,
    PerBucketMinMax,
    RotatedNormal1DynamicActPerBucketFloat,
    StochasticRounding,
    TwoBitWidth,
)
from brevitas_bp.testing import (
    ALPHA,
    CODEC_CHECKS,
    DTYPES,
    LAYOUTS,
    ROUNDING_CHECKS,
    VALUES,
    Bias,
    assert_unbiased,
    awkward_tensors,
    bernstein,
    check_codec,
    check_rounding,
    chi_square,
    empirical_bernstein,
    hoeffding,
    normal,
    rounding_variance,
)

Batch = tuple[Tensor, Tensor]


class Mine(StochasticRounding, PerBucketMinMax, ActQuantSolver):
    """A config of one's own."""

    bit_width = 4
    bucket_size = 64


class Mixed(TwoBitWidth, Mine):
    """Each bucket takes 8 bits with a probability that a schedule lowers."""

    mix_bit_width = 8
    mix_prob = 1.0


class Halves(Codec):
    """A codec of one's own."""

    name = "halves"

    def encode(self, x: Tensor, *, seed: int, where: str = "") -> Packed:
        return Packed(self, (x.detach().half(),), self.layout_of(x, where), None, where)

    def decode(self, packed: Packed) -> Tensor:
        return packed.layout.restore(packed.tensors[0].to(packed.layout.dtype))


class Careful(OpAware):
    """A policy of one's own."""

    def decide(self, saved: SavedTensor) -> Any:
        decision = super().decide(saved)
        return decision._replace(codec=None) if saved.op == "linear" else decision


class Block(nn.Module):
    """A residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(64, 64), nn.Linear(64, 64), nn.LayerNorm(64)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.down(self.up(x).relu()))


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 10))


def batches() -> Iterator[Batch]:
    for _ in range(2):
        yield torch.randn(32, 64), torch.randint(10, (32,))


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1])


def train(folder: Path) -> str:
    model = QuantBackwardWrapper(
        network(), Mine, overrides={"0": None, "2": 4}, policy=OpAware(norm_bits=4), seed=0,
        bucket_size=64)
    optimizer = torch.optim.AdamW(model.parameters())
    noise = NoiseState(model)
    lines: list[str] = []

    def note(report: SavedMemoryReport) -> None:
        lines.append(report.summary())

    with track_saved_memory(model, on_step=note) as report:
        for batch in batches():
            loss = loss_of(model, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    last: SavedMemoryStep | None = report.last_step
    assert last is not None
    counted: SavedMemory = last
    rows: list[SavedMemoryRow] = counted.rows
    ratios: list[float] = [row.ratio for row in rows]
    groups: dict[str, int] = {
        group.values["op"]: group.stored_bytes for group in last.by("op", top=3, sort="exact").groups}
    pictures: list[Figure] = [
        last.plot(by="op", path=folder / "memory.png"), plot_saved_memory(last.by("module", top=5))]
    torch.save({"noise": noise.state_dict(), "weights": model.state_dict()}, folder / "run.pt")
    noise.load_state_dict(noise.state_dict())
    explained: str = str(model.explain())
    live: int = report.live_bytes + report.peak_bytes + report.steps
    return f"{explained}{live}{ratios}{groups}{lines}{len(pictures)}{brevitas_bp.__version__}"


def planned() -> tuple[BitPlan, QuantBackwardWrapper]:
    model, batch = network(), next(batches())
    estimators: list[Sensitivity] = [ClosedForm(), Empirical(), GradientNorms()]
    plan: BitPlan = plan_bit_widths(
        model, batch, loss_of, budget="20%", candidates=[2, 4, Candidate(8), "exact"],
        sensitivity=estimators[0], method="greedy")
    plan = plan.within(average_bits=3.0, method="greedy").with_bits("0:*", 4)
    figure: Figure = plot_plan(plan, budget="20%")
    assert figure.axes
    wrapped = QuantBackwardWrapper(model, plan=plan)
    replanner = Replanner(wrapped, loss_of, every=100, budget="20%", method="greedy")
    changed: BitPlan | None = replanner.step(batch)
    return changed or plan, wrapped


def checked(model: QuantBackwardWrapper) -> tuple[GradientCheck, GradientError]:
    batch = next(batches())
    check: GradientCheck = check_gradients(model, batch, loss_of)
    error: GradientError = measure_gradient_error(model, lambda m: loss_of(m, batch), draws=2)
    worst: GradientErrorRow = max(error.modules, key=lambda row: row.bias)
    sources: NoiseSources = attribute_noise(model, lambda m: loss_of(m, batch), draws=2)
    places: list[NoiseOfPlace] = list(sources.places)
    monitor = GradientMonitor(model, loss_of, every=10)
    value: float | None = monitor.step(batch)
    plot_gradient_error(error)
    assert check.ok or worst.noise >= 0 or value is None or places
    return check, error


def codecs(config: ActQuant = Mine) -> list[Codec]:
    made: list[Codec] = [
        codec_from(config, bit_width=2), codec_from(RotatedNormal1DynamicActPerBucketFloat), BitMask(),
        Copy(), Keep(), NarrowInt(torch.int16), Halves()]
    x = torch.randn(8, 64)
    with seeded(3):
        packed: Packed = made[0].encode(x, seed=1)
    decoded: Tensor = packed.decode()
    assert decoded.shape == x.shape and packed.nbytes > 0
    kinds: list[type[Codec]] = [
        FewBitCodec, PerSampleCodec, PooledCodec, ProjectedCodec, RandomKCodec, TopKCodec,
        TwoFrequencyCodec, WindowedCodec]
    assert all(issubclass(kind, Codec) for kind in kinds)
    return made


def quantized_training() -> Tensor:
    model = QuantBackwardWrapper(
        QuantGradientWrapper(network(), input_grad_bit_width=4), policy=Careful())
    schedule = QuantizerSchedule(model, {0: {"bit_width": 4}, 10: {"bit_width": 2}})
    schedule.step()
    mixed = QuantBackwardWrapper(network(), Mixed)
    scheduler = MixProbScheduler(mixed, linear(1.0, 0.0, 100))
    probability: float = scheduler.step()
    register_op("my_activation", elementwise())
    return loss_of(model, next(batches())) * probability


def learned(folder: Path) -> int:
    net = network()
    learn_quantization(net, granularity="row", lam=None, include=["0.weight", "2.*"])
    penalties: list[Penalty] = [
        MaxBin(gamma=1e-10), InverseScale(gamma=1e-10), Difference(gamma=1e-10), Deviation(gamma=1e-10)]
    optimizer = adam(net, lr=1e-3)
    other = torch.optim.AdamW(parameter_groups(net, scale_lr=1e-3), lr=1e-4)
    keep_scales_positive(other)
    ratio_gradients(net)
    loss = loss_of(net, next(batches()))
    for penalty in penalties:
        loss = loss + penalty(net)
    loss.backward()
    optimizer.step()
    report: IntegerReport = report_integers(net)
    rows: list[IntegerRow] = [*report.tensors, report.pooled]
    exported: ExportedIntegers = export_integers(net)
    tensors: list[LearnedTensor] = learned_tensors("user_code", net)
    named: dict[str, LearnedTensor] = named_learned_tensors(net)
    assert len(rows) >= 1 and len(tensors) == len(named)
    return exported.save(folder / "net.zip") + zipped_nbytes(exported.state_dict())


def auxiliary() -> LearningIndicators:
    blocks = nn.Sequential(*(Block() for _ in range(4)))
    convert_to_auxiliary_sign(network(), ["0"])
    run = AuxiliaryRun()
    layers: list[nn.Module] = [
        AuxiliaryResidualLinear(8, 8, run=run), AuxiliaryResidualConv2d(8, 8, 1, run=run),
        AuxiliarySignLinear(8, 8), AuxiliarySignConv2d(8, 8, 1)]
    net = convert_to_auxiliary_residual(blocks, [["0", "1"], ["2", "3"]], layers=["up"])
    assert callable(resnet_runs) and layers
    with watch_learning_indicators(net) as indicators:
        net(torch.randn(4, 64)).sum().backward()
    value: Tensor = learning_indicator(torch.randn(4, 8), torch.randn(4, 8))
    assert value.numel()
    return indicators


def tested() -> Bias:
    names: list[str] = list(check_codec(codec_from(Mine), stochastic=True))
    names += list(check_rounding(StochasticRound()))
    tensors: dict[str, Tensor] = awkward_tensors(torch.float32)
    known = [*CODEC_CHECKS, *ROUNDING_CHECKS, *VALUES, *LAYOUTS, *DTYPES]
    tolerance: float = hoeffding(1000) + normal(10) + ALPHA
    assert known and tolerance and names and tensors
    assert callable(bernstein) and callable(empirical_bernstein)
    assert callable(chi_square) and callable(rounding_variance)
    return assert_unbiased(Mine, torch.linspace(-1, 1, 64))


def refused(model: nn.Module) -> str:
    try:
        QuantBackwardWrapper(model, bucket_sise=64)
    except (UnknownNameError, UnsupportedQuantizerError) as error:
        return str(error)
    except (CorruptPayloadError, ModifiedInPlaceError, SecondDerivativeError, BrevitasBpError):
        raise
    return ""


def main(folder: Path) -> None:
    train(folder)
    _, model = planned()
    checked(model)
    codecs()
    quantized_training().backward()
    learned(folder)
    auxiliary()
    tested()
    assert "bucket_size" in refused(network())
