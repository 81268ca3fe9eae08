"""Fixtures that several test files use, and the order in which two workers run the files."""

import os
from contextlib import contextmanager

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """The smoke profile takes one of the two workers most of the time, so it starts first."""
    items.sort(key=lambda item: item.path.name != "test_smoke.py")


@contextmanager
def threads(count: int):
    """Run with so many threads. Handing small products to several costs more than it saves, most on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def one_thread():
    with threads(1):
        yield


@pytest.fixture(scope="session")
def smollm2():
    """The embedded model in float32, the dtype of all reference numbers. Nothing may change it."""
    from lib.models import ModelNotFoundError, load_backbone

    try:
        with threads(1):
            return load_backbone("smollm2", dtype="float32", device="cpu")
    except ModelNotFoundError as error:
        pytest.skip(f"The embedded model is not here: {error}")
