"""Fixtures that several test files use."""

import pytest
import torch


@pytest.fixture
def one_thread():
    """Tiny models run on one thread: handing their small products to several costs far more than it saves."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
