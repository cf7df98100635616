"""What the numbers mean, in plain sentences: also where a compression did not help."""

from dataclasses import replace

import pytest

from lr_callback.page.words import difference_of, size_of, speed, value_of, verdict


def test_size_time_and_accuracy_of_a_network_that_is_smaller_slower_and_worse(facts):
    size, time, accuracy = verdict(facts)
    assert size == (
        "1 of 2 layers are factorized: the network keeps 70.0% of its parameters (140 of 200), and a file of its "
        "weights is 60.0% as large."
    )
    assert time.startswith(
        "It is smaller and slower: a batch takes 3.00 ms in place of 2.00 ms, although it has 50.0% of the"
    )
    assert "`cost: latency`" in time and "`lr-callback tune`" in time
    assert accuracy.startswith("val_accuracy is lower by 2.00 points: 90.00% before, 88.00% now.")


@pytest.mark.parametrize(
    ("milliseconds", "spread", "expected", "text"),
    [
        (1.0, 0.02, 1, "It is 2.00 times as fast: a batch takes 1.00 ms in place of 2.00 ms."),
        (2.08, 0.02, 0, "It is neither clearly faster nor clearly slower: a batch takes 2.08 ms in place of 2.00 ms."),
        (1.7, 0.2, 0, "It is neither clearly"),
        (1.7, 0.1, 1, "It is 1.18 times as fast"),
        (9.0, 0.6, 0, "Whether it is faster cannot be told"),
        (2.5, 0.02, -1, "It is smaller and slower"),
    ],
)
def test_a_time_counts_where_it_differs_by_more_than_runs_do(with_after, milliseconds, spread, expected, text):
    found = with_after(spread=spread, milliseconds=milliseconds)
    assert speed(found) == expected
    assert verdict(found)[1].startswith(text)


def test_without_times_or_metrics_nothing_is_said_of_them(with_after):
    assert len(verdict(with_after(milliseconds=0.0, metrics={}))) == 1
    assert speed(with_after(milliseconds=0.0)) == 0


def test_slower_with_no_fewer_multiply_adds_is_not_said_to_have_fewer(with_after):
    assert "multiply-adds" not in verdict(with_after(multiply_adds=0))[1].partition(".")[0]


def test_an_accuracy_that_rises_is_no_gain_of_the_compression(with_after):
    text = verdict(with_after(metrics={"val_accuracy": 0.95}))[2]
    assert text.startswith("val_accuracy is not lower: 90.00% before, 95.00% now. The rise is no gain")
    assert verdict(with_after(metrics={"val_accuracy": 0.9001}))[2].startswith("val_accuracy is the same")


def test_an_accuracy_in_percent_is_one_too(facts):
    stages = [replace(stage, metrics={"acc": 100 * stage.metrics["val_accuracy"]}) for stage in facts.stages]
    assert "acc is lower by 2: 90 before, 88 now" in verdict(replace(facts, stages=tuple(stages)))[2]


def test_of_an_unknown_size_the_unit_of_the_budget_is_told(facts):
    stages = tuple(replace(stage, parameters=0, file_bytes=0) for stage in facts.stages)
    found = replace(facts, stages=stages, allocation=replace(facts.allocation, unit="multiply_adds"))
    assert verdict(found)[0] == "1 of 2 layers are factorized: the network keeps 70.0% of its multiply-adds."


def test_no_layer_factorized(facts):
    layers = dict.fromkeys(facts.allocation.layers)
    [text] = verdict(replace(facts, allocation=replace(facts.allocation, layers=layers)))
    assert text == "No layer was factorized: the network is as it was."


def test_values_as_a_person_writes_them():
    assert [value_of("acc", 0.5), value_of("acc", 50.0), value_of("loss", 0.5)] == ["50.00%", "50", "0.5"]
    assert [difference_of("acc", 0.5, 0.6), difference_of("loss", 0.5, 0.6)] == ["+10.00 points", "+0.1"]
    assert [size_of(999), size_of(1000), size_of(2_500_000_000)] == ["999 bytes", "1.0 kB", "2.5 GB"]
