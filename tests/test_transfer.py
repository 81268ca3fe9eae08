"""Transfer evaluation: against plain scikit-learn, and against SentEval's own classifier."""

import warnings
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import logsumexp
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from tiny_models import tiny_backbone

from lib.core.encoder import SentenceEncoder
from lib.core.token_prepending import TokenPrepending
from lib.data.sources import DATA, DataSource
from lib.data.transfer import load_transfer
from lib.evaluation.intervals import compare
from lib.evaluation.tasks import TRANSFER
from lib.evaluation.transfer import STRENGTHS, classify, pair_features, transfer_predictions, transfer_scores

SAMPLE = DataSource("sample", DATA / "sample")


def blobs(count, width=12, classes=2, distance=1.0, scale=1.0, seed=0):
    """Classes as overlapping clouds, with features of different size around a far centre, as in a language model."""
    generator = np.random.default_rng(seed)
    centres = distance * generator.normal(size=(classes, width)) / np.sqrt(width)
    labels = generator.integers(0, classes, count)
    sizes = np.exp(0.5 * generator.normal(size=width))
    features = (centres[labels] + generator.normal(size=(count, width))) * sizes + 5
    return (scale * features).astype(np.float32), labels


def parts(**counts):
    return np.repeat(list(counts), list(counts.values()))


def by_hand(features, labels, fit, test, strength):
    """Predictions of plain scikit-learn on raw features, brought to the very minimum."""
    centred = features.astype(np.float64) - features[fit].mean(axis=0)  # the bias takes it up
    c = (2 if labels.max() == 1 else 1) / (strength * len(fit))
    model = LogisticRegression(C=c, tol=1e-9, max_iter=20_000).fit(centred[fit], labels[fit])
    return model.predict(centred[test])


@pytest.mark.parametrize("classes, width", [(2, 150), (4, 8)])
def test_folds_of_the_training_part_choose_the_strength(classes, width):
    features, labels = blobs(400, width, classes, distance=2.0)
    found = classify(features, labels, parts(train=120, test=280))
    train, test = np.arange(120), np.arange(120, 400)
    held_out = [
        np.mean([(by_hand(features, labels, train[a], train[b], s) == labels[train[b]]).mean() for a, b in
                 StratifiedKFold(10, shuffle=True, random_state=1111).split(train, labels[train])])
        for s in STRENGTHS
    ]
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
    strength, x, y = found["l2"].iloc[0], features[:100].astype(float), labels[:100]

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


def senteval_accuracy(x: dict, y: dict, classes: int, l2: float, seed: int = 1111) -> tuple[float, float]:
    """Accuracy on dev and test of SentEval's classifier, after its public code: Adam, and early stopping on dev."""
    torch.manual_seed(seed)
    shuffle, layer = np.random.RandomState(seed).permutation, torch.nn.Linear(64, classes)
    adam = torch.optim.Adam(layer.parameters(), weight_decay=l2)
    best, epochs, worse = (-1.0, 0.0), 0, 0
    while epochs <= 200 and worse <= 5:
        for _ in range(4):
            for rows in torch.from_numpy(shuffle(len(y["train"]))).split(64):
                adam.zero_grad()
                torch.nn.functional.cross_entropy(layer(x["train"][rows]), y["train"][rows]).backward()
                adam.step()
        epochs += 4
        found = tuple((layer(x[part]).argmax(dim=1) == y[part]).double().mean().item() for part in ("dev", "test"))
        best, worse = (found, worse) if found[0] > best[0] else (best, worse + 1)
    return best


@pytest.mark.parametrize("classes, scale", [(2, 0.2), (4, 1.0)])
def test_accuracy_is_near_that_of_sentevals_own_classifier(classes, scale, one_thread):
    features, labels = blobs(5600, 64, classes, distance=2.0, scale=scale)
    splits, names = parts(train=1200, dev=400, test=4000), ("train", "dev", "test")
    x, y = ({s: torch.from_numpy(v[splits == s]) for s in names} for v in (features - 5 * scale, labels))
    theirs = 100 * max(senteval_accuracy(x, y, classes, l2) for l2 in (1e-5, 1e-4, 1e-3, 1e-2))[1]
    found = classify(features, labels, splits)
    assert 100 / classes + 15 < theirs < 97  # so that there is something to tell apart
    # With four classes and few items to train on, stopping early is stronger than our strongest L2: 0.9 to 1.3 points.
    assert 100 * (found.predicted == found.gold).mean() == pytest.approx(theirs, abs=0.7 if classes == 2 else 1.5)


