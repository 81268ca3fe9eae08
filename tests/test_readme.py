"""What the README shows works as it stands there, and its numbers are those of the published tables."""

import re

import pandas as pd
import pytest

from lib.core.store import ROOT

README = (ROOT / "README.md").read_text()
NAMED = r"`((?:lib|configs|data|notebooks|figures|benchmarks|tests)/[\w./-]+)`"

# README table, found by words of its header -> the CSV behind it, the column of the README whose cells name the CSV's rows
# in its first column, and README column -> CSV column. A cell may hold "value (low to high)" and bold.
TABLES: dict[str, tuple] = {}


def test_the_library_example_runs(capsys, smollm2):
    [example] = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(example.strip().splitlines()) <= 10
    exec(compile(example, "README.md", "exec"), {})
    printed = [float(number) for number in re.findall(r"-?\d+\.\d*", capsys.readouterr().out)]
    similarity = [printed[0:3], printed[3:6], printed[6:9]]
    assert similarity[0][1] > similarity[0][2], "the paraphrase should be closer than the unrelated sentence"
    assert all(similarity[i][i] == pytest.approx(1, abs=1e-2) for i in range(3))


@pytest.mark.parametrize("path", sorted({*re.findall(r"\]\(([^)#]+)\)", README), *re.findall(NAMED, README)}))
def test_what_is_linked_or_named_exists(path):
    assert path.startswith(("https://", "data/cache", "data/downloads")) or (ROOT / path).exists()
