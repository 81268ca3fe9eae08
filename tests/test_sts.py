"""STS similarities and scores, by hand and against scipy."""

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset
from tiny_models import tiny_backbone

from lib.core.encoder import SentenceEncoder
from lib.data.sources import EvaluationData
from lib.evaluation.intervals import SPEARMAN, compare
from lib.evaluation.sts import cosine, sts_pairs, sts_scores


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


def test_pairs_at_several_layers_are_those_of_their_embeddings(one_thread):
    encoder = SentenceEncoder(tiny_backbone(), "prompteol", None, 2)
    table = sts_pairs(encoder, DATA, [1, -1])
    assert list(table.columns) == ["task", "subset", "item", "gold", "layer", "similarity"]
    rows = [(name, *row.values()) for name, data in DATA.items() for row in data.rows] * 2
    assert list(zip(table["task"], table["subset"], table["gold"])) == [(row[0], row[1], row[4]) for row in rows]
    assert table["layer"].tolist() == [1] * 5 + [4] * 5 and table["item"].tolist() == [0, 1, 2, 0, 1] * 2
    at = {layer: SentenceEncoder(tiny_backbone(), "prompteol", None, layer) for layer in (1, 4)}
    for row, (_, _, *pair, _) in zip(table.itertuples(), rows):
        a, b = at[row.layer].encode(pair).astype(float)
        assert row.similarity == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-5)
    own = sts_pairs(encoder, DATA)
    assert set(own["layer"]) == {2} and own["similarity"].iloc[3] == pytest.approx(1)  # a sentence and itself


def test_scores_by_hand_and_all_is_one_correlation_over_the_subsets_and_not_their_mean():
    generator = np.random.default_rng(0)
    layers = {layer: pd.DataFrame({
        "task": ["A"] * 50 + ["B"] * 44, "subset": ["x"] * 30 + ["y"] * 20 + ["z"] * 40 + ["four"] * 4, "layer": layer,
        "item": [*range(50), *range(44)], "gold": [*np.random.default_rng(1).integers(0, 6, 90), 1, 2, 3, 4],
        "similarity": [*generator.normal(size=90), 0.1, 0.5, 0.3, 0.9],
    }) for layer in (3, 9)}
    table = sts_scores(pd.concat(layers.values())).set_index(["layer", "task", "subset"]).sort_index()
    # Ranks 1 2 3 4 against 1 3 2 4: rho = 1 - 6 * (0 + 1 + 1 + 0) / (4 * 15) = 0.8
    assert table.loc[(3, "B", "four"), "score"] == pytest.approx(80)
    counts = {("A", "all"): 50, ("B", "all"): 44, ("A", "x"): 30, ("A", "y"): 20, ("B", "z"): 40, ("B", "four"): 4}
    assert table.loc[9, "pairs"].to_dict() == counts
    of_a = table.loc[(3, "A"), "score"]
    assert of_a["all"] != pytest.approx((of_a["x"] + of_a["y"]) / 2, abs=1e-3)
    compared = compare(layers, SPEARMAN, draws=0).set_index(["run", "task"])["value"]
    scores = table.xs("all", level="subset")["score"]
    assert compared.drop("Avg", level="task").to_dict() == pytest.approx(scores.to_dict())
