"""Every argument refuses what is no value of its kind, in words, before anything is done with it."""

import pytest
from arguments import FUNCTIONS, bad_values

from diffusers_magihuman.checks import show

CASES = [(name, argument) for name, (_, _, kinds) in FUNCTIONS.items() for argument in kinds]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if not name.startswith("read ")])
def test_what_is_right_is_taken(name):
    function, good, _ = FUNCTIONS[name]
    function(**good)


@pytest.mark.parametrize("name, argument", CASES, ids=lambda value: value.replace(" ", "-"))
def test_what_is_no_value_of_its_kind_is_refused(name, argument):
    function, good, kinds = FUNCTIONS[name]
    failures = []
    for value in bad_values(kinds[argument], good.get(argument)):
        try:
            function(**good | {argument: value})
            failures.append(f"{show(value):.60} is taken")
        except (ValueError, OSError) as error:
            if argument not in str(error) or len(str(error)) > 1000:
                failures.append(f"{show(value):.60}: {str(error)[:200]}")
        except Exception as error:
            failures.append(f"{show(value):.60}: {type(error).__name__}: {str(error)[:200]}")
    assert not failures, "\n".join(failures)
