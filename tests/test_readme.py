"""What the README shows works as it stands there."""

import re

import pytest

from lib.store import ROOT

README = (ROOT / "README.md").read_text()


def test_the_library_example_runs(capsys, smollm2):
    [example] = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(example.strip().splitlines()) <= 10
    exec(compile(example, "README.md", "exec"), {})
    printed = [float(number) for number in re.findall(r"-?\d+\.\d*", capsys.readouterr().out)]
    similarity = [printed[0:3], printed[3:6], printed[6:9]]
    assert similarity[0][1] > similarity[0][2], "the paraphrase should be closer than the unrelated sentence"
    assert all(similarity[i][i] == pytest.approx(1, abs=1e-2) for i in range(3))


@pytest.mark.parametrize("path", re.findall(r"\]\(([^)#]+)\)", README))
def test_links_lead_somewhere(path):
    assert (ROOT / path).exists()


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:lib|configs|data|notebooks|figures)/[\w./-]+)`", README))))
def test_files_that_are_named_exist(path):
    assert (ROOT / path).exists() or path.startswith(("data/cache", "data/downloads"))
