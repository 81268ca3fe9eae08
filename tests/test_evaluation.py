"""Scores of STS, transfer and retrieval and their intervals: by hand, against scipy, scikit-learn, SentEval's loss."""

from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from scipy.optimize import minimize
from scipy.special import logsumexp
from scipy.stats import spearmanr
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold
from tiny_models import tiny_backbone

from lib import SentenceEncoder, TokenPrepending
from lib.data.sources import DATA, DataSource, EvaluationData
from lib.data.transfer import load_transfer
from lib.evaluation import intervals, retrieval, transfer
from lib.evaluation.intervals import SPEARMAN, Statistic, area_under_roc, compare, distinct_share, mean_of
from lib.evaluation.retrieval import BM25Retriever, DenseRetriever, evaluate_retrieval
from lib.evaluation.sts import cosine, spearman, sts_pairs, word_overlap
from lib.evaluation.transfer import STRENGTHS, classify, pair_f1, pair_features, transfer_predictions

SAMPLE = DataSource("sample", DATA / "sample")
QRELS_BY_HAND, BEST = {"q": {"d1": 2, "d3": 1, "d9": 1, "d4": 0}}, 2 + 1 / np.log2(3) + 1 / 2


def data_of(name: str, *rows) -> EvaluationData:
    columns = ("subset", "sentence1", "sentence2", "score")
    return EvaluationData(name, Dataset.from_list([dict(zip(columns, row)) for row in rows]), {})


PAIRS = {
    "one": data_of("one", ("x", "A dog.", "A cat.", 3.0), ("y", "The man", "A man", 4.5), ("y", "No.", "A dog.", 0.0)),
    "two": data_of("two", ("z", "A flute", "A flute", 5.0), ("z", "A cat.", "It is cold.", 1.0))}


def test_pairs_at_several_layers_are_those_of_their_embeddings():
    encoder = SentenceEncoder(tiny_backbone(), "prompteol", None, 2)
    table = sts_pairs(encoder, PAIRS, [1, -1])
    assert list(table.columns) == ["task", "subset", "item", "gold", "layer", "similarity"]
    rows = [(name, *row.values()) for name, data in PAIRS.items() for row in data.rows] * 2
    assert list(zip(table["task"], table["subset"], table["gold"])) == [(row[0], row[1], row[4]) for row in rows]
    assert table["layer"].tolist() == [1] * 5 + [4] * 5 and table["item"].tolist() == [0, 1, 2, 0, 1] * 2
    for row, (_, _, *pair, _) in zip(table.itertuples(), rows):
        a, b = encoder.changed(exit_layer=row.layer).encode(pair).astype(float)
        assert row.similarity == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-5)
    own = sts_pairs(encoder, PAIRS)
    assert set(own["layer"]) == {2} and own["similarity"].iloc[3] == pytest.approx(1)  # a sentence and itself
    assert cosine(np.eye(2), np.array([[0, 2], [0, 0]])).tolist() == [0, 0]


def test_word_overlap_by_hand_in_the_columns_of_sts_pairs():
    rows = ("A dog, a cat!", "the DOG", 3.0), ("It's late.", "it's LATE", 2.5), ("...", "?", 0.0), ("No", "", 1.0)
    data = {"made": data_of("made", *(("x", *row) for row in rows))} | PAIRS
    table, own = word_overlap(data), sts_pairs(SentenceEncoder(tiny_backbone()), data)
    assert table["similarity"].tolist()[:5] == [1 / 4, 1, 0, 0, 1 / 3] and set(table["layer"]) == {"none"}
    assert list(table) == list(own) and table[list(table)[:4]].equals(own[list(table)[:4]])


