from __future__ import annotations

import re

import pytest

from edgeqdm import errors
from edgeqdm.errors import EdgeqdmError

DOCUMENTED = {
    name: int(code)
    for name, code in re.findall(r"^[ |-]*([A-Z]\w*Error) +(\d+) ", errors.__doc__ or "", re.M)
}


def tree(root: type[EdgeqdmError]) -> list[type[EdgeqdmError]]:
    return [root, *(c for child in root.__subclasses__() for c in tree(child))]


CLASSES = [c for c in tree(EdgeqdmError) if c.__module__ == "edgeqdm.errors"]


def test_the_drawn_tree_names_every_class() -> None:
    assert {c.__name__ for c in CLASSES} == set(DOCUMENTED)


@pytest.mark.parametrize("error", CLASSES)
def test_every_class_has_its_documented_exit_code(error: type[EdgeqdmError]) -> None:
    assert error.exit_code == DOCUMENTED[error.__name__]


@pytest.mark.parametrize("error", CLASSES)
def test_no_exit_code_is_taken_by_the_shell_or_by_usage_errors(error: type[EdgeqdmError]) -> None:
    assert 3 <= error.exit_code <= 10


@pytest.mark.parametrize("error", CLASSES)
def test_an_error_prints_code_message_path_and_hint_on_one_line(error: type[EdgeqdmError]) -> None:
    raised = error("EQ-3001", "what was found", path="a/b.json", hint="do this")
    assert str(raised) == "error[EQ-3001]: what was found (a/b.json) - do this"


def test_path_and_hint_may_be_absent() -> None:
    assert str(EdgeqdmError("EQ-3001", "what was found")) == "error[EQ-3001]: what was found"


@pytest.mark.parametrize("hostile", ["a\nb", "a\r\x1b[2Jb", "a\u2028b", "a\u202eb", "a\udcffb"])
def test_hostile_text_stays_on_one_printable_line(hostile: str) -> None:
    line = str(EdgeqdmError("EQ-3001", hostile, path=hostile, hint=hostile))
    assert line.isprintable()
    assert len(line.splitlines()) == 1
    line.encode("utf-8")


def test_a_printable_name_in_any_script_is_kept() -> None:
    assert "(é/模型)" in str(EdgeqdmError("EQ-3001", "x", path="é/模型"))
