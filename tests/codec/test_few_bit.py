"""The few-bit codec: bytes, NaN, layouts, and its gradient."""

import copy
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from brevitas_bp.activations.few_bit import FewBitTable, few_bit_table
from brevitas_bp.codec import FewBitCodec
from brevitas_bp.codec.base import Packed
from brevitas_bp.codec.layout import TensorLayout
from brevitas_bp.errors import CorruptPayloadError
from brevitas_bp.format import few_bit
from brevitas_bp.format.few_bit import BLOCK
from brevitas_bp.kernels import dispatch
from tests.strategies import DTYPES, LAYOUTS, awkward_tensors, dtype_name, normals
from tests.support import same_bits

each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
WIDTHS = range(1, 9)


def table_of(bits: int, even: bool = False, levels: int | None = None) -> FewBitTable:
    """Returns a table with uneven borders over most of a normal's range, and all different levels."""
    k = 2**bits if levels is None else levels
    borders = torch.linspace(0.01 if even else -2.3, 2.1, k - 1, dtype=torch.float64)
    values = torch.arange(k, dtype=torch.float64) / 7 - 3
    return FewBitTable("test", tuple(borders.tolist()), tuple(values.tolist()), even)


def oracle(table: FewBitTable, x: Tensor) -> Tensor:
    """Computes one element at a time, in Python; not for values near NaN."""
    inner = torch.float64 if x.dtype == torch.float64 else torch.float32
    borders = torch.tensor(table.borders, dtype=inner).tolist()
    values = [abs(v) if table.even else v for v in x.flatten().tolist()]
    levels = [table.levels[sum(b < v for b in borders)] for v in values]
    return torch.tensor(levels, dtype=torch.float64).to(x.dtype).view(x.shape)


@pytest.mark.parametrize("even", [False, True])
@pytest.mark.parametrize("bits", WIDTHS)
@each_dtype
def test_every_width_decodes_to_the_levels(dtype: torch.dtype, bits: int, even: bool) -> None:
    table = table_of(bits, even)
    x = normals((301,)).to(dtype)
    # Elements on a border belong to the lower interval.
    x[:5] = torch.tensor(table.borders, dtype=torch.float64).to(dtype)[:1]
    decoded = FewBitCodec(table).encode(x).decode()
    assert decoded.dtype == dtype and torch.equal(decoded, oracle(table, x))
    assert torch.equal(table.derivative(x), decoded)


@pytest.mark.parametrize("length", [*range(71), BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5])
def test_every_length_takes_its_bits_and_a_flag_per_block(length: int) -> None:
    x = normals((length,)).float()
    for bits in (1, 3, 4):
        codec = FewBitCodec(table_of(bits))
        packed = codec.encode(x)
        assert packed.nbytes == -(-length // 8) * bits + -(-length // BLOCK)
        assert packed.nbytes == codec.stored_nbytes(packed.layout)
        assert torch.equal(packed.decode(), codec.table.derivative(x))


@pytest.mark.parametrize("levels", [2, 3, 5, 6, 200])
def test_tables_need_not_use_every_code(levels: int) -> None:
    table = table_of(8, levels=levels)
    assert table.bits == (levels - 1).bit_length()
    x = normals((100,)).float()
    assert torch.equal(FewBitCodec(table).encode(x).decode(), oracle(table, x))


@each_layout
@each_dtype
def test_the_layout_is_kept(dtype: torch.dtype, layout: Callable[[Tensor], Tensor]) -> None:
    x = layout(normals((2, 3, 4, 5)).to(dtype))
    packed = FewBitCodec(few_bit_table("gelu", 3)).encode(x)
    decoded = packed.decode()
    assert decoded.stride() == TensorLayout.of(x).stride
    assert torch.equal(decoded, few_bit_table("gelu", 3).derivative(x))


def forms() -> list[ModuleType]:
    return [few_bit, pytest.importorskip("brevitas_bp.kernels.cpu.few_bit")]


@each_dtype
def test_the_fast_form_has_the_bytes_of_the_reference(dtype: torch.dtype) -> None:
    tensors = {name: TensorLayout.of(x).flatten(x) for name, x in awkward_tensors(dtype).items()}
    long = normals((40 * BLOCK + 13,), 5).to(dtype)
    long[[7, 20 * BLOCK, -1]] = torch.nan
    tensors["long"] = long
    for name, x in tensors.items():
        for table in (*map(table_of, WIDTHS), table_of(3, even=True), table_of(8, levels=5)):
            numbers = (table.borders, table.bits, table.even)
            expected, got = (form.encode(x, *numbers) for form in forms())
            assert all(map(torch.equal, expected, got)), (name, table)
            decoded = [
                form.decode(*expected, table.levels, table.bits, x.numel(), dtype)
                for form in forms()]
            assert same_bits(*decoded), (name, table)


def test_threads_give_the_same_bytes() -> None:
    x = normals((40 * BLOCK + 13,), 5).float()
    table = few_bit_table("silu", 3)
    before = torch.get_num_threads()
    stored = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            stored.append(FewBitCodec(table).encode(x))
            assert torch.equal(stored[-1].decode(), table.derivative(x))
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, stored[0].tensors, stored[1].tensors))


