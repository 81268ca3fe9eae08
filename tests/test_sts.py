"""STS similarities and scores, by hand and against scipy."""

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset
from scipy.stats import spearmanr
from tiny_models import tiny_backbone

from lib.core.encoder import SentenceEncoder
from lib.data.sources import EvaluationData
from lib.evaluation.intervals import SPEARMAN, compare
from lib.evaluation.sts import cosine, spearman, sts_pairs, sts_scores
from lib.evaluation.tasks import STS


def pairs_table(seed=0, sizes=(("A", "x", 30), ("A", "y", 20), ("B", "z", 40))):
    generator = np.random.default_rng(seed)
    tables = []
    for task, subset, size in sizes:
        gold = np.round(generator.uniform(0, 5, size), 1)
        similarity = gold + generator.normal(size=size)
        tables.append(pd.DataFrame({"task": task, "subset": subset, "gold": gold, "similarity": similarity}))
    table = pd.concat(tables, ignore_index=True).assign(layer=3)
    return table.assign(item=table.groupby("task").cumcount())


def data_of(name: str, *rows) -> EvaluationData:
    columns = ("subset", "sentence1", "sentence2", "score")
    return EvaluationData(name, Dataset.from_list([dict(zip(columns, row)) for row in rows]), {})


DATA = {
    "one": data_of("one", ("x", "A dog.", "A cat.", 3.0), ("y", "The man", "A man", 4.5), ("y", "No.", "A dog.", 0.0)),
    "two": data_of("two", ("z", "A flute", "A flute", 5.0), ("z", "A cat.", "It is cold.", 1.0)),
}


def test_cosine():
    a = np.array([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]], np.float32)
    b = np.array([[0.0, 2.0], [3.0, 3.0], [1.0, 0.0]], np.float32)
    assert cosine(a, b) == pytest.approx([0.0, 1.0, 0.0])


def test_spearman_by_hand():
    # Ranks 1 2 3 4 against 1 3 2 4: rho = 1 - 6 * (0 + 1 + 1 + 0) / (4 * 15) = 0.8
    assert spearman([1, 2, 3, 4], [0.1, 0.5, 0.3, 0.9]) == pytest.approx(80.0)


def test_pairs_at_several_layers_are_those_of_their_embeddings(one_thread):
    encoder = SentenceEncoder(tiny_backbone(), "prompteol", None, 2)
    table = sts_pairs(encoder, DATA, [1, -1])
    assert list(table.columns) == ["task", "subset", "item", "gold", "layer", "similarity"]
    assert table["layer"].tolist() == [1] * 5 + [4] * 5 and table["item"].tolist() == [0, 1, 2, 0, 1] * 2
    assert table["task"].tolist()[:5] == ["one"] * 3 + ["two"] * 2 and table["subset"].tolist()[:5] == list("xyyzz")
    assert table["gold"].tolist()[:5] == [3.0, 4.5, 0.0, 5.0, 1.0]
    sentences = [pair for data in DATA.values() for pair in zip(data["sentence1"], data["sentence2"])]
    for layer, of_layer in table.groupby("layer"):
        at = SentenceEncoder(tiny_backbone(), "prompteol", None, layer)
        for row, pair in zip(of_layer.itertuples(), sentences):
            a, b = at.encode(list(pair)).astype(float)
            assert row.similarity == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-5)
    own = sts_pairs(encoder, DATA)
    assert set(own["layer"]) == {2} and own["similarity"].iloc[3] == pytest.approx(1)  # a sentence and itself
    alone = STS["STS13"].items(encoder, {"two": DATA["two"]}, [2])
    np.testing.assert_allclose(alone["similarity"], own["similarity"][3:], atol=1e-6)


def test_all_is_one_correlation_over_the_subsets_and_not_their_mean():
    pairs = pairs_table()
    table = sts_scores(pairs).set_index(["task", "subset"])
    of_a, scores = pairs[pairs["task"] == "A"], table["score"]
    assert scores["A", "all"] == pytest.approx(100 * spearmanr(of_a["gold"], of_a["similarity"]).statistic)
    assert scores["A", "all"] != pytest.approx((scores["A", "x"] + scores["A", "y"]) / 2, abs=1e-3)
    counts = {("A", "all"): 50, ("B", "all"): 40, ("A", "x"): 30, ("A", "y"): 20, ("B", "z"): 40}
    assert table["pairs"].to_dict() == counts


def test_scores_and_comparisons_agree_at_every_layer():
    layers = {layer: pairs_table().assign(layer=layer, similarity=pairs_table(layer)["similarity"]) for layer in (3, 9)}
    table = pd.concat(layers.values())
    scores = sts_scores(table).query("subset == 'all'").set_index(["layer", "task"])["score"]
    compared = compare(layers, SPEARMAN, draws=0).set_index(["run", "task"])["value"]
    assert compared.drop("Avg", level="task").to_dict() == pytest.approx(scores.to_dict())
    assert compared[9, "Avg"] == pytest.approx(scores[9].mean())
