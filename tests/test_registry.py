"""The name -> member table."""

import pytest

from diffusers_ldmq.errors import LDMQError
from diffusers_ldmq.registry import Registry


def test_members_come_back_sorted_and_by_name():
    table: Registry[int] = Registry("planner")
    table.add("b", 2)
    table.add("a", 1)
    assert (list(table), table["b"], "a" in table, table.items()) == (["a", "b"], 2, True, [("a", 1), ("b", 2)])


def test_an_unknown_name_tells_the_known_ones():
    table: Registry[int] = Registry("planner")
    table.add("hybrid", 1)
    with pytest.raises(LDMQError, match=r"unknown planner 'hybird'; known: hybrid"):
        table["hybird"]


def test_a_taken_name_is_an_error_and_changes_nothing():
    table: Registry[object] = Registry("planner")
    member = table.add("hybrid", object())
    assert table.add("hybrid", member) is member
    with pytest.raises(LDMQError, match="'hybrid' is already registered"):
        table.add("hybrid", object())
    assert table["hybrid"] is member