def test_a_rare_class_is_no_obstacle_and_no_warning():
    features, labels = blobs(60, classes=3)
    labels[labels == 2] = 0
    labels[7] = 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(classify(features, labels, parts(train=50, test=10))) == 10
        assert len(classify(features[:30], labels[:30], parts(all=30))) == 30


@pytest.mark.parametrize("labels, splits", [
    ([0, 1, 0], ["all"] * 3), ([0, 1, 0, 1], ["all", "all", "train", "test"]),
    ([0, 1, 0, 1], ["train", "train", "dev", "dev"]),
    ([0, 0, 0, 1], ["train", "train", "dev", "test"]), ([0, 0, 0, 1], ["train", "train", "train", "test"]),
    ([0, 0, 0, 1], ["all"] * 4), ([0, 0, 1, 1], ["all"] * 4),
])
def test_what_cannot_be_fitted_is_refused(labels, splits):
    with pytest.raises(ValueError, match="inconsistent|got all, test|got dev|one class|two classes"):
        classify(np.arange(8.0).reshape(4, 2), labels, splits)


def test_undefined_features_are_refused():
    features, labels = blobs(60)
    features[40, 1] = np.inf
    with pytest.raises(ValueError, match="infinity"):
        classify(features, labels, parts(train=50, test=10))


def test_pair_features():
    np.testing.assert_array_equal(pair_features(np.array([[1.0, 2.0]]), np.array([[3.0, -1.0]])), [[2, 3, 3, -2]])


def test_scores_by_hand():
    rows = [("MR", g, p) for g, p in zip([0, 1, 1, 0], [0, 1, 0, 0])]
    rows += [("MRPC", g, p) for g, p in zip([1, 1, 1, 0], [1, 1, 0, 1])]
    scores = transfer_scores(pd.DataFrame(rows, columns=["task", "gold", "predicted"]).assign(layer=3))
    expected = {("MR", "accuracy_x100"): 75, ("MRPC", "accuracy_x100"): 50, ("MRPC", "f1_x100"): 200 / 3}
    assert scores.set_index(["task", "metric"])["value"].to_dict() == pytest.approx(expected)
    assert (scores["items"] == 4).all() and (scores["layer"] == 3).all()


@pytest.mark.parametrize("task, tested", [("question_type", 36), ("paraphrase", 32)])
def test_sample_tasks_at_several_layers(task, tested, one_thread):
    encoder, data = SentenceEncoder(tiny_backbone(), "prompteol", TokenPrepending(1, 2)), load_transfer(task, SAMPLE)
    table = transfer_predictions(encoder, {task: data}, [2, -1])
    assert Counter(table["layer"]) == {2: tested, 4: tested} and set(table["task"]) == {task}
    labels, last = np.array(data["label"]), table[table["layer"] == 4]
    assert (labels[last["item"]] == last["gold"]).all() and (np.array(data["split"])[last["item"]] == "test").all()
    assert (table["correct"] == 100 * (table["gold"] == table["predicted"])).all()
    first, second = (encoder.encode(data[side]) for side in ("sentence1", "sentence2"))
    features = pair_features(first, second) if task == "paraphrase" else first
    alone = classify(features, data["label"], data["split"])
    assert (alone["predicted"].to_numpy() == last["predicted"].to_numpy()).mean() > 0.9  # the same but for rounding


def test_a_suite_of_tasks_is_scored_and_compared(one_thread):
    data = {task: load_transfer(task, SAMPLE).first(20, within="split") for task in ("sentiment", "paraphrase")}
    runs = {layer: transfer_predictions(SentenceEncoder(tiny_backbone(), exit_layer=layer), data) for layer in (2, 4)}
    table = compare(runs, TRANSFER["MR"].statistic, 2, draws=50).set_index(["run", "task"])
    scores = transfer_scores(runs[4]).query("metric == 'accuracy_x100'").set_index("task")
    assert scores["items"].tolist() == [20, 20] and set(runs[2]["layer"]) == {2}
    assert table.loc[4, "value"].to_dict() == pytest.approx({**scores["value"], "Avg": scores["value"].mean()})
    assert table.loc[2, ["difference", "difference_low", "difference_high"]].eq(0).all(axis=None)
