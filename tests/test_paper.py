"""The papers' numbers beside ours: one tolerance a metric, and only an unexplained difference fails.
And the README: what it shows works as it stands there, and its numbers are those of the published tables."""

import re

import numpy as np
import pandas as pd
import pytest
import yaml
from tiny_models import tiny_backbone

from lib.core.backbone import load_backbone
from lib.core.encoder import SentenceEncoder
from lib.core.prompts import get_prompt
from lib.core.store import ROOT
from lib.report import paper
from lib.report.figures import label
from lib.report.paper import KEYS, PAPER_MODELS, TOLERANCE, beside_paper, comparison, read_paper, sts_table
from lib.report.settings import load_settings

LLAMA = "meta-llama/Llama-2-7b-hf"
ICL = pd.DataFrame({"method": ["icl"], "tp": [False], "task": ["Avg"]})
NONE = pd.DataFrame(columns=["table", *KEYS, "variant", "explanation"], dtype=str)


@pytest.mark.parametrize("name", sorted(path.stem for path in paper.PAPER.glob("*.csv")))
def test_published_tables_are_tidy_and_their_averages_those_of_their_rows(name):
    table = read_paper(name)
    columns = ["paper", "model", "method", "tp", "variant", "task", "metric", "value", "source", "grade", "note"]
    assert list(table.columns) == columns and table["tp"].dtype == bool
    assert np.isfinite(table["value"]).all() and (table["source"] != "").all()
    assert set(table["grade"]) <= {"P", "R", "S"} and not table.duplicated([*KEYS, "variant"]).any()
    checked = 0
    for _, rows in table.groupby(["model", "method", "tp", "variant", "metric"]):
        scores = rows.set_index("task")["value"]
        if "Avg" in scores and len(scores) == 8:
            assert scores.drop("Avg").mean() == pytest.approx(scores["Avg"], abs=0.011)
            checked += 1
    assert checked >= 6 or name in ("a4_cost", "a5_ablations", "a7_rerun", "a8_one_demonstration", "b4_retrieval")


def test_a_number_beside_ours_says_what_it_is():
    ours = pd.DataFrame({"method": ["prompteol"] * 2, "tp": [True, False], "task": "Avg", "value": [77.0, 60.0]})
    def beside(model, sample=False):
        return beside_paper(ours, "a1_sts_llama2_7b", model, sample).set_index(["method", "tp", "task"])
    same, measured = beside(LLAMA), [("prompteol", tp, "Avg") for tp in (True, False)]
    assert same.loc[measured, "status"].tolist() == ["reproduced", "differs"]
    assert same.loc[measured[0], "difference"] == pytest.approx(-0.19)
    assert same.loc[("cot", False, "STS-B"), ["paper", "status"]].tolist() == [78.95, "not run"]
    assert len(same) == len(read_paper("a1_sts_llama2_7b"))
    for table, status in ((beside("smollm2"), "other model"), (beside(LLAMA, True), "sample data")):
        assert table.loc[measured, "status"].tolist() == [status] * 2
        assert table.loc[("ke", True, "STS12"), "status"] == "not run"
    with pytest.raises(ValueError, match="a1_sts_llama2_7b"):
        read_paper("nothing")
    with pytest.raises(ValueError):
        beside_paper(ours, "a4_cost", LLAMA, False)  # it has several metrics, and ours says none


@pytest.mark.parametrize("metric, table", {
    "spearman_x100": "a1_sts_llama2_7b", "accuracy_x100": "a3_transfer_llama2_7b", "time_ratio": "a4_cost",
    "extra_tokens": "a4_cost", "mteb_score": "a5_ablations"}.items())
def test_there_is_one_tolerance_a_metric_wherever_a_number_is_compared(metric, table):
    published = read_paper(table).query("metric == @metric and method == 'prompteol' and tp and variant == ''").iloc[:1]
    for off, expected in ((0.9, "reproduced"), (1.1, "differs")) if TOLERANCE[metric] else ((0, "reproduced"),):
        ours = published.assign(value=published["value"] + off * TOLERANCE[metric])
        beside = beside_paper(ours[["method", "tp", "task", "metric", "value"]], table, LLAMA, False).dropna()
        compared = comparison(beside.assign(profile="p"), NONE).query("table == @table").dropna(subset="ours")
        assert beside["status"].tolist() == compared["status"].tolist() == [expected]
        assert compared["metric"].item() == metric


def measured(off: float, **changes) -> pd.DataFrame:
    """One number of Table 1, this far from the published one."""
    row = read_paper("a1_sts_llama2_7b").query("method == 'prompteol' and tp and task == 'STS-B'").iloc[0]
    return pd.DataFrame([{**row[KEYS], "ours": row["value"] + off, "status": "", "profile": "llama2-7b"} | changes])


