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


def with_a_line(text: str) -> str:
    return text + "\nassert 1 + 1 == 2\n"


@pytest.mark.parametrize("file, change, stale", [  # whether the STS results of the baseline and of TP are stale
    *((file, with_a_line, [True, True]) for file in (
        "core/tokens.py", "core/forward.py", "core/pooling.py", "core/batches.py", "core/encoder.py",
        "evaluation/sts.py", "data/sources.py")),
    ("core/token_prepending.py", lambda text: text.replace("= states[row, last", "= -states[row, last"), [False, True]),
    ("core/forward.py", lambda text: text.replace('"""', '"""Other words. ', 1), [False, False]),
    ("core/tokens.py", lambda text: text.replace("    def ", "\n    # A comment.\n    def "), [False, False]),
    ("core/prompts.yaml", lambda text: text + 'another: {templates: ["Text: \\"{sentence}\\""]}\n', [False, False]),
    *((file, with_a_line, [False, False]) for file in (
        "report/figures.py", "report/results.py", "run/publish.py", "evaluation/transfer.py", "__init__.py")),
])
def test_new_code_makes_stale_what_used_it_and_texts_plots_and_other_evaluations_nothing(tmp_path, file, change, stale):
    shutil.copytree(ROOT / "lib", tmp_path / "lib", ignore=shutil.ignore_patterns("__pycache__"))
    path, text = tmp_path / "lib" / file, (ROOT / "lib" / file).read_text()
    assert change(text) != text
    path.write_text(change(text))
    assert [code_version(*modules, root=tmp_path) != code_version(*modules) for modules in (BASELINE, TP)] == stale


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
    assert {"lib.core.token_prepending"} == TP - BASELINE
    own = type("Own", (), {"__module__": "__main__"})()
    assert "__main__" in code_of(partial(sts_pairs, Encoder(own), {})), "a method that is written in a notebook"
    for outside in (lambda: None, small_lib, partial(small_lib, 1)):
        with pytest.raises(ValueError, match="no function of lib"):
            code_of(outside)
