"""What the README shows works as it stands there."""

import re

import pandas as pd
import pytest

from lib.core.store import ROOT

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


def test_the_first_table_holds_the_published_numbers():
    """Of every prompt: plain at the last layer, plain at the exit layer, TP, and TP's effect with its interval."""
    scores = pd.read_csv(ROOT / "figures" / "default" / "sts_scores.csv").set_index(["prompt", "variant"])["Avg"]
    effects = pd.read_csv(ROOT / "figures" / "default" / "sts_effect_of_tp.csv").set_index(["prompt", "task"])
    names = {"no prompt": "none", "Pretended CoT": "cot", "CK (mean of CoT and KE)": "ck", "MetaEOL, 8 prompts": "metaeol"}
    checked = []
    for row in README.partition("## ")[0].splitlines():
        cells = [cell.strip(" *") for cell in row.strip("|").split("|")]
        prompt = names.get(cells[0], cells[0].lower())
        if row.startswith("|") and prompt in scores.index.get_level_values(0):
            variants = ("vanilla, last layer", "vanilla, exit layer", "TP, exit layer")
            assert cells[1:4] == [f"{scores[prompt, variant]:.1f}" for variant in variants]
            effect = effects.loc[prompt, "Avg"]
            assert cells[4] == f"{effect['difference']:+.1f} ({effect['low']:.1f} to {effect['high']:.1f})"
            checked.append(prompt)
    assert checked == list(scores.xs("TP, exit layer", level="variant").index)


def test_it_opens_with_one_figure_and_one_table_and_then_the_two_commands():
    before, _, after = README.partition("## Two commands")
    assert before.count("![") == 1 and len(re.findall(r"^\|-", before, re.M)) == 1 and "\n## " not in before
    assert re.findall(r"^    (\./\S+)", after, re.M)[:2] == ["./run_all.sh", "./run_tests.sh"]


def test_the_matrix_of_releases_is_the_one_that_the_script_wrote():
    assert (ROOT / "figures" / "transformers_matrix.md").read_text().strip() in README


def test_the_table_of_files_names_all_of_them():
    named = set(re.findall(r"`lib/(\w+)\.py`", README))
    modules = {path.stem for path in (ROOT / "lib").glob("*.py") if not path.stem.startswith(("__", "plots"))}
    assert modules == named
