"""Hostile input, a little of it each time; `make fuzz` does ten thousand."""

import fuzz
import pytest


@pytest.mark.parametrize("seed", [7, 8])
def test_mutated_files_are_accepted_or_refused(seed, monkeypatch, tmp_path):
    """No traceback, no hang, no flood of memory, whatever happens to a file or a command line."""
    monkeypatch.chdir(tmp_path)  # restored at the end: the script works in its own folder
    fuzz.main(fuzz.Config(inputs=150, seed=seed))