def test_scores_by_hand_and_a_task_s_is_one_correlation_over_its_subsets_and_not_their_mean():
    # Ranks 1 2 3 4 against 1 3 2 4: rho = 1 - 6 * (0 + 1 + 1 + 0) / (4 * 15) = 0.8
    assert spearman([1, 2, 3, 4], [0.1, 0.5, 0.3, 0.9]) == pytest.approx(80)
    runs = {noise: run(noise).assign(subset=["x"] * 30 + ["y"] * 20 + ["z"] * 40) for noise in (3, 9)}
    found = compare(runs, SPEARMAN, draws=0).set_index(["run", "task"])["value"].drop("Avg", level="task")
    scores = {(key, *of): spearman(rows["gold"], rows["similarity"]) for key, table in runs.items()
              for by in (["task"], ["task", "subset"]) for of, rows in table.groupby(by)}
    assert all(value == pytest.approx(scores[key]) for key, value in found.items()) and len(found) == 4
    assert found[3, "A"] != pytest.approx((scores[3, "A", "x"] + scores[3, "A", "y"]) / 2, abs=1e-3)


def blobs(count, width=12, classes=2, distance=1.0, scale=1.0, seed=0):
    """Classes as overlapping clouds, with features of different size around a far centre, as in a language model."""
    generator = np.random.default_rng(seed)
    centres = distance * generator.normal(size=(classes, width)) / np.sqrt(width)
    labels, sizes = generator.integers(0, classes, count), np.exp(0.5 * generator.normal(size=width))
    features = (centres[labels] + generator.normal(size=(count, width))) * sizes + 5
    return (scale * features).astype(np.float32), labels


def parts(**counts):
    return np.repeat(list(counts), list(counts.values()))


def by_hand(features, labels, fit, test, strength):
    """Predictions of plain scikit-learn on features of one size, brought to the very minimum."""
    centred = features.astype(np.float64) - features[fit].mean(axis=0)  # the bias takes it up
    centred /= centred[fit].std()
    c = (2 if labels.max() == 1 else 1) / (strength * len(fit))
    model = LogisticRegression(C=c, tol=1e-9, max_iter=20_000).fit(centred[fit], labels[fit])
    return model.predict(centred[test])


@pytest.mark.parametrize("classes, width", [(2, 150), (4, 8)])
def test_folds_of_the_training_part_choose_the_strength(classes, width):
    features, labels = blobs(400, width, classes, distance=2.0)
    found = classify(features, labels, parts(train=120, test=280))
    train, test = np.arange(120), np.arange(120, 400)
    folds = list(StratifiedKFold(10, shuffle=True, random_state=1111).split(train, labels[train]))
    held_out = [np.mean([(by_hand(features, labels, train[a], train[b], s) == labels[train[b]]).mean()
                         for a, b in folds]) for s in STRENGTHS]
    assert (found["item"] == test).all() and len(set(found.l2)) == 1
    assert held_out[STRENGTHS.index(found.l2[0])] >= max(held_out) - 1 / 120  # but for an item at the very border
    # Neither fit is exact, so items at a border between classes may fall on either side.
    assert (found.predicted == by_hand(features, labels, train, test, found.l2[0])).mean() > 0.96


def test_dev_chooses_the_strength_and_the_labels_of_test_items_change_nothing():
    features, labels = blobs(460, 100, distance=1.5)
    splits, train, dev = parts(train=200, dev=200, test=60), np.arange(200), np.arange(200, 400)
    found = classify(features, labels, splits)
    accuracy = [(by_hand(features, labels, train, dev, s) == labels[dev]).mean() for s in STRENGTHS]
    assert len(set(accuracy)) > 1 and found.l2[0] == STRENGTHS[int(np.argmax(accuracy))]
    assert (found["item"] == np.arange(400, 460)).all()
    other = classify(features, np.where(splits == "test", 1 - labels, labels), splits)
    assert (other.predicted == found.predicted).all() and (other.gold == 1 - found.gold).all()


