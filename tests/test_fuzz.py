"""Hostile input, a little of it each time; `make fuzz` does ten thousand."""

import pytest

from tests import fuzz


@pytest.mark.parametrize("seed", [7, 8])
def test_mutated_files_are_accepted_or_refused(seed):
    """No traceback, no hang, no flood of memory, whatever happens to a file or a command line."""
    fuzz.main(fuzz.Config(inputs=150, flags=0, folders=False, seed=seed))


def test_odd_flags_are_accepted_or_refused():
    """The same for values of flags: zero, negative, not finite, too large, too many, no number."""
    fuzz.main(fuzz.Config(inputs=0, flags=12, folders=False))


def test_folders_used_again_hold_what_new_ones_would():
    """A job done again with another setting is refused, or leaves what a new folder would hold."""
    fuzz.main(fuzz.Config(inputs=0, flags=0))