def test_an_explanation_fits_what_it_names_and_without_measurements_every_number_says_why():
    def status(explanations):
        table = comparison(measured(-0.6), explanations).dropna(subset="ours")
        return table.loc[table["table"] == "a1_sts_llama2_7b", "status"].item()
    reason = {key: "" for key in NONE} | {"model": "llama2-7b", "tp": "true", "explanation": "another tokenizer"}
    assert status(NONE) == "differs" == status(pd.DataFrame([reason | {"task": "STS12"}]))
    assert status(pd.DataFrame([reason])) == "explained: another tokenizer"
    for nothing in (measured(0)[:0], measured(-9, status="other model"), measured(-9, status="sample data")):
        table = comparison(nothing, NONE)
        assert len(table) > 400 and table["status"].str.startswith("not run: ").all()
        assert table["status"].str.contains("./run_all.sh llama2-7b").any()


def test_the_command_fails_on_a_difference_alone(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(paper, "FIGURES", tmp_path)
    monkeypatch.setattr("sys.argv", ["paper"])
    assert paper.main() == 0 and " not run" in capsys.readouterr().out
    (tmp_path / "llama2-7b").mkdir()
    measured(-5).drop(columns="profile").to_csv(tmp_path / "llama2-7b" / "sts_beside_paper.csv", index=False)
    monkeypatch.setattr("sys.argv", ["paper", "--measured"])
    assert paper.main() == 1
    printed = capsys.readouterr().out
    assert "1 differs" in printed and printed.count("| a1_sts") == 1


@pytest.mark.parametrize("hub, profile", PAPER_MODELS.items())
def test_every_model_of_the_paper_has_a_table_a_profile_and_settings(hub, profile):
    assert profile in set(read_paper(sts_table(hub))["model"]) and sts_table("smollm2") == "a1_sts_llama2_7b"
    parameters, settings = yaml.safe_load((ROOT / "configs" / f"{profile}.yaml").read_text()), load_settings(hub)
    assert parameters["parameters"]["model"] == hub
    assert all(s.method.start == 1 and s.method.end < s.exit_layer for s in settings.values())
    assert {*parameters["notebooks"]["01_sts_eval"]["prompts"]} <= settings.keys()


def test_the_number_that_a_laptop_can_reproduce(tmp_path):
    """OPT under its demonstration, at the last layer, read from a folder as from the hub; beside the published one."""
    published = beside_paper(ICL.assign(value=67.3), sts_table("facebook/opt-125m"), "facebook/opt-125m", False)
    assert published["status"].tolist() == ["reproduced"]
    tiny = tiny_backbone("opt")
    for part in (tiny.model, tiny.tokenizer):
        part.save_pretrained(tmp_path)
    backbone = load_backbone(str(tmp_path), "float32")
    text = get_prompt("icl").templates[0].replace("{sentence}", "A dog runs.")
    ids = backbone.tokenizer(text, return_tensors="pt")["input_ids"]
    expected = backbone.model(ids, output_hidden_states=True).hidden_states[-1][0, -1].detach().numpy()
    np.testing.assert_allclose(SentenceEncoder(backbone, "icl").encode("A dog runs"), expected, atol=1e-5)


README = (ROOT / "README.md").read_text()
NAMED = r"`((?:lib|configs|data|notebooks|figures|benchmarks|tests)/[\w./-]+)`"

# A table whose numbers come from files says so: <!-- numbers: figures/default/a.csv figures/default/b.csv -->
TABLES = re.findall(r"<!-- numbers: (.+?) -->\n+((?:\|.*\n)+)", README)


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


def test_it_opens_with_figure_and_table_and_the_two_commands_and_its_matrix_of_releases_is_what_the_script_wrote():
    before, _, after = README.partition("\n## ")
    assert "![" in before and TABLES and TABLES[0][1] in before
    assert re.findall(r"^    (\./\S+)", after, re.M)[:2] == ["./run_all.sh", "./run_tests.sh"]
    assert "| family |" not in README or (ROOT / "figures" / "transformers_matrix.md").read_text().strip() in README


@pytest.mark.parametrize("files, table", TABLES, ids=[files.split("/")[-1] for files, _ in TABLES])
def test_the_numbers_of_a_table_are_those_of_its_files(files, table):
    """Every number with a decimal point stands, rounded, in a row of the files that holds the name in the first cell;
    what stands in the cell after a comma or in brackets only explains the name."""
    frames = [pd.read_csv(ROOT / file) for file in files.split()]
    for line in table.splitlines()[2:]:
        name, *cells = [cell.strip(" *") for cell in line.strip("|").split("|")]
        name = re.split(r", | \(", name)[0]
        rows = [row for frame in frames for row in frame.itertuples(index=False)]
        rows = [row for row in rows if any(isinstance(v, str) and name in (v, label(v)) for v in row)]
        values = [value for row in rows for value in row if isinstance(value, float)]
        for number in re.findall(r"[-+]?\d+\.\d+", " ".join(cells)):
            limit = 0.5 * 10 ** -len(number.partition(".")[2]) + 1e-9
            near = [value for value in values if abs(value - float(number)) <= limit]
            assert near, f"{name}: {number} is in none of {files}"