def test_the_minimum_is_that_of_sentevals_loss():
    # SentEval's layer has two columns of weights; mean cross-entropy + L2 / 2 * |W|^2, the bias left out of |W|
    features, labels = blobs(150, 3)
    found = classify(features, labels, parts(train=100, test=50))
    features = (features - features[:100].mean(axis=0)).astype(float)
    features /= features[:100].std()  # one number for all of them
    strength, x, y = found["l2"].iloc[0], features[:100], labels[:100]
    def loss(w):
        logits = x @ w[:6].reshape(3, 2) + w[6:]
        return (logsumexp(logits, axis=1) - logits[np.arange(100), y]).mean() + strength / 2 * (w[:6] ** 2).sum()
    w = minimize(loss, np.zeros(8), tol=1e-10).x
    margin = (features[100:] @ w[:6].reshape(3, 2) + w[6:]) @ [-1, 1]
    clear = abs(margin) > 1e-2
    assert clear.sum() > 40 and (found["predicted"][clear] == (margin > 0)[clear]).all()


def test_nested_folds_test_every_item_once_by_a_classifier_that_has_not_seen_it():
    features, labels = blobs(80, 6, distance=8.0)
    found = classify(features, labels, parts(all=80))
    assert (found["item"] == np.arange(80)).all() and (found.predicted == labels).mean() > 0.95
    constant = np.full((80, 1), 500.0, np.float32)  # a massive dimension, as language models have them
    same = classify(np.hstack([features, constant]), labels, parts(all=80)).predicted == found.predicted
    assert same.mean() > 0.98
    noise = np.random.default_rng(1).normal(size=(80, 200))  # wide enough to learn any labels by heart
    shuffled = np.random.default_rng(2).integers(0, 2, 80)
    assert 0.3 < (classify(noise, shuffled, parts(all=80)).predicted == shuffled).mean() < 0.7


def test_longer_features_are_not_judged_by_another_strength():
    features, labels = blobs(120, 60, distance=3.0)
    of = {size: classify(size * features, labels, parts(train=80, test=40)) for size in (1e-3, 1, 1e3)}
    assert of[1].predicted.equals(of[1e3].predicted) and of[1].predicted.equals(of[1e-3].predicted)
    assert 1e-3 < of[1].l2[0] < 10  # not at a border of what may be chosen


@pytest.mark.filterwarnings("error")
def test_a_rare_class_is_no_obstacle_and_no_warning():
    features, labels = blobs(60)
    labels[7] = 2
    assert len(classify(features, labels, parts(train=50, test=10))) == 10
    assert len(classify(features[:30], labels[:30], parts(all=30))) == 30


@pytest.mark.parametrize("labels, splits, message", [
    ("010", "all all all", "inconsistent"), ("0101", "all all train test", "got all, test"),
    ("0101", "train train dev dev", "got dev"), ("0001", "train train dev test", "one class"),
    ("0001", "train train train test", "two classes"), ("0001", "all all all all", "two classes"),
    ("0011", "all all all all", "two classes")])
def test_what_cannot_be_fitted_is_refused(labels, splits, message):
    with pytest.raises(ValueError, match=message):
        classify(np.arange(8.0).reshape(4, 2), list(map(int, labels)), splits.split())


@pytest.mark.parametrize("counts", [{"all": 500}, {"train": 900, "test": 100}, {"train": 600, "dev": 100, "test": 100}])
def test_sentevals_classifier_learns_alike_each_time_but_not_from_small_features(counts, monkeypatch):
    monkeypatch.setattr(transfer, "FOLDS", 3)
    (features, labels), splits = blobs(sum(counts.values()), classes=3, distance=12.0), parts(**counts)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    found, again = (classify(features - 5, labels, splits, classifier="senteval") for _ in range(2))
    assert (torch.get_rng_state() == states[0]).all() and (np.random.get_state()[1] == states[1]).all()
    pd.testing.assert_frame_equal(found, again)
    small, exact = (classify(1e-2 * (features - 5), labels, splits, classifier=c) for c in ("senteval", "exact"))
    right, few, all_of_them = ((table["predicted"] == table["gold"]).mean() for table in (found, small, exact))
    assert right > 0.95 and all_of_them > few + 0.02
    with pytest.raises(ValueError, match="No classifier 'adam'; choose from exact, senteval"):
        classify(features, labels, splits, classifier="adam")


