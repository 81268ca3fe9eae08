"""Which code a result hangs on: found from imports, tested by changing modules in a copy of lib."""

import shutil
from functools import partial

import pytest

from lib.core.code_version import code_version, dependencies
from lib.core.pooling import LastToken
from lib.core.store import ROOT
from lib.core.token_prepending import TokenPrepending
from lib.evaluation.sts import sts_pairs
from lib.report.results import code_of


class Encoder:
    """Holds what a `SentenceEncoder` holds, as far as code goes."""

    __module__ = "lib.core.encoder"

    def __init__(self, method=None):
        self.method, self.pooling = method, LastToken()


BASELINE, TP = (code_of(partial(sts_pairs, Encoder(method), {})) for method in (None, TokenPrepending(1, 2)))
LINE = "\nassert 1 + 1 == 2\n"


def stale(folder, file: str, change=lambda text: text + LINE) -> list[bool]:
    """Whether the baseline's and TP's STS results are stale after a change of a file's text."""
    versions = []
    for name in ("before", "after"):
        shutil.copytree(ROOT / "lib", folder / name / "lib", ignore=shutil.ignore_patterns("__pycache__"))
        path = folder / name / "lib" / file
        path.write_text(change(path.read_text()) if name == "after" else path.read_text())
        versions.append([code_version(*modules, root=folder / name) for modules in (BASELINE, TP)])
    return [before != after for before, after in zip(*versions, strict=True)]


@pytest.mark.parametrize("file", [
    "core/tokens.py", "core/forward.py", "core/pooling.py", "core/batches.py", "core/encoder.py", "evaluation/sts.py",
    "data/sources.py",
])
def test_new_code_anywhere_below_makes_sts_results_stale(tmp_path, file):
    assert stale(tmp_path, file) == [True, True]


def test_a_changed_hook_makes_stale_what_used_it_and_nothing_else(tmp_path):
    path, old = "core/token_prepending.py", "= states[row, last"
    assert old in (ROOT / "lib" / path).read_text()
    assert stale(tmp_path, path, lambda text: text.replace(old, "= -states[row, last")) == [False, True]


@pytest.mark.parametrize("file, change", [
    ("core/forward.py", lambda text: text.replace('"""', '"""Other words. ', 1)),
    ("core/tokens.py", lambda text: "# A comment.\n" + text.replace("    def ", "\n    # Another.\n    def ")),
    ("core/prompts.yaml", lambda text: text + '\nanother: {templates: ["Text: \\"{sentence}\\""]}\n'),
    *((file, lambda text: text + LINE) for file in (
        "report/figures.py", "report/results.py", "run/publish.py", "evaluation/transfer.py", "__init__.py")),
])
def test_texts_prompts_plots_and_other_evaluations_make_nothing_stale(tmp_path, file, change):
    assert stale(tmp_path, file, change) == [False, False]


def small_lib(folder, **modules: str):
    for name, text in modules.items():
        path = folder / "lib" / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        (path.parent / "__init__.py").touch()
    return folder


def test_every_form_of_import_is_followed_wherever_it_stands(tmp_path):
    root = small_lib(
        tmp_path, core__a="from lib.core import b\nimport lib.core.c, numpy\n", report__results="",
        core__b="def f():\n    from lib.core.d import name\n", core__c="from .e import name\nfrom . import f\n",
        core__d="from lib.report.results import Result\n", core__e="if False:\n    import lib.core.a\n", core__f="",
    )
    assert dependencies("lib.core.a", root=root) == {f"lib.core.{name}" for name in "abcdef"}
    assert dependencies("lib.core.f", root=root) == {"lib.core.f"}


def test_a_name_that_hides_its_module_is_refused(tmp_path):
    with pytest.raises(ValueError, match="SentenceEncoder"):
        dependencies("lib.core.a", root=small_lib(tmp_path, core__a="from lib import SentenceEncoder\n"))


def test_code_that_cannot_be_read_is_never_the_same_twice():
    assert code_version("__nowhere__") != code_version("__nowhere__")
    assert code_version(__name__) == code_version(__name__)
    assert "lib.core.pooling" in dependencies(__name__), "one's own method counts with what it imports from lib"


def test_results_know_the_code_of_encoders_methods_and_arguments():
    assert {"lib.evaluation.sts", "lib.core.encoder", "lib.core.pooling"} <= BASELINE
    assert TP - BASELINE == {"lib.core.token_prepending"}
    own = type("Own", (), {"__module__": "__main__"})()
    assert "__main__" in code_of(partial(sts_pairs, Encoder(own), {})), "a method that is written in a notebook"
    for outside in (lambda: None, stale, partial(stale, 1)):
        with pytest.raises(ValueError, match="no function of lib"):
            code_of(outside)
