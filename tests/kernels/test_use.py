"""``use``: which kernels a process and a block use."""

import threading
from collections.abc import Iterator

import pytest
import torch

from brevitas_bp import codec_from
from brevitas_bp.errors import UnknownNameError
from brevitas_bp.format.spec import BucketQuantSpec
from brevitas_bp.kernels import use
from brevitas_bp.kernels.dispatch import backend
from brevitas_bp.quant import ShiftedUint2DynamicActPerBucketFloatStochastic


@pytest.fixture(autouse=True)
def fastest_again() -> Iterator[None]:
    yield
    use("fastest")


def chosen() -> str:
    module = backend(torch.device("cpu"), BucketQuantSpec(), 256, torch.float32)
    return module.__name__.rpartition(".")[2]


def test_the_process_goes_on_with_what_was_set_last() -> None:
    fastest = chosen()
    assert fastest != "reference"
    use("reference")
    assert chosen() == "reference"
    use("fastest")
    assert chosen() == fastest


def test_blocks_end_with_what_was_before_and_may_be_entered_again() -> None:
    fastest, block = chosen(), use("reference")
    for _ in range(2):
        with block:
            assert chosen() == "reference"
            with use("fastest"):
                assert chosen() == fastest
            assert chosen() == "reference"
        assert chosen() == fastest


def test_a_block_ends_after_an_error() -> None:
    fastest = chosen()
    with pytest.raises(RuntimeError), use("reference"):
        raise RuntimeError
    assert chosen() == fastest


def test_blocks_of_two_threads_do_not_meet() -> None:
    fastest = chosen()
    inside, go_on = threading.Event(), threading.Event()
    seen = []

    def other() -> None:
        with use("reference"):
            inside.set()
            go_on.wait()
            seen.append(chosen())

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait()
    assert chosen() == fastest
    with use("reference"):
        go_on.set()
        thread.join()
    assert seen == ["reference"] and chosen() == fastest


def test_a_codec_follows_the_choice_with_the_same_bytes() -> None:
    codec, x = codec_from(ShiftedUint2DynamicActPerBucketFloatStochastic), torch.randn(5000)
    expected = codec.encode(x, seed=3)
    with use("reference"):
        got = codec.encode(x, seed=3)
        assert torch.equal(got.decode(), expected.decode())
    assert all(map(torch.equal, got.tensors, expected.tensors))


def test_other_names_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'reference'"):
        use("referenc")
    assert chosen() != "reference"
