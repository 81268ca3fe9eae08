"""Fixtures that several test files use, how properties are searched, and the order in which workers run the files."""

import pytest
import torch
from fake_hub import forget_sources
from hypothesis import HealthCheck, settings

from lib.data import sources

# Handing small products to several threads costs more than it saves, most on a busy machine.
torch.set_num_threads(1)

# The same examples in each run, however slow the machine is.
settings.register_profile(
    "same", deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
settings.load_profile("same")


def pytest_collection_modifyitems(items):
    """The two long files start first, one on each worker."""
    items.sort(key=lambda item: item.path.name not in ("test_smoke.py", "test_interrupted.py"))


def bundled(name: str):
    """A bundled model in float32, the dtype of all reference numbers. Nothing may change it."""
    from lib.core.backbone import ModelNotFoundError, load_backbone
    try:
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
def backbone():
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
    for name in ("TP_DATA_DIR", "HF_ENDPOINT", *sources.OFFLINE_SWITCHES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sources, "DATA", tmp_path / "data")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "sample").symlink_to(sources.ROOT / "data" / "sample")
    forget_sources()
    sources.hub_unreachable = "tests do not ask it"
    yield
    forget_sources()
