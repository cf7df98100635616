"""Plans of studies: which runs there are, which are the same, what is refused."""

import pytest

from lr_callback.commands.study.plan import CONTROL, Plan, Run, Treatment, digest
from lr_callback.decisions.methods import ALDS, LRank

TREATMENTS = {"ALDS": Treatment(ALDS()), "L-Rank": Treatment(LRank())}


def plan(**changes) -> Plan:
    return Plan(**{"treatments": TREATMENTS, "keep_ratios": [0.5, 0.2], "seeds": [3, 1], **changes})


def test_every_seed_has_its_control_first_and_every_method_at_every_size():
    runs = plan().runs()
    assert runs[0] == Run(CONTROL, 1.0, 3) and runs[5] == Run(CONTROL, 1.0, 1)
    assert len(runs) == len(set(runs)) == 2 * (1 + 2 * 2)
    assert {(one.name, one.keep_ratio) for one in runs[1:5]} == {(n, r) for n in TREATMENTS for r in (0.5, 0.2)}


def test_runs_of_equal_settings_share_a_key_whatever_they_are_called():
    run, setting = Run("ALDS", 0.5, 3), {"model": {"depth": 8}}
    key = plan().key(run, setting)
    named = plan(treatments={"ours": Treatment(ALDS(error="slice"))})
    assert named.key(Run("ours", 0.5, 3), setting) == key
    others = [
        plan().key(run, {"model": {"depth": 14}}),
        plan().key(Run("ALDS", 0.2, 3), setting),
        plan().key(Run("ALDS", 0.5, 1), setting),
        plan().key(Run("L-Rank", 0.5, 3), setting),
        plan(treatments={"ALDS": Treatment()}).key(run, setting),
        plan().key(Run(CONTROL, 1.0, 3), setting),
        plan(epochs=1).key(run, setting),
        plan(dense_epochs=1).key(run, setting),
        plan(treatments={"ALDS": Treatment(ALDS(power=2, objective="sum"))}).key(run, setting),
        plan(treatments={"ALDS": Treatment(refit="cut")}).key(run, setting),
        plan(treatments={"ALDS": Treatment(filter_pruning="l2")}).key(run, setting),
    ]
    assert len({key, *others}) == 1 + len(others)


def test_the_key_is_the_same_in_every_process():
    assert digest({"a": [1, 2.5, None], "b": {"c": "d"}}) == "eca64c85ea7e3218"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"treatments": {}}, "`methods` must name at least one method, for example .*, got none"),
        (
            {"treatments": {"dense": Treatment()}},
            "`methods`: 'dense' is the name of the control, which every",
        ),
        ({"keep_ratios": []}, "`keep_ratios` must have at least one entry, got none"),
        ({"keep_ratios": [0.5, 1.5]}, r"`keep_ratios` must be numbers in \(0, 1\).*, got 1.5"),
        ({"keep_ratios": [0.0]}, r"`keep_ratios` must be numbers in \(0, 1\).*, got 0.0"),
        ({"keep_ratios": [0.5, 1.0]}, r"`keep_ratios` must be numbers in \(0, 1\), .* dense control has, got 1"),
        ({"keep_ratios": [0.5, 0.5]}, r"`keep_ratios` must be different from each other, got \[0.5, 0.5\]"),
        ({"seeds": []}, "`seeds` must have at least one entry, got none"),
        ({"seeds": [1, 1]}, r"`seeds` must be different from each other, got \[1, 1\]"),
        ({"epochs": -1}, "`epochs` must be at least 0, got -1"),
        ({"dense_epochs": -2}, "`dense_epochs` must be at least 0, got -2"),
    ],
    ids=str,
)
def test_a_plan_that_cannot_be_meant_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        plan(**changes)


@pytest.mark.parametrize("more", [{"method": ALDS()}, {"refit": "cut"}, {"recalibrate_batchnorm": True}], ids=str)
def test_filter_pruning_takes_nothing_of_the_callback(more):
    with pytest.raises(ValueError, match=r"`filter_pruning`='l1' is done without the callback: .* must be left out"):
        Treatment(filter_pruning="l1", **more)


def test_a_switch_that_is_on_changes_no_key_and_one_that_is_off_does():
    run, settings = Run("one", 0.5, 0), [Treatment(refit="cut"), Treatment(refit="cut", correct_biases=True)]
    keys = [Plan({"one": one}, [0.5]).key(run, {}) for one in settings]
    off = Plan({"one": Treatment(refit="cut", rebase_batchnorm=False)}, [0.5])
    assert keys[0] == keys[1] != off.key(run, {})
    assert "correct_biases" not in settings[0].settings() and settings[0].options["correct_biases"] is True
    assert off.treatments["one"].settings()["rebase_batchnorm"] is False
