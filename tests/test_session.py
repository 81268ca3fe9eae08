"""What a notebook talks to: stored results, tables, one provenance file, settings, the runner's context.
And figures: points, intervals and names stand where the table says, and nothing is clipped or left behind."""

import json
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from datasets import Dataset
from matplotlib.colors import to_hex
from matplotlib.text import Text
from tiny_models import tiny_backbone

from lib.core import processes
from lib.data import sources
from lib.data.sources import DataSource, EvaluationData
from lib.report import figures_special as special
from lib.report import results, session, settings
from lib.report.figures import COLOURS, bands, bars, dots, heat_maps, set_style
from lib.report.settings import load_settings, save_settings
from lib.studies.key_tokens import SHARES


@pytest.fixture(autouse=True)
def _style():
    with plt.rc_context():
        set_style()
        yield
    assert plt.get_fignums() == []


@pytest.fixture
def shown(tmp_path, monkeypatch):
    """The model is tiny, and everything is written below tmp_path; gives what was displayed."""
    displayed = []
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(session, "FIGURES", tmp_path / "figures")
    monkeypatch.setattr(settings, "FOLDER", tmp_path / "configs")
    monkeypatch.setattr(settings, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(session, "load_backbone", lambda model, dtype, device_map: tiny_backbone())
    monkeypatch.setattr(sources, "find_source", lambda: DataSource("sample", tmp_path))
    monkeypatch.setattr(session, "display", displayed.append)
    return displayed


def start(notebook="01", model="tiny-llama", **context):
    return session.start(notebook, "smoke", model, "float32", context)


def items(count, **columns):
    texts = [" ".join(["A dog."] * (i % 7 + 1)) for i in range(count)]
    rows = Dataset.from_dict({"sentence1": texts, "sentence2": texts[::-1], **columns})
    files = {f"{number}.txt": "f" * 64 for number in range(4)}
    return EvaluationData("toy", rows, {"split": "test", "source": {"kind": "sample"}, "rows": count, "files": files})


@pytest.fixture
def pairs():
    return {name: items(4, subset=["s"] * 4, score=[1.0, 2.0, 3.0, 4.0]) for name in ("one", "two")}


def provenance(tmp_path):
    return json.loads((tmp_path / "figures" / "smoke" / "provenance.json").read_text())


def test_every_task_is_a_result_and_the_context_reaches_whom_it_concerns(tmp_path, shown, pairs, monkeypatch):
    log, told = tmp_path / "log", []
    monkeypatch.setattr(processes, "join", told.append)
    monkeypatch.setattr(sources, "hub_unreachable", None)
    for context in ({"meeting": "/a/file"}, {"log": str(log)}, {"log": str(log), "fresh_since": 9e9}):
        run = start(**context, hub_unreachable="no route")
        table = run.sts(run.encoder(store=None), pairs, [-1, 4, 0])
        assert table["layer"].unique().tolist() == [0, 4] and len(table) == 16
    assert told == ["/a/file"] and sources.hub_unreachable == "no route" and run.store.fresh_since == 9e9
    data = {"MR": items(40, split=["all"] * 40, label=[0, 1] * 20)}
    assert set(run.transfer(run.encoder(exit_layer=2, store=None), data)["layer"]) == {2}
    logged = [(entry["name"], entry["reused"]) for entry in map(json.loads, log.read_text().splitlines())]
    names = ["sts-one", "sts-two"]
    assert logged == [(name, reused) for reused in (True, False) for name in names] + [("transfer-MR", False)]


def test_a_number_carries_all_that_it_hangs_on(tmp_path, shown, pairs):
    (folder := tmp_path / "models" / "tiny").mkdir(parents=True)
    run = start(model=str(folder), parameters={"draws": 10})
    encoder = run.encoder(store=None)
    run.show(run.sts(encoder, {"one": pairs["one"]}), "scores", "STS")
    run.note("an example", encoder=encoder, texts=["A text."])
    run.show(pd.DataFrame({"a": [1]}), "example", "An example")
    section = provenance(tmp_path)["01"]
    def whole(value):
        if isinstance(value, list):
            return [whole(item) for item in value]
        value = section["shared"].get(value, value) if isinstance(value, str) else value
        return {key: whole(item) for key, item in value.items()} if isinstance(value, dict) else value
    result, example = whole(section["results"])
    own, model = encoder.describe(), run.backbone.describe()
    expected = {"model": model} | {key: value for key, value in own.items() if key not in model}
    assert result["encoder"] == example["encoder"] == expected and model["dtype"] == "float32"
    data = result["data"]["one"]
    assert data["rows"] == 4 and data["files"]["0.txt"] == "f" * 64 and data["source"] == {"kind": "sample"}
    assert result["layers"] == [4] and result["seconds"] >= 0
    assert {"packages", "git_commit", "git_dirty", "python"} <= result["environment"].keys()
    assert whole(section["about"])["parameters"] == {
        "profile": "smoke", "model": "tiny", "dtype": "float32", "draws": 10}
    assert [artefact["results_read"] for artefact in section["artefacts"].values()] == [1, 2]
    assert str(tmp_path) not in json.dumps(section)


def test_a_notebook_replaces_its_own_section_and_no_other(tmp_path, shown):
    for notebook, name in (("01", "a"), ("02", "b"), ("01", "c")):
        start(notebook).show(pd.DataFrame({"a": [1]}), name, "A table.")
    whole = provenance(tmp_path)
    assert [list(whole[notebook]["artefacts"]) for notebook in ("01", "02")] == [["c.csv"], ["b.csv"]]
    caption = "A table. tiny-llama, float32; sample data (written for this project)"
    assert whole["02"]["artefacts"]["b.csv"]["caption"] == caption


def test_a_long_table_is_displayed_as_a_digest(tmp_path, shown):
    run, table = start(), pd.DataFrame({"n": range(100), "third": 1 / 3})
    folder = tmp_path / "figures" / "smoke"
    run.show(table, "long", "Long")
    run.show(table, "part", "Part", 3, "n > 97")
    run.show(table.head(2).set_index("n"), "short", "Short")
    assert len(pd.read_csv(folder / "long.csv")) == 100 and (folder / "long.md").read_text().count("\n|") == 102
    counts = [displayed.data.count("\n|") - 2 for displayed in shown]
    assert counts == [40, 2, 2] and ["csv" in displayed.data for displayed in shown] == [True, True, False]
    assert "|  99 |   0.333 |" in shown[1].data and "|   1 |    0.33 |" in (folder / "short.md").read_text()
    with pytest.raises(TypeError, match="neither"):
        run.show([1], "list", "A list")


def test_a_table_to_read_is_rounded_from_the_numbers_of_its_csv(tmp_path, shown):
    start().show(pd.DataFrame({"a": [3.4499999999]}), "near", "Near a half", 1)
    read, stored = ((tmp_path / "figures" / "smoke" / f"near.{end}").read_text() for end in ("md", "csv"))
    assert "3.450000" in stored and "3.5" in read  # so that nobody who rounds the CSV finds 3.5 where this has 3.4


def test_a_caption_says_how_wide_intervals_are_beside_those_of_complete_data(tmp_path, shown):
    run, lows = start(), [2.0, 1.0, None, 1.0, 1.0, 1.0]  # the last three rows have no width
    table = pd.DataFrame({"value": 3.0, "low": lows, "high": [4.0, 5.0, *lows[2:]]})
    run.show(table, "scores", "Scores")  # nothing to compare with
    (tmp_path / "figures" / "smoke").rename(tmp_path / "figures" / "full-smoke")
    run.show(table.assign(high=[8.0, 7.0, *lows[2:]]), "scores", "Scores")
    run.show(table[["value"]], "values", "No intervals")
    said = [entry["caption"].partition("data")[2] for entry in provenance(tmp_path)["01"]["artefacts"].values()]
    assert ["times" in displayed.data for displayed in shown] == [False, True, False]
    assert said[0].endswith("; intervals 2.0 times as wide as in figures/full-smoke") and "times" not in said[1]


def test_settings_from_sample_data_never_leave_the_run(tmp_path, shown):
    chosen = {"start": 1, "end": 2, "exit": 3}
    with pytest.raises(FileNotFoundError, match="python -m lib.studies.layers tiny-llama"):
        start().settings  # noqa: B018
    save_settings("org/model", {"cot": chosen, "ke": chosen}, {"chosen_by": "real data"})
    before = (tmp_path / "configs" / "org--model.yaml").read_bytes()
    path = save_settings("org/model", {"cot": chosen | {"exit": 1}, "new": chosen}, {}, sample=True, profile="smoke")
    assert path == tmp_path / "runs" / "smoke" / "settings" / "org--model.yaml"
    assert (tmp_path / "configs" / "org--model.yaml").read_bytes() == before
    real, sample = load_settings("org/model", False, "smoke"), load_settings("org/model", True, "smoke")
    assert {name: s.exit_layer for name, s in real.items()} == {"cot": 3, "ke": 3}
    assert {name: s.exit_layer for name, s in sample.items()} == {"cot": 1, "ke": 3, "new": 3}
    assert load_settings("org/model", True, "default") == real
    save_settings("tiny-llama", {"ke": chosen}, {}, sample=True, profile="smoke")
    assert list(start().settings) == ["ke"]


TITLE = "The finding, so long that it needs more than one line above the panels; and about a text that costs $5 or 雪"
TEXTS = {"title": TITLE, "xlabel": "Spearman x 100"}
TASKS = ["STS12", "STS13", "STS14", "STS15", "STS16", "STS-B", "SICK-R", "Avg"]
PROMPTS = ["none", "prompteol", "cot", "ke", "ck", "metaeol"]


def every(value="value", **columns):
    """A row for each combination of the columns' values, with a random value and its interval."""
    table = pd.MultiIndex.from_product(columns.values(), names=columns).to_frame(index=False)
    table[value] = np.random.default_rng(0).normal(0, 5, len(table)).round(2)
    low, high = ("low", "high") if value == "value" else (f"{value}_low", f"{value}_high")
    return table.assign(**{low: table[value] - 2, high: table[value] + 2})


def clouds(axis):
    return [of for of in axis.collections if hasattr(of, "get_sizes") and len(of.get_offsets())]


def texts(found):
    return [text.get_text() for text in found]


def test_dots_stand_where_the_table_says_with_their_intervals():
    table = every(prompt=PROMPTS, variant=["baseline", "TP"], task=TASKS)
    figure = dots(table, hue="variant", panel="task", **TEXTS)
    assert [axis.get_title() for axis in figure.axes] == TASKS and texts(figure.legends[0].texts) == ["baseline", "TP"]
    for axis in figure.axes:
        of = table[table["task"] == axis.get_title()]
        found = {(PROMPTS[round(y)], round(x, 6)) for cloud in clouds(axis) for x, y in cloud.get_offsets()}
        assert found == set(zip(of["prompt"], of["value"]))
        lines = [line for cloud in axis.collections if hasattr(cloud, "get_segments") for line in cloud.get_segments()]
        assert {tuple(line[:, 0].round(6)) for line in lines} == set(zip(of["low"].round(6), of["high"].round(6)))


def test_colours_tell_the_sign_where_the_value_s_own_interval_does_not_hold_0():
    table = every("difference", prompt=["a", "b", "c"]).assign(difference=[3, -3, 1], low=7, high=8)
    table[["difference_low", "difference_high"]] = [[1, 5], [-5, -1], [-1, 3]]
    figure = dots(table, "difference", signed=("TP better", "TP worse"), zero=0, **TEXTS)
    [cloud] = clouds(figure.axes[0])
    assert [to_hex(of).upper() for of in cloud.get_facecolors()] == [COLOURS["blue"], COLOURS["vermilion"], "#808080"]
    assert texts(figure.legends[0].texts) == ["TP better", "TP worse", "interval includes 0"]


def test_crosses_and_headings():
    table = every(family=["first"], method=["mean", "none + TP"], instruction=["none", "fitting"])
    paper = pd.DataFrame({"family": "first", "method": ["mean", "other"], "instruction": "none", "value": [7.5, 9.0]})
    extras = {"group": "family", "crosses": {"paper": paper}}
    [axis] = (figure := dots(table, row="method", hue="instruction", **extras, **TEXTS)).axes
    assert texts(figure.legends[0].texts) == ["none", "fitting", "paper"]  # "none" is no prompt here
    assert texts(axis.get_yticklabels()) == ["first", "mean, no prompt", "no prompt + TP"]
    [crosses] = [cloud.get_offsets() for cloud in clouds(axis) if 7.5 in cloud.get_offsets()]
    assert crosses.shape == (1, 2) and round(crosses[0, 1]) == 1


@pytest.mark.parametrize("by", ["panel", "panel_row"])
def test_bands_have_lines_levels_marks_and_rings(by):
    table = every(end=[2, 4, 8], measure=["accuracy", "Spearman"], variant=["baseline", "TP"]).iloc[::-1]
    extras = {"ring": "best", "levels": {"without": {"accuracy": 1.5}}, "marks": {"chosen": 4}, by: "measure"}
    figure = bands(table, "end", hue="variant", **extras, **TEXTS)
    assert texts(figure.legends[0].texts) == ["TP", "baseline", "without", "best"]
    for axis, measure in zip(figure.axes, ["Spearman", "accuracy"]):
        of = table[(table["measure"] == measure) & (table["variant"] == "TP")].sort_values("end")
        assert any(np.array_equal(line.get_xydata(), of[["end", "value"]]) for line in axis.lines)
        assert [1.5, 1.5] in [list(line.get_ydata()) for line in axis.lines] or measure == "Spearman"
        assert [4, 4] in [list(line.get_xdata()) for line in axis.lines]
        assert of["value"].max() in [cloud.get_offsets()[0, 1] for cloud in clouds(axis)]
        assert any(of["high"].max() in band.get_paths()[0].vertices for band in axis.collections)


def test_stacked_bars_follow_one_another_and_show_their_values():
    table = every(run=["a", "b"], group=["x", "y"]).assign(value=[60, 40, 98, 2])
    [axis] = bars(table, "value", "run", "group", stacked=True, digits=0, **TEXTS).axes
    found = {(round(bar.get_y() + bar.get_height() / 2), bar.get_x(), bar.get_width()) for bar in axis.patches}
    assert found == {(0, 0, 60), (0, 60, 40), (1, 0, 98), (1, 98, 2)}
    assert sorted(texts(axis.texts)) == ["", "40", "60", "98"]


def test_heat_maps_put_each_number_and_the_frame_in_their_place():
    table = every(prompt=["cot", "ke"], exit_layer=range(20, 25), start=[0, 1, 2], end=[1, 3]).query("start < end")
    figure = heat_maps(table, "end", "start", "value", "exit_layer", "prompt", ylabel="start", label="change", **TEXTS)
    shown = [axis for axis in figure.axes if axis.texts]
    assert [len(shown), shown[1].get_title(), shown[0].get_ylabel()] == [10, "KE", "exit layer 20"]
    first = table.query("prompt == 'cot' and exit_layer == 20").set_index(["start", "end"])["value"]
    written = {text.get_position(): text.get_text() for text in shown[0].texts}
    assert written == {(x + 0.5, y + 0.5): f"{first[y, [1, 3][x]]:z.0f}" for x, y in ((0, 0), (1, 0), (1, 1), (1, 2))}
    x, y = shown[0].patches[0].get_xy()
    assert first[y, [1, 3][x]] == first.max()
    assert shown[0].collections[0].get_clim() == shown[9].collections[0].get_clim()
    axis, _ = heat_maps(every(x=[1, 2], y=["b", "a"]), "x", "y", "value", label="a", signed=False, **TEXTS).axes
    assert texts(axis.get_yticklabels()) == ["b", "a"] and not axis.patches


TOKENS = ["␣apple", "$5", "$a^$", "雪", "\\n", "<|im_end|>", "x_2^", "é\x00"]
ROWS = pd.DataFrame({"token": TOKENS, "logit": range(8, 0, -1), "in_text": [True, False] * 4, "component": range(1, 9)})
ROWS = ROWS.assign(gold=ROWS["logit"] / 2, similarity=0.5, variation=-9.0, deviation=3, **dict.fromkeys(SHARES, 0.4))
COST = every("score", method=["mean", "prompteol", "cot", "ke"], variant=["baseline, exit layer", "TP, exit layer"])
COST = COST.assign(score=5 + COST.index / 20, low=1, high=10, front=COST.index < 3, cost=[1, 1.01, 1.02, 1.03] * 2)
COST["lower quartile"] = COST["upper quartile"] = COST["cost"]
LONG = [f"{prompt}: {variant}, exit layer" for prompt in ("prompteol", "cot") for variant in ("baseline", "TP")]
PAIRS = every("cosine", method=["bare text, mean", "prompteol"], kind=["paraphrase", "topic shift"], pair=range(9))
BLOCKS = every("share", variant=["TP", "never written"], block=range(12), token=range(5)).assign(text="$word")
CHANGES = every(family=["place", "vector"], run=[f"a rather long label, {i}" for i in range(30)], prompt=["cot", "ke"])
LAYERS = every(layer=range(31), run=["baseline", "TP", "TP 1 to 7"], prompt=PROMPTS[1:4], metric=["Hit@10", "LAR"])
DRAWN = {
    "dots": partial(dots, every(task=TASKS, prompt=PROMPTS, group=["TP", "b"]), hue="group", panel="task", **TEXTS),
    "tall": partial(dots, CHANGES, row="run", group="family", panel="prompt", hue="prompt", **TEXTS),
    "bands": partial(bands, LAYERS, "layer", hue="run", panel="prompt", panel_row="metric", **TEXTS),
    "logs": partial(bands, COST, "cost", "high", hue="variant", hollow="front", log=("x", "y"), points=True, **TEXTS),
    "diagram": partial(special.placeholder_diagram, TOKENS * 2, 3, 1, 7, 9, 28),
    "tokens": partial(special.token_bars, dict.fromkeys(LONG + TASKS, ROWS), TITLE),
    "parts": partial(special.token_bars, {"prompteol + TP": ROWS.assign(along=9.0, rest=-2.0)}, TITLE),
    "gold": partial(special.similarity_against_gold, dict.fromkeys(LONG, ROWS), TITLE),
    "kinds": partial(special.similarity_by_kind, PAIRS.assign(overlap=PAIRS["cosine"].abs()), TITLE),
    "stems": partial(special.variation_stems, dict.fromkeys(LONG, ROWS), TITLE),
    "attention": partial(special.attention_map, BLOCKS.query("variant == 'TP'"), BLOCKS.query("token == 0"), TITLE),
    "pareto": partial(special.pareto, COST, ylabel="Spearman x 100", **TEXTS)}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", DRAWN)
def test_nothing_is_clipped_or_overlaps(name):
    figure = DRAWN[name]()
    figure.draw_without_rendering()
    head, key = figure._suptitle.get_window_extent(), figure.legends[0].get_window_extent()
    panels = [axis.get_tightbbox() for axis in figure.axes]
    titles = [axis.title.get_window_extent() for axis in figure.axes if axis.get_title()]
    names = [Text.get_window_extent(text) for axis in figure.axes for text in axis.texts if name == "pareto"]
    for box in [head, key, *panels]:
        assert min(box.x0, box.y0) > -2 and box.x1 < figure.bbox.x1 + 2 and box.y1 < figure.bbox.y1 + 2
    assert figure.bbox.width == 1350 and head.x0 < 20 and head.y0 > key.y1 and len({b.x1 // 99 for b in panels}) <= 4
    assert max(box.y1 for box in panels) < key.y0 + 2
    assert all(box.count_overlaps(boxes) == 1 for boxes in (titles, names) for box in boxes)
