"""Fixtures that several test files use, and the order in which two workers run the files."""

import os
from contextlib import contextmanager

import pytest
import torch

from lib.data import download, sources

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """The two long files start first, one on each worker."""
    items.sort(key=lambda item: item.path.name not in ("test_smoke.py", "test_interrupted.py"))


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


def bundled(name: str):
    """A bundled model in float32, the dtype of all reference numbers. Nothing may change it."""
    from lib.core.backbone import ModelNotFoundError, load_backbone

    try:
        with threads(1):
            return load_backbone(name, dtype="float32", device="cpu")
    except ModelNotFoundError as error:
        pytest.skip(f"The bundled model is not here: {error}")


@pytest.fixture(scope="session")
def smollm2():
    return bundled("smollm2")


@pytest.fixture(scope="session")
def gemma3():
    return bundled("gemma3-270m")


@pytest.fixture
def backbone(one_thread):
    """The tiny Llama that tests share. After each of them it must be as it was."""
    from tiny_models import tiny_backbone, untouched

    with untouched(tiny_backbone()):
        yield tiny_backbone()


@pytest.fixture
def passes(backbone):
    """The shapes (rows, tokens) of all forward passes of the tiny Llama in this test."""
    shapes = []
    handle = backbone.embeddings.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    yield shapes
    handle.remove()


@pytest.fixture
def no_data(monkeypatch, tmp_path):
    """No source known, no data but the sample, and a hub that is not asked."""
    for name in ("TP_DATA_DIR", "HF_ENDPOINT", *download.OFFLINE_SWITCHES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sources, "DATA", tmp_path / "data")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "sample").symlink_to(sources.ROOT / "data" / "sample")
    sources.forget_sources()
    sources.assume_hub_unreachable("tests do not ask it")
    yield
    sources.forget_sources()
