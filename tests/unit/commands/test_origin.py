"""How a network was made, from what the configuration of its run says."""

import pytest

from lr_callback.commands.origin import arguments_of

GIVEN = {"keep_ratio": 0.4, "epochs": 3, "figures": True}
ENTRY = {"class_path": "lr_callback.LowRankCompression", "init_args": GIVEN}


@pytest.mark.parametrize(
    "written",
    [
        {"compress": GIVEN},
        {"trainer": {"callbacks": ENTRY}},
        {"trainer": {"callbacks": [{"class_path": "my.Other"}, ENTRY]}},
    ],
)
def test_arguments_that_are_not_the_defaults_are_told_wherever_the_callback_is_configured(written):
    assert arguments_of(written) == "keep_ratio: 0.4\nepochs: 3\n"


@pytest.mark.parametrize("written", [{}, {"compress": None}, {"trainer": 7}, {"trainer": {"callbacks": "my.Other"}}])
def test_of_any_other_configuration_there_are_none(written):
    assert arguments_of(written) == ""