def test_sentevals_classifier_takes_pytorchs_steps_and_stops_after_six_rounds_that_are_no_new_best(monkeypatch):
    (features, labels), fit, held = blobs(400, classes=3), np.arange(130), np.arange(130, 140)
    labels[held], orders, drawn = 9, np.random.RandomState(1111), []  # no label of theirs: the first round stays best
    with torch.random.fork_rng():
        layer = (torch.manual_seed(1111), torch.nn.Linear(12, 3))[1]
    adam, x, y = torch.optim.Adam(layer.parameters(), weight_decay=0.1), torch.tensor(features), torch.tensor(labels)
    for rows in (rows for _ in range(4) for rows in torch.tensor(orders.permutation(130)).split(64)):
        adam.zero_grad()
        torch.nn.functional.cross_entropy(layer(x[rows]), y[rows]).backward()
        adam.step()
    counting = {"permutation": lambda of, n: drawn.append(n) or np.random.mtrand.RandomState.permutation(of, n)}
    monkeypatch.setattr(np.random, "RandomState", type("Counting", (np.random.RandomState,), counting))
    found = transfer.stopped_early(features, labels, fit, np.arange(140, 400), (0.0, 0.1), held)
    assert (found[1] == layer(x[140:]).argmax(dim=1).numpy()).all() and len(drawn) == 7 * 4


def test_pair_features_and_f1_by_hand():
    np.testing.assert_array_equal(pair_features(np.array([[1.0, 2.0]]), np.array([[3.0, -1.0]])), [[2, 3, 3, -2]])
    rows = [("MR", g, p) for g, p in zip([0, 1, 1, 0], [0, 1, 0, 0])]
    rows += [("MRPC", g, p) for g, p in zip([1, 1, 1, 0], [1, 1, 0, 1])]
    found = pair_f1(pd.DataFrame(rows, columns=["task", "gold", "predicted"]))
    assert found.to_dict() == pytest.approx({"MRPC": 200 / 3})


@pytest.mark.parametrize("task, tested", [("question_type", 36), ("paraphrase", 32)])
def test_sample_tasks_at_several_layers(task, tested):
    encoder, data = SentenceEncoder(tiny_backbone(), "prompteol", TokenPrepending(1, 2)), load_transfer(task, SAMPLE)
    table = transfer_predictions(encoder, {task: data}, [2, -1])
    assert Counter(table["layer"]) == {2: tested, 4: tested} and set(table["task"]) == {task}
    labels, last = np.array(data["label"]), table[table["layer"] == 4]
    assert (labels[last["item"]] == last["gold"]).all() and (np.array(data["split"])[last["item"]] == "test").all()
    first, second = (encoder.encode(data[side]) for side in ("sentence1", "sentence2"))
    features = pair_features(first, second) if task == "paraphrase" else first
    alone = classify(features, data["label"], data["split"])
    assert (alone["predicted"].to_numpy() == last["predicted"].to_numpy()).mean() > 0.9  # the same but for rounding


def test_dense_ranking_is_by_cosine_equal_ones_by_the_order_of_the_corpus_and_bm25_by_words():
    generator = np.random.default_rng(0)
    documents, queries = (generator.normal(0.5, 1, (count, 8)).astype(np.float32) for count in (60, 37))
    documents[7] = 3 * documents[2]  # the same direction: a tie, which goes by the corpus's order
    units = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (queries, documents)]
    cosine, names = units[0] @ units[1].T, [f"q{i}" for i in range(37)]
    found = DenseRetriever(range(60), documents).search(names, queries, depth=9)
    for name, row in zip(names, cosine):
        assert sorted(found[name]) == sorted(np.argsort(-np.round(row, 5), kind="stable")[:9])
        assert np.all(np.diff(row[found[name]]) < 1e-5)
    dense = DenseRetriever(["b", "a", "c", "d"], np.array([[0, 1], [1, 0], [1, 0], [1, 0]], np.float32))
    assert dense.search(["q"], np.array([[2, 0]], np.float32), depth=2) == {"q": ["a", "c"]}
    assert dense.search(["q"], np.array([[0, 0]], np.float32)) == {"q": ["b", "a", "c", "d"]}
    # BM25 ranks an exact match first, and what shares no word not at all.
    texts = ["supersonic flow past a cone", "heat in composite slabs", "", "flow of heat", "slabs of the wing"]
    bm25 = BM25Retriever(list("abcde"), texts)
    found = bm25.search(["x", "y", "z"], ["Heat in composite slabs!", "of the", "unheard"], depth=10)
    assert found["x"][0] == "b" and sorted(found["x"]) == ["b", "d", "e"] and found["y"] == found["z"] == []
    assert bm25.search(["x"], ["heat"], depth=1) == {"x": ["d"]}


