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


@pytest.fixture(scope="session")
def smollm2():
    """The embedded model in float32, the dtype of all reference numbers. Nothing may change it."""
    from lib.models import ModelNotFoundError, load_backbone

    try:
        return load_backbone("smollm2", dtype="float32", device="cpu")
    except ModelNotFoundError as error:
        pytest.skip(f"The embedded model is not here: {error}")
