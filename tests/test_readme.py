"""What the README shows works as it stands there, and its numbers are those of the published tables."""

import re

import pandas as pd
import pytest

from lib.core.store import ROOT
from lib.report.figures import label

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