def test_metrics_by_hand_and_excluded_documents_leave_the_ranking_before_ranks_are_counted():
    ranking = {"p": ["d1", "d4", "d3"], "q": ["out", "d4", "d3", "d1"]}
    qrels = {"p": QRELS_BY_HAND["q"], **QRELS_BY_HAND}
    kept, gone = (evaluate_retrieval(ranking, qrels, out) for out in ({}, {"q": {"out"}, "other": {"d3"}}))
    assert list(kept.columns) == ["item", "nDCG@10", "Recall@100", "MRR@10"]
    assert kept.iloc[0].tolist() == gone.iloc[0].tolist() == ["p", pytest.approx(2.5 / BEST), pytest.approx(2 / 3), 1]
    assert kept.iloc[1].tolist()[1:] == pytest.approx([(1 / 2 + 2 / np.log2(5)) / BEST, 2 / 3, 1 / 3])
    assert gone.iloc[1].tolist()[1:] == pytest.approx([(1 / np.log2(3) + 2 / 2) / BEST, 2 / 3, 1 / 2])
    # Fused by reciprocal ranks: a 1/61 + 1/63, b 1/62 + 1/61, c 1/63, d 1/62.
    first, second = {"q": ["a", "b", "c"], "r": ["a"]}, {"q": ["b", "d", "a"], "r": []}
    assert retrieval.reciprocal_rank_fusion([first, second]) == {"q": ["b", "a", "d", "c"], "r": ["a"]}
    # Metrics stop at their depth, and empty rankings score nothing.
    far = {"q": [f"x{i}" for i in range(10)] + ["d1"] + [f"y{i}" for i in range(89)] + ["d3"], "e": []}
    scores = evaluate_retrieval(far, QRELS_BY_HAND | {"e": {"d1": 1}, "not asked": {"d1": 1}}).set_index("item")
    assert list(scores.index) == ["q", "e"]
    assert scores.loc["q"].tolist() == pytest.approx([0, 1 / 3, 0]) and scores.loc["e"].tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="'z'"):
        evaluate_retrieval({"z": ["d1"]}, QRELS_BY_HAND)


def run(noise: float, seed: int = 0, sizes=(("A", 50), ("B", 40))) -> pd.DataFrame:
    """Pairs of some tasks, with the same gold scores whatever the noise and the seed; `right` is 0 or 100."""
    tables = []
    for task, size in dict(sizes).items():
        gold = np.round(np.random.default_rng(size).uniform(0, 5, size), 1)
        similarity = gold + noise * np.random.default_rng([seed, size]).normal(size=size)
        columns = {"gold": gold, "similarity": similarity, "right": 100.0 * (abs(similarity - gold) < 1)}
        tables.append(pd.DataFrame({"task": task, "item": range(size)} | columns))
    return pd.concat(tables, ignore_index=True)


def drawn(count: int, draws: int, seed: int = 0) -> np.ndarray:
    """How often each item is drawn, (draws, count)."""
    return np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), draws)


