"""Events: a ramp of fractions; what else is read of the arguments stands in the tests of the callback."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lr_callback as lrc
from lr_callback.host.events import cubic_ramp


@given(st.floats(0.01, 1), st.lists(st.integers(0, 200), min_size=2, max_size=9, unique=True))
def test_a_ramp_falls_ever_more_slowly_to_what_was_asked_for(keep_ratio, epochs):
    ratios = cubic_ramp(keep_ratio, epochs)
    assert list(ratios) == sorted(epochs)
    kept = list(ratios.values())
    assert kept[-1] == pytest.approx(keep_ratio) and all(keep_ratio <= one + 1e-12 and one <= 1 for one in kept)
    assert all(one >= other for one, other in itertools.pairwise(kept))


def test_even_steps_are_the_cubic_of_the_way_that_is_left():
    assert list(cubic_ramp(0.2, [3, 6, 9, 12]).values()) == pytest.approx(
        [0.2 + 0.8 * left**3 for left in (0.75, 0.5, 0.25, 0)]
    )


def test_the_callback_takes_it():
    events = lrc.LowRankCompression(0.3, [10, 20, 30], ramp=True).events
    assert {epoch: round(kept, 3) for epoch, kept in events.items()} == {10: 0.507, 20: 0.326, 30: 0.3}


@pytest.mark.parametrize(("ratio", "epochs"), [([0.5, 0.3], [1, 2]), (0.3, 4), (0.3, [4])])
def test_a_ramp_needs_one_ratio_and_several_epochs(ratio, epochs):
    with pytest.raises(
        ValueError, match="`ramp` leads to one `keep_ratio` over at least two `epochs`, got keep_ratio="
    ):
        lrc.LowRankCompression(ratio, epochs, ramp=True)


def test_a_ramp_is_a_switch():
    with pytest.raises(TypeError, match="`ramp` must be True or False, got 'cubic'"):
        lrc.LowRankCompression(0.3, [1, 2], ramp="cubic")
