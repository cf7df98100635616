"""Files of studies: what was run is found again, whatever else is asked for later."""

import csv
import json

import pytest

from lr_callback.commands.study.files import Store
from lr_callback.commands.study.rows import Row


def row(key="a", **changes) -> Row:
    own = {"parameters": 10, "kept_parameters": 0.5, "right_after": {"acc": 0.5}, "after": {"acc": 0.75}, **changes}
    return Row(key, "ALDS", 0.5, 0, 2, **own)


def test_rows_are_found_again_by_their_settings_and_take_the_name_of_now(tmp_path):
    Store(tmp_path, {}).add(row())
    again = Store(tmp_path, {})
    assert again.rows == [row()]
    assert again.done("a", "ours") == row(**{}).__class__(**{**vars(row()), "method": "ours"})
    assert again.done("b", "ALDS") is None


def test_a_run_that_made_nothing_is_tried_again_and_its_row_replaced(tmp_path):
    store = Store(tmp_path, {})
    store.add(Row("a", "ALDS", 0.5, 0, 2, reason="no"))
    assert store.done("a", "ALDS") is None
    store.add(row())
    assert Store(tmp_path, {}).rows == [row()]


def test_rows_of_other_settings_stay_in_the_file(tmp_path):
    Store(tmp_path, {"epochs": 1}).add(row("a"))
    Store(tmp_path, {"epochs": 2}).add(row("b"))
    written = json.loads((tmp_path / "study.json").read_text(encoding="utf-8"))
    assert [one["key"] for one in written["rows"]] == ["a", "b"]
    assert written["study"] == {"epochs": 2}
    assert len(written["environments"]) == 1 and "torch" in written["environments"][0]


def test_a_row_knows_the_environment_that_it_is_of(tmp_path):
    Store(tmp_path, {}).add(row("a"))
    file = tmp_path / "study.json"
    written = json.loads(file.read_text(encoding="utf-8"))
    written["environments"][0]["torch"] = "0.1"
    file.write_text(json.dumps(written), encoding="utf-8")
    store = Store(tmp_path, {})
    store.add(row("b"))
    assert [one.environment for one in Store(tmp_path, {}).rows] == [0, 1]
    assert [one["torch"] == "0.1" for one in store.environments] == [True, False]


def test_the_csv_has_a_line_for_each_row_and_a_column_for_each_metric(tmp_path):
    file = Store(tmp_path, {}).write_csv([Row("c", "dense", 1.0, 0, 2, reason="none, yet"), row()])
    with file.open(encoding="utf-8", newline="") as text:
        first, second = csv.DictReader(text)
    assert (first["reason"], first["after_acc"]) == ("none, yet", "")
    assert (second["right_after_acc"], second["after_acc"], second["keep_ratio"]) == ("0.5", "0.75", "0.5")
    assert not list(tmp_path.glob("*.part"))


def test_an_output_that_is_a_file_is_refused(tmp_path):
    file = tmp_path / "taken"
    file.touch()
    with pytest.raises(NotADirectoryError, match=r"`output` must be a folder, found the file .*taken; choose another"):
        Store(file, {})


@pytest.mark.parametrize("text", ["{", "[]", '{"rows": []}', '{"environments": [], "rows": [{"other": 1}]}'])
def test_a_file_of_something_else_is_refused_and_left_alone(tmp_path, text):
    file = tmp_path / "study.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"`output`: .*study\.json must be one that `lr-callback study` wrote"):
        Store(tmp_path, {})
    assert file.read_text(encoding="utf-8") == text


def test_a_metric_that_is_not_finite_is_none_in_the_file(tmp_path):
    """JSON knows no NaN: strict readers would refuse the whole file."""
    store = Store(tmp_path, {})
    store.add(row(right_after={"test_loss": float("nan"), "test_accuracy": 0.1}, after={"test_loss": float("inf")}))
    text = (tmp_path / "study.json").read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=pytest.fail)
    (again,) = Store(tmp_path, {}).rows
    assert again.right_after == {"test_loss": None, "test_accuracy": 0.1} and again.after == {"test_loss": None}
    assert again.at("after", "test_loss") is None
