"""Written: plain data is checked, and described whatever it is."""

import pytest

from lr_callback.common.written import check_fields, describe, is_plain, read_json


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3, "int '3'"),
        ("x" * 100, "str '" + "x" * 60 + "'"),
        (None, "NoneType 'None'"),
        (10**5000, "int, too large to be shown"),
        (nested(100_000), "list, too large to be shown"),
    ],
    ids=["int", "str", "None", "digits", "nested"],
)
def test_any_value_is_described(value, text):
    assert describe(value) == text


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        ({"a": [1, 2.5, None, True, "b", (1,)]}, True),
        ({1: 2}, False),
        ([object()], False),
        (2**63, False),
        (nested(7), True),
        (nested(8), False),
        (nested(100_000), False),
    ],
    ids=range(7),
)
def test_plain_is_what_json_knows_and_not_deep(value, plain):
    assert is_plain(value) is plain


def test_keys_of_any_type_are_told_of_a_field_that_is_missing():
    with pytest.raises(ValueError, match=r"Here: `a` is missing, found \['b'\]; the file is damaged or foreign"):
        check_fields({"b": 1, 2: 3}, {"a": int}, "Here")
    with pytest.raises(ValueError, match=r"Here: `a` is missing, found .*int '2'"):
        check_fields({2: 3}, {"a": int}, "Here")


@pytest.mark.parametrize("text", ['{"a":' * 100_000, '{"a": 1' + "0" * 5000 + "}"], ids=["deep", "digits"])
def test_what_python_does_not_read_is_refused(text):
    with pytest.raises(ValueError, match=r"^Thing text: must be JSON"):
        read_json(text, "Thing")
