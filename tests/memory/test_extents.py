"""Bytes of extents that come and go, against a count of those that are there."""

from hypothesis import given
from hypothesis import strategies as st

from brevitas_bp.memory.extents import Bytes, Extent, LiveBytes


@st.composite
def extents(draw: st.DrawFn) -> Extent:
    """Views of three storages of 8, 16 and 24 bytes."""
    storage = draw(st.integers(1, 3))
    offset = draw(st.integers(0, 8 * storage))
    return Extent(storage, 8 * storage, (offset,), draw(st.sampled_from([offset, 4, 8 * storage])))


@given(st.lists(extents()), st.randoms(use_true_random=False))
def test_live_bytes_are_those_of_the_extents_that_are_there(given: list[Extent], random: object) -> None:
    # A view has one size, whoever shows it.
    sizes: dict[tuple[int, object], int] = {}
    given = [e._replace(nbytes=sizes.setdefault((e.storage, e.view), e.nbytes)) for e in given]
    live, there = LiveBytes(), []
    for extent in given:
        live.add(extent)
        there.append(extent)
        if random.random() < 0.4:  # pyright: ignore[reportAttributeAccessIssue]
            gone = there.pop(random.randrange(len(there)))  # pyright: ignore[reportAttributeAccessIssue]
            live.remove(gone)
        counted = Bytes()
        assert live.total == sum(counted.add(extent) for extent in there)
    for extent in there:
        live.remove(extent)
    assert live.total == 0 and not live._storages