def test_statistics_of_a_resample_are_those_of_its_repeated_rows():
    generator = np.random.default_rng(3)
    gold = generator.integers(0, 5, 25).astype(float)  # many ties
    weights = np.vstack([np.ones(25, int), drawn(25, 40)])
    tables = [pd.DataFrame({"gold": gold, "similarity": s, "positive": gold > 2})
              for s in (gold + generator.normal(size=25), np.round(generator.normal(size=25)))]
    repeated = [[table.loc[np.repeat(range(25), row)] for table in tables] for row in weights]
    for statistic, by_hand in {
        SPEARMAN: lambda rows: 100 * spearmanr(rows["gold"], rows["similarity"]).statistic,
        area_under_roc: lambda rows: roc_auc_score(rows["positive"], rows["similarity"]),
        mean_of("gold"): lambda rows: rows["gold"].mean()}.items():
        expected = [[by_hand(rows) for rows in of_draw] for of_draw in repeated]
        np.testing.assert_allclose(statistic.function(tables, weights), expected, atol=1e-9)


def test_groups_are_resampled_by_themselves():
    table = pd.DataFrame({"task": "t", "item": range(30), "positive": np.arange(30) % 3 == 0, "similarity": 1.0})
    positives = Statistic(lambda tables, weights: weights[:, tables[0]["positive"]].sum(axis=1)[:, None], "positive")
    assert compare({"a": table}, positives, draws=50)[["value", "low", "high"]].values.tolist() == [[10] * 3]
    chance = compare({"a": table}, area_under_roc, draws=50).iloc[0]
    assert chance[["value", "low", "high"]].tolist() == pytest.approx([0.5] * 3)
    with pytest.raises(ValueError, match="same items"):
        compare({"a": table, "b": table.assign(positive=~table["positive"])}, area_under_roc)


def test_intervals_of_a_distinct_share_are_centred_on_the_measured_value():
    """Texts share a token with the next one, and every other text's tokens are found: fewer texts, a smaller share."""
    rows = [(text, token, text % 2 == 0) for text in range(20) for token in (text, text + 1)]
    table = pd.DataFrame(rows, columns=["item", "token", "found"]).assign(task="")
    kinds = (Statistic(distinct_share.function), distinct_share)
    plain, centred = (compare({"a": table}, statistic, draws=300).iloc[0] for statistic in kinds)
    assert centred["value"] == plain["value"] == pytest.approx(20 / 21)  # tokens 0 to 19 of 0 to 20
    assert plain["high"] < plain["value"] < centred["high"]
    assert centred["high"] - centred["low"] == pytest.approx(plain["high"] - plain["low"])
    weights = drawn(20, 300)
    shares = [table[row[table["item"]] > 0].groupby("token")["found"].any().mean() for row in weights]
    np.testing.assert_allclose(distinct_share.function([table], weights)[:, 0], shares, rtol=1e-6)


def test_differences_and_ratios_are_paired():
    base, other = run(1), run(2)
    runs = {"base": base, ("half", 3): base.assign(right=base["right"] / 2), 7: other}
    table = compare(runs, mean_of("right"), "base", ratio=True, draws=200)
    bare = compare(runs, mean_of("right"), "base", draws=0)
    assert list(bare.columns) == ["run", "task", "value", "difference"] and bare["value"].equals(table["value"])
    assert compare({"a": run(1, sizes={"A": 9})}, SPEARMAN, draws=5)["task"].tolist() == ["A"]  # no average of one
    means = other.groupby("task")["right"].mean()
    assert bare["value"].tolist()[6:] == pytest.approx([means["A"], means["B"], means.mean()])
    own, half, rest = (table.iloc[rows : rows + 3] for rows in (0, 3, 6))
    assert (own.filter(like="difference") == 0).all(axis=None) and (own.filter(like="ratio") == 1).all(axis=None)
    np.testing.assert_allclose(half.filter(like="ratio"), 0.5)
    np.testing.assert_allclose(half["difference"], -half["value"])
    gaps = compare({"gap": base.assign(right=other["right"] - base["right"])}, mean_of("right"), draws=200)
    np.testing.assert_allclose(rest.filter(like="difference"), gaps[["value", "low", "high"]])


