"""Every test runs on one thread and leaves no process group behind."""

import pytest
import torch

from lib import common


@pytest.fixture(autouse=True)
def quiet_machine():
    torch.set_num_threads(1)
    yield
    common.leave()
