"""The memory report against bytes counted by hand."""

import copy
import gc
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from brevitas_bp import (
    QuantBackwardWrapper,
    SavedMemoryReport,
    UnknownNameError,
    track_saved_memory,
)
from brevitas_bp.memory import SavedMemoryRow
from brevitas_bp.models import efficientnet_v2_s
from brevitas_bp.quant import ShiftedUint2DynamicActPerBucketFloatStochastic as Uint2
from brevitas_bp.quant import ShiftedUint4DynamicActPerBucketFloat as Uint4
from tests.backward.support import NETS, QUANTIZING, Apply, assert_same, net, run

N, CHANNELS, SIZE = 4, 16, 16
PIXELS = N * SIZE * SIZE


def conv_bn_relu() -> nn.Module:
    return nn.Sequential(nn.Conv2d(8, CHANNELS, 3, padding=1), nn.BatchNorm2d(CHANNELS), nn.ReLU())


def images(**options: Any) -> Tensor:
    return torch.randn(N, 8, SIZE, SIZE, **options)


def track(model: nn.Module, *inputs: Tensor) -> SavedMemoryReport:
    """Returns the report of one forward pass, whose graph is freed afterwards."""
    with track_saved_memory(model) as report:
        output = model(*inputs)
    del output
    return report


def uint2_bytes(elements: int, bucket: int = 256, metadata: int = 4) -> int:
    """Returns the bytes of 2-bit codes, plus a scale and an offset per bucket."""
    return -(-elements // bucket) * (bucket // 4 + 2 * metadata)


# Bytes.


def test_bytes_of_a_small_net_counted_by_hand() -> None:
    rows = track(conv_bn_relu(), images()).rows
    assert [(row.module, row.op, row.dtype, row.tensors, row.exact_bytes) for row in rows] == [
        ("0", "conv2d", "float32", 1, 4 * 8 * PIXELS),
        # The input, the mean and the inverse deviation of each channel.
        ("1", "batch_norm", "float32", 3, 4 * CHANNELS * PIXELS + 2 * 4 * CHANNELS),
        ("2", "relu", "float32", 1, 4 * CHANNELS * PIXELS)]
    assert all(row.stored_bytes == row.exact_bytes for row in rows)


@pytest.mark.parametrize(("policy", "image_bits", "statistics", "relu"), [
    # 64 bytes of statistics would take 72 bytes in a bucket of 256, so they are kept.
    ("all", 2, 2, uint2_bytes(CHANNELS * PIXELS)),
    # The input is stored as its deviation from the mean, and the mean is not kept.
    ("op_aware", 4, 1, CHANNELS * PIXELS // 8)])
def test_stored_bytes_of_a_small_net_counted_by_hand(
        policy: str, image_bits: int, statistics: int, relu: int) -> None:
    model = QuantBackwardWrapper(conv_bn_relu(), policy=policy, bucket_size=256)
    rows = track(model, images()).rows
    assert [(row.module, row.stored_bytes) for row in rows] == [
        ("0", uint2_bytes(8 * PIXELS) + (image_bits - 2) * 8 * PIXELS // 8),
        ("1", uint2_bytes(CHANNELS * PIXELS) + statistics * 4 * CHANNELS),
        ("2", relu)]


def live_storages() -> dict[int, torch.UntypedStorage]:
    """Returns address -> storage, for all tensors that Python knows. Held, they keep their addresses."""
    storages = (x.untyped_storage() for x in gc.get_objects() if type(x) in (Tensor, nn.Parameter))
    return {storage._cdata: storage for storage in storages}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", [
    nn.LayerNorm(64), nn.BatchNorm1d(64), nn.GroupNorm(4, 64), nn.BatchNorm1d(64).eval()], ids=str)
def test_statistics_of_a_norm_are_in_memory_once(norm: nn.Module, dtype: torch.dtype) -> None:
    model = QuantBackwardWrapper(copy.deepcopy(norm).to(dtype), bucket_size=64)
    x = torch.randn(256, 64, dtype=dtype, requires_grad=True)
    stored = track(model, x).stored_bytes
    before = live_storages()
    output = model(x)
    after = live_storages()
    # Autograd keeps the inverse deviation; the mean is not kept.
    assert sum(after[key].nbytes() for key in after.keys() - before.keys()) == stored + output.nbytes
    assert stored < x.nbytes


@pytest.mark.parametrize("options", [
    {}, {"act_quant": None}, {"policy": "all"}, {"policy": "all_but_relu"}], ids=str)
@pytest.mark.parametrize("name", NETS)
def test_exact_bytes_are_those_of_the_unwrapped_model(name: str, options: dict[str, Any]) -> None:
    module, inputs = net(name)
    # Each model gets its own copy, since batch-norm counters change. Dropout masks do not matter here.
    plain = track(copy.deepcopy(module), *inputs)
    wrapped = track(QuantBackwardWrapper(copy.deepcopy(module), **options), *inputs)
    assert wrapped.exact_bytes == plain.exact_bytes == plain.stored_bytes > 0
    assert wrapped.stored_bytes <= wrapped.exact_bytes


def test_naive_count_includes_parameters_and_counts_twice() -> None:
    module, x = nn.Sequential(nn.Linear(64, 64), Apply(lambda y: y * y)), torch.randn(32, 64)
    naive = 0

    def count(saved: Tensor) -> Tensor:
        nonlocal naive
        naive += saved.nbytes
        return saved

    x.requires_grad_()
    with saved_tensors_hooks(count, lambda saved: saved):
        output = module(x)
    assert naive == 4 * (32 * 64 + 64 * 64 + 2 * 32 * 64)  # the control: weight, and y twice
    assert track(module, x).exact_bytes == 4 * (32 * 64 + 32 * 64)
    assert output.requires_grad


def test_buffers_are_excluded() -> None:
    module = nn.BatchNorm1d(64).eval()
    assert track(module, torch.randn(32, 64)).exact_bytes == 4 * 32 * 64


VIEWS: dict[str, tuple[Any, int, int]] = {
    "halves": (lambda y: y[:16].sin() + y[16:].sin(), 2, 32),
    "whole, and its transpose": (lambda y: y.sin().sum() + y.t().sin().sum(), 2, 32),
    "overlapping": (lambda y: y[:20].sin() + y[12:].sin(), 2, 32),
    "a batch of a data set": (lambda y: y[3:7].sin(), 1, 4),
    "a slice, saved twice": (lambda y: y[3:7] * y[3:7], 1, 4),
    "expanded": (lambda y: y[:1].expand(500, 64).sin(), 1, 1),
}


@pytest.mark.parametrize("name", VIEWS)
def test_views_count_what_they_show_and_never_more_than_the_storage(name: str) -> None:
    function, tensors, rows = VIEWS[name]
    report = track(Apply(lambda x: function(x * 1)), torch.randn(32, 64, requires_grad=True))
    assert (report.tensors, report.exact_bytes) == (tensors, 4 * rows * 64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_rows_are_told_apart_by_dtype(dtype: torch.dtype) -> None:
    def cast(x: Tensor) -> Tensor:
        return x.sin().to(dtype).cos()

    rows = track(Apply(cast), torch.randn(32, 64, requires_grad=True)).rows
    assert [(row.op, row.dtype, row.exact_bytes) for row in rows] == [
        ("sin", "float32", 4 * 32 * 64), ("cos", str(dtype)[6:], dtype.itemsize * 32 * 64)]


@pytest.mark.parametrize("policy", QUANTIZING)
def test_bfloat16_metadata_is_counted_as_it_is(policy: str) -> None:
    model = QuantBackwardWrapper(
        Apply(torch.mul, nn.Parameter(torch.ones(256))), Uint2, policy=policy, bucket_size=256,
        metadata_dtype=torch.bfloat16)
    report = track(model, torch.randn(32, 256, requires_grad=True))
    assert report.stored_bytes == uint2_bytes(32 * 256, metadata=2)
    assert report.ratio == 1024 / 68


# Live bytes.


@pytest.mark.parametrize("policy", QUANTIZING)
def test_live_bytes_fall_to_zero_with_backward(policy: str) -> None:
    model = QuantBackwardWrapper(conv_bn_relu(), policy=policy)
    with track_saved_memory(model) as report:
        loss = model(images()).sum()
        assert report.stored_bytes == report.live_bytes > 0
    before = report.live_bytes
    loss.backward(retain_graph=True)
    assert report.live_bytes == before == report.stored_bytes
    loss.backward()
    assert report.live_bytes == 0
    assert report.stored_bytes == before  # measured bytes stay in the report


def test_report_keeps_nothing_alive() -> None:
    model = QuantBackwardWrapper(conv_bn_relu())
    with track_saved_memory(model) as report:
        loss = model(images()).sum()
    del loss
    gc.collect()
    assert report.live_bytes == 0


def test_graph_that_died_inside_the_block_does_not_count() -> None:
    model = conv_bn_relu()
    with track_saved_memory(model) as report:
        model(images())
    assert (report.tensors, report.exact_bytes) == (0, 0)


def test_graph_that_lives_counts_beside_one_that_died() -> None:
    model = QuantBackwardWrapper(conv_bn_relu())
    with track_saved_memory(model) as report:
        model(images())
        output = model(images())
    assert report.tensors == 5
    assert report.exact_bytes == track(conv_bn_relu(), images()).exact_bytes
    assert output.requires_grad


def test_nothing_is_counted_without_grad() -> None:
    with torch.no_grad():
        assert track(QuantBackwardWrapper(conv_bn_relu()), images()).tensors == 0


# Names.


class Twice(torch.autograd.Function):
    """A custom operation of a user."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


def wrapped_inside() -> nn.Module:
    inner = QuantBackwardWrapper(nn.Sequential(nn.Tanh(), nn.Sigmoid()), Uint4)
    return nn.Sequential(nn.Tanh(), nn.ModuleDict({"body": inner})["body"], Apply(Twice.apply))


@pytest.mark.parametrize(("policy", "tanh", "custom"), [
    (None, 32, 32), ("all", 2.25, 2.25), ("op_aware", 4.25, 32)])
def test_names_are_qualified_and_skip_the_wrapper(
        policy: str | None, tanh: float, custom: float) -> None:
    model = wrapped_inside()
    if policy is not None:
        model = QuantBackwardWrapper(model, policy=policy)
    with track_saved_memory(model) as report:
        loss = model(torch.randn(32, 64, requires_grad=True)).square().sum()
    places = [(row.module, row.op) for row in report.rows]
    assert places == [
        ("0", "tanh"), ("1.0", "tanh"), ("1.1", "sigmoid"), ("2", "custom function"), ("", "square")]
    bits = {row.module: row.stored_bytes * 8 / (32 * 64) for row in report.rows}
    # The nested wrapper has 4 bits. Without a policy, tensors around it are exact; "all" takes 2 bits.
    # The op-aware policy takes 4 bits for a derivative, and keeps tensors of an unknown operation. 64
    # bytes of metadata make 0.25 bits.
    assert bits == {"0": tanh, "1.0": 4.25, "1.1": 4.25, "2": custom, "": 32}
    assert loss.requires_grad


def test_loss_outside_of_the_model_is_counted_at_the_root() -> None:
    model = QuantBackwardWrapper(nn.Linear(64, 10))
    with track_saved_memory(model) as report:
        loss = F.cross_entropy(model(torch.randn(32, 64)), torch.randint(10, (32,)))
    rows = {row.op: row for row in report.rows if row.dtype == "float32"}
    assert rows["cross_entropy"].module == ""
    assert rows["cross_entropy"].ratio == 1
    assert rows["linear"].ratio > 1
    assert loss.requires_grad


def test_calls_of_a_shared_module_add_up() -> None:
    layer = nn.Tanh()
    (row,) = track(nn.Sequential(layer, layer), torch.randn(32, 64, requires_grad=True)).rows
    assert (row.module, row.tensors, row.exact_bytes) == ("0", 2, 2 * 4 * 32 * 64)


# The report's own methods.


def test_totals_are_sums_of_rows() -> None:
    report = track(QuantBackwardWrapper(conv_bn_relu()), images())
    assert report.tensors == sum(row.tensors for row in report.rows) == 5
    assert report.exact_bytes == sum(row.exact_bytes for row in report.rows)
    assert report.stored_bytes == sum(row.stored_bytes for row in report.rows)
    assert report.ratio == report.exact_bytes / report.stored_bytes


@pytest.mark.parametrize("empty", [False, True])
def test_dictionary_survives_strict_json(empty: bool) -> None:
    report = track(QuantBackwardWrapper(nn.Sequential() if empty else conv_bn_relu()), images())
    plain = report.to_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["total"]["stored_bytes"] == report.stored_bytes
    assert len(plain["rows"]) == (0 if empty else 3)


def test_table_has_a_line_for_each_row_and_a_total() -> None:
    report = track(QuantBackwardWrapper(conv_bn_relu()), images())
    header, _, *rows, _, total = str(report).splitlines()
    assert " ".join(header.split()) == "module op dtype tensors exact MiB stored MiB ratio"
    assert [line.split()[:4] for line in rows] == [
        [row.module, row.op, row.dtype, str(row.tensors)] for row in report.rows]
    assert total.split()[0] == "total"
    assert total.split()[-1] == f"{report.ratio:.2f}"
    assert float(total.split()[-3]) == pytest.approx(report.exact_bytes / 2**20, abs=5e-4)


def test_empty_report_prints() -> None:
    assert "total" in str(track(nn.Sequential(), images()))


def test_ratio_of_a_row() -> None:
    assert SavedMemoryRow("", "sin", "float32", 1, 100, 25).ratio == 4


# Tracking changes nothing, and ends.


@pytest.mark.parametrize("policy", [None, *QUANTIZING])
@pytest.mark.parametrize("name", NETS)
def test_tracking_changes_no_bit(name: str, policy: str | None) -> None:
    module, inputs = net(name)

    class Tracked(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, *inputs: Tensor) -> Tensor:
            with track_saved_memory(self.module):
                return self.module(*inputs)

    def model() -> nn.Module:
        own = copy.deepcopy(module)
        return own if policy is None else QuantBackwardWrapper(own, policy=policy, seed=2)

    untracked = run(model(), *inputs, copied=False)
    tracked = run(Tracked(model()), *inputs, copied=False)
    assert torch.equal(tracked.output, untracked.output)
    assert torch.equal(tracked.rng, untracked.rng)
    grads = {name.removeprefix("module."): grad for name, grad in tracked.grads.items()}
    assert_same(grads, untracked.grads)


def test_tracking_ends_with_the_block() -> None:
    model = QuantBackwardWrapper(nn.Sequential(nn.Tanh(), QuantBackwardWrapper(nn.Tanh())))
    x = torch.randn(32, 64, requires_grad=True)
    with track_saved_memory(model) as report:
        first = model(x)
    second = model(x)
    assert report.tensors == 2
    with pytest.raises(ArithmeticError), track_saved_memory(model):
        raise ArithmeticError
    assert not [w for w in model.modules() if getattr(w, "_listeners", None)]
    assert torch.equal(first, second)


def test_two_reports_of_one_forward_agree() -> None:
    model = QuantBackwardWrapper(conv_bn_relu())
    with track_saved_memory(model) as outer, track_saved_memory(model) as inner:
        output = model(images())
    assert outer.to_dict() == inner.to_dict()
    assert output.requires_grad


@pytest.mark.parametrize("model", [None, nn.Linear, "model"])
def test_something_else_than_a_module_is_refused(model: Any) -> None:
    with pytest.raises(TypeError, match=r"track_saved_memory: expected a torch\.nn\.Module, got"):
        track_saved_memory(model).__enter__()


# The acceptance figure.


@pytest.mark.parametrize(("policy", "least"), [("all", 14.5), ("op_aware", 9.95)])
def test_efficientnet_v2_s_at_two_bits(policy: str, least: float) -> None:
    torch.manual_seed(0)
    module = efficientnet_v2_s(num_classes=10, stem_stride=1)
    # Large enough that the exact statistics of the batch norms take few of the bytes.
    x = torch.randn(24, 3, 32, 32)
    model = QuantBackwardWrapper(
        copy.deepcopy(module), Uint2, policy=policy, bucket_size=256,
        metadata_dtype=torch.bfloat16)
    torch.manual_seed(1)
    expected = module(x)
    torch.manual_seed(1)
    with track_saved_memory(model) as report:
        output = model(x)
    assert torch.equal(output, expected)
    assert_same(dict(model.module.named_buffers()), dict(module.named_buffers()))
    # 1024 / (64 + 4) = 15.06 for whole buckets. Small tensors take a padded bucket or stay exact. The
    # default policy takes 4 bits for factors of the gradient: derivatives of SiLU, and gated tensors. It
    # takes more than 2 bits for inputs of norms with fewer than 256 elements to a channel. Small rows
    # take a bucket each. The gates are broadcast, and kept.
    assert least <= report.ratio <= 1024 / 68
    output.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# Groups.


def _report() -> SavedMemoryReport:
    net = nn.Sequential(
        nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 8), nn.Softmax(-1))
    model = QuantBackwardWrapper(net, seed=0)
    with track_saved_memory(model) as report:
        _kept = model(torch.randn(128, 64))
    return report


@pytest.mark.parametrize("columns", [("op",), ("module",), ("dtype",), ("reason",), ("op", "reason")])
def test_groups_add_up_to_the_report(columns: tuple[str, ...]) -> None:
    report = _report()
    table = report.by(*columns)
    assert table.columns == columns and table.rest is None
    for name in ("tensors", "exact_bytes", "stored_bytes"):
        assert sum(getattr(group, name) for group in table.groups) == getattr(report, name)
    stored = [group.stored_bytes for group in table.groups]
    assert stored == sorted(stored, reverse=True)
    keys = [tuple(group.values.values()) for group in table.groups]
    assert len(set(keys)) == len(keys)
    if columns == ("op",):
        assert {group.values["op"]: group.tensors for group in table.groups} == {
            "linear": 3, "relu": 1, "silu": 1, "softmax": 1}


def test_what_top_leaves_out_is_one_group() -> None:
    report = _report()
    table = report.by("op", top=1)
    assert len(table.groups) == 1 and table.rest is not None
    assert table.groups[0].stored_bytes + table.rest.stored_bytes == report.stored_bytes
    assert table.rest.tensors == report.tensors - table.groups[0].tensors
    text = str(table).splitlines()
    assert text[0].split()[0] == "op" and text[3].startswith("3 more") and "100.0%" in text[-1]
    assert str(report.by("op", top=4)) == str(report.by("op"))


@pytest.mark.parametrize(("sort", "of"), [
    ("stored", "stored_bytes"), ("exact", "exact_bytes"), ("tensors", "tensors")])
def test_groups_are_sorted_as_asked(sort: Any, of: str) -> None:
    report = _report()
    groups = report.by("module", sort=sort).groups
    assert [getattr(g, of) for g in groups] == sorted((getattr(g, of) for g in groups), reverse=True)
    in_order = [g.values["module"] for g in report.by("module", sort="forward").groups]
    assert in_order == list(dict.fromkeys(row.module for row in report.rows)) == list("012345")
    with pytest.raises(UnknownNameError, match="did you mean 'exact'"):
        report.by("module", sort="exakt")  # pyright: ignore[reportArgumentType]


def test_wrong_columns_are_refused() -> None:
    report = _report()
    with pytest.raises(UnknownNameError, match="got 'modul'; did you mean 'module'"):
        report.by("modul")
    for columns, top in (((), None), (("op",), 0)):
        with pytest.raises(ValueError, match="one column or more, and a top of 1 or more"):
            report.by(*columns, top=top)