def test_intervals_are_as_wide_as_theory_says_and_data_sets_resampled_independently():
    """Two data sets with equal rows: their average varies less than either, by the square root of two."""
    table = run(1, sizes={"A": 300})
    both = {"a": pd.concat([table, table.assign(task="B")])}
    for statistic in (SPEARMAN, mean_of("similarity")):
        found = compare(both, statistic, draws=4000).set_index("task")
        width = found["high"] - found["low"]
        assert found.loc["A", "value"] == found.loc["B", "value"] == found.loc["Avg", "value"]
        assert width["Avg"] == pytest.approx(width[["A", "B"]].mean() / np.sqrt(2), rel=0.06)
    assert width["A"] == pytest.approx(2 * 1.96 * table["similarity"].std(ddof=0) / np.sqrt(300), rel=0.05)


def test_an_interval_depends_on_the_seed_and_not_on_what_else_is_loaded_or_on_chunks(monkeypatch):
    runs = {"a": run(1), "b": run(2, 1)}
    alone = {name: table[table["task"] == "B"] for name, table in runs.items()}
    expected = compare(runs, SPEARMAN, "a", draws=50).query("task == 'B'").reset_index(drop=True)
    monkeypatch.setattr(intervals, "CELLS", 7 * 40)
    pd.testing.assert_frame_equal(compare(alone, SPEARMAN, "a", draws=50), expected)
    expected = expected.iloc[1:, :5].reset_index(drop=True)
    pd.testing.assert_frame_equal(compare({"b": alone["b"]}, SPEARMAN, draws=50), expected)


def test_what_is_refused_and_what_a_plain_function_may_be():
    table = run(1)
    for other in (table.iloc[::-1], table.iloc[:-1], table.assign(gold=table["gold"] + 1), table.assign(task="C"),
                  table.drop(columns="gold")):
        with pytest.raises(ValueError, match="'b' do not hold the same items"):
            compare({"a": table, "b": other}, mean_of("right"), draws=10)
    with pytest.raises(ValueError, match="no run 'plain'; choose from 'a'"):
        compare({"a": table}, SPEARMAN, "plain")
    several = pd.DataFrame({"task": "t", "item": [5, 5, 3, 3, 3], "gold": 1.0, "similarity": 2.0})
    with pytest.raises(ValueError, match="one row an item"):  # two layers, say
        compare({"a": several}, SPEARMAN, draws=10)
    shapes = []
    counted = Statistic(lambda tables, weights: shapes.append(weights.shape) or weights[:, :1])
    compare({"a": several}, counted, draws=4)
    assert shapes == [(1, 2), (4, 2)]  # the function says what several rows of an item mean


def test_of_a_list_of_tables_the_mean_counts_and_draws_or_runs_without_a_value_touch_no_other():
    seeds = [run(1, seed) for seed in range(3)]
    single = [compare({"a": table}, SPEARMAN, draws=0)["value"] for table in seeds]
    found = compare({"a": seeds, "b": seeds[:1], "c": seeds[0]}, SPEARMAN, "c", draws=40)
    a, b, c = (found[found["run"] == name].drop(columns="run").reset_index(drop=True) for name in "abc")
    np.testing.assert_allclose(a["value"], np.mean(single, axis=0))
    pd.testing.assert_frame_equal(b, c)
    empty = compare({"b": [seeds[0], seeds[1].assign(similarity=1.0)], "a": seeds}, SPEARMAN, draws=0)["value"]
    assert empty[:3].isna().all() and empty[3:].tolist() == pytest.approx(a["value"].tolist())
    few = pd.DataFrame({"task": "t", "item": range(3), "gold": [1.0, 2, 3], "similarity": [1.0, 3, 2]})
    found = compare({"a": few}, SPEARMAN, draws=200).iloc[0]
    assert found["value"] == pytest.approx(50) and (found["low"], found["high"]) == pytest.approx((-100, 100))