def test_cpu_tensors_take_the_fast_form() -> None:
    reference, fast = forms()
    assert dispatch.few_bit_backend(torch.device("cpu")) is fast
    assert dispatch.few_bit_backend(torch.device("meta")) is reference


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("place", [0, 17, BLOCK - 1, BLOCK, 2 * BLOCK + 40])
def test_nan_spoils_its_own_block(bits: int, place: int) -> None:
    x = normals((2 * BLOCK + 41,)).float()
    x[place] = torch.nan
    for even in (False, True):
        table = table_of(bits, even)
        for nan in (torch.nan, -torch.nan):
            x[place] = nan
            decoded = FewBitCodec(table).encode(x).decode()
            block = torch.arange(x.numel()) // BLOCK
            assert torch.equal(decoded.isnan(), block == place // BLOCK)
            assert torch.equal(decoded[~decoded.isnan()],
                               table.derivative(x)[block != place // BLOCK])


def test_bucketize_alone_would_hide_a_nan() -> None:
    # Positive control: the trap that the flags avoid.
    assert torch.bucketize(torch.tensor([torch.nan]), torch.tensor([0.0])).item() == 1


@each_dtype
def test_infinities_get_the_outermost_levels(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    x = torch.tensor([-torch.inf, torch.inf, info.min, info.max], dtype=dtype)
    for bits in WIDTHS:
        plain, folded = table_of(bits), table_of(bits, even=True)
        ends = torch.tensor([plain.levels[0], plain.levels[-1]], dtype=torch.float64).to(dtype)
        assert torch.equal(FewBitCodec(plain).encode(x).decode(), ends.repeat(2))
        assert torch.equal(FewBitCodec(folded).encode(x).decode(), ends[1].expand(4))


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0, 4), ()])
def test_empty_and_scalar_tensors(shape: tuple[int, ...]) -> None:
    x = normals(shape).float()
    packed = FewBitCodec(few_bit_table("gelu", 3)).encode(x)
    assert torch.equal(packed.decode(), few_bit_table("gelu", 3).derivative(x))
    assert packed.nbytes == (0 if x.numel() == 0 else 4)


@each_dtype
def test_one_bit_gives_the_exact_gradient_of_relu(dtype: torch.dtype) -> None:
    x = normals((4, 1000)).to(dtype)
    x[0, :4] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf])
    x.requires_grad_()
    gradient = normals(x.shape, 1).to(dtype)
    (expected,) = torch.autograd.grad(F.relu(x), x, gradient)
    packed = FewBitCodec(few_bit_table("relu", 1)).encode(x)
    # The padded length, 4000 bits, plus one flag.
    assert packed.nbytes == 501
    assert torch.equal(gradient * packed.decode(), expected)


def test_the_gradient_is_as_near_as_the_table_says() -> None:
    # Uniform inputs on [-10, 10]: the mean squared error is the table's error over 20.
    x = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 10_000 - 10
    x.requires_grad_()
    (exact,) = torch.autograd.grad(F.gelu(x).sum(), x)
    for bits in (1, 2, 3, 4):
        table = few_bit_table("gelu", bits)
        mean = (FewBitCodec(table).encode(x).decode() - exact).square().mean().item()
        assert mean * 20 == pytest.approx(table.error, rel=1e-3)


def test_the_error_is_a_bias_that_seeds_do_not_average_out() -> None:
    x = normals((1000,)).float()
    codec = FewBitCodec(few_bit_table("gelu", 2))
    first, second = (codec.encode(x, seed=seed).decode() for seed in (0, 1))
    assert torch.equal(first, second)


def test_encoding_records_nothing_for_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    x = normals((100,)).float().requires_grad_()
    saved: list[Tensor] = []
    for form in forms():
        monkeypatch.setattr(dispatch, "few_bit_backend", lambda device, form=form: form)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t), lambda t: t):
            decoded = FewBitCodec(few_bit_table("tanh", 3, even=True)).encode(x).decode()
        assert not decoded.requires_grad
    assert saved == []


def test_a_payload_does_not_change_with_its_source() -> None:
    x = normals((100,)).float()
    packed = FewBitCodec(few_bit_table("gelu", 3)).encode(x)
    expected = few_bit_table("gelu", 3).derivative(x)
    x.zero_()
    first = packed.decode()
    assert torch.equal(first, expected)
    first.zero_()
    assert torch.equal(packed.decode(), expected)


def test_a_lazy_negation_is_carried_out() -> None:
    x = torch.complex(normals((9,)).float(), normals((9,), 1).float()).conj().imag
    assert x.is_neg()
    table = few_bit_table("gelu", 3)
    assert torch.equal(FewBitCodec(table).encode(x).decode(), table.derivative(x.resolve_neg()))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match="saved by gelu in block"):
        FewBitCodec(few_bit_table("gelu", 3)).encode(torch.ones(3).to(dtype), where="gelu in block")


def test_a_payload_of_the_wrong_size_is_noticed() -> None:
    codec = FewBitCodec(few_bit_table("gelu", 3))
    packed = codec.encode(normals((100,)).float())
    payload, flags = packed.tensors
    with pytest.raises(CorruptPayloadError, match="expected tensor 0 to be"):
        Packed(codec, (payload[1:], flags), packed.layout).decode()


def test_codecs_name_themselves_and_copy() -> None:
    codec = FewBitCodec(few_bit_table("gelu", 3))
    assert codec.name == "3-bit few-bit gelu"
    x = normals((50,)).float()
    assert torch.equal(copy.deepcopy(codec).encode(x).decode(), codec.encode(x).decode())
