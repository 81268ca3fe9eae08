"""`python -m lib.report.compare`: every published number has a status, and only an unexplained difference fails."""

import pandas as pd
import pytest

from lib.report import compare
from lib.report.compare import KEYS, comparison, published
from lib.report.results import PAPER_MODELS
from lib.run.__main__ import choose_notebooks, parameters_of, read_profile
from lib.studies.settings import load_settings

NONE = pd.DataFrame(columns=["table", *KEYS, "variant", "explanation"], dtype=str)


def measured(off: float, **changes) -> pd.DataFrame:
    """One number of Table 1, this far from the published one."""
    row = published().query("table == 'a1_sts_llama2_7b' and method == 'prompteol' and tp and task == 'STS-B' and variant == ''").iloc[0]
    return pd.DataFrame([{**row[KEYS], "ours": row["value"] + off, "status": "", "profile": "llama2-7b"} | changes])


def status_of(table: pd.DataFrame) -> str:
    [status] = table.loc[(table["table"] == "a1_sts_llama2_7b") & table["ours"].notna(), "status"]
    return status


def test_without_measurements_every_number_says_why():
    table = comparison(compare.ours().iloc[:0], NONE)
    assert len(table) == len(published()) > 400
    assert table["status"].str.startswith("not run: ").all()
    assert table["status"].str.contains("./run_all.sh llama2-7b").any()


def test_reproduced_differs_explained():
    assert status_of(comparison(measured(0.4), NONE)) == "reproduced"
    assert status_of(comparison(measured(-0.6), NONE)) == "differs"
    reason = {key: "" for key in NONE} | {"model": "llama2-7b", "tp": "true", "explanation": "another tokenizer"}
    assert status_of(comparison(measured(-0.6), pd.DataFrame([reason]))) == "explained: another tokenizer"
    assert status_of(comparison(measured(-0.6), pd.DataFrame([reason | {"task": "STS12"}]))) == "differs"


@pytest.mark.parametrize("status", ["other model", "sample data"])
def test_what_does_not_compare_does_not_count(status):
    assert comparison(measured(-9, status=status), NONE)["ours"].isna().all()


def test_the_command(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(compare, "FIGURES", tmp_path)
    monkeypatch.setattr("sys.argv", ["compare"])
    assert compare.main() == 0 and f"{len(published())} published numbers" in capsys.readouterr().out
    (tmp_path / "llama2-7b").mkdir()
    measured(-5).drop(columns="profile").to_csv(tmp_path / "llama2-7b" / "sts_beside_paper.csv", index=False)
    monkeypatch.setattr("sys.argv", ["compare", "--measured"])
    assert compare.main() == 1
    printed = capsys.readouterr().out
    assert "1 differs" in printed and printed.count("| a1_sts") == 1


@pytest.mark.parametrize("hub, profile", PAPER_MODELS.items())
def test_every_model_of_the_paper_has_a_profile_and_settings(hub, profile):
    parameters = parameters_of(profile, read_profile(profile), choose_notebooks([]), {})
    assert all(of["model"] == hub for of in parameters.values())
    settings = load_settings(hub)
    assert all(s.tp.start == 1 and s.tp.end < s.exit_layer for s in settings.values())
    assert set(parameters["01_sts_eval"]["prompts"]) <= set(settings)
