"""Tables of text, written out by hand."""

import pytest

from tensormask.utils.tables import format_records, format_table


def test_records_by_hand():
    records = [{"name": "a", "count": 10, "ms": 1234.56}, {"name": "bcd", "count": 9, "ms": 0.5}]
    assert format_records(records).splitlines() == [
        "name  count    ms",
        "a        10  1235",
        "bcd       9   0.5",
    ]


def test_rows_of_unequal_length_are_an_error():
    with pytest.raises(ValueError, match="argument 2 is"):
        format_table([["a", "b"], ["c"]])
