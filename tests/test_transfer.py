"""Transfer evaluation: against plain scikit-learn, against SentEval's own classifier, against resampling item by item."""

import time
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

from lib.report import results
from lib.data import sources
from lib.evaluation import transfer
from lib.data.sts import DataSource, cap_rows, load_transfer
from lib.core.encoder import SentenceEncoder
from lib.report.plots_transfer import describe_sweeps, score_table, sweep_table
from lib.core.token_prepending import TokenPrepending
from lib.evaluation.transfer import (
    AVERAGE,
    STRENGTHS,
    bootstrap_accuracy,
    classify,
    evaluate_transfer,
    intervals,
    pair_features,
    stored_predictions,
    transfer_predictions,
    transfer_scores,
)
from tests.tiny_models import tiny_backbone

SAMPLE = DataSource("sample", sources.ROOT / "data" / "sample")


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


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("width", [8, 150])
def test_train_and_test_against_plain_scikit_learn(classes, width):
    features, labels = blobs(400, width, classes, distance=2.0)
    found = classify(features, labels, parts(train=120, test=280))
    train, test = np.arange(120), np.arange(120, 400)
    held_out = [
        np.mean([(by_hand(features, labels, train[a], train[b], s) == labels[train[b]]).mean() for a, b in
                 StratifiedKFold(10, shuffle=True, random_state=1111).split(train, labels[train])])
        for s in STRENGTHS
    ]
    assert (found["item"] == test).all() and len(set(found.l2)) == 1
    chosen = STRENGTHS.index(found.l2[0])
    assert held_out[chosen] >= max(held_out) - 1 / 120  # but for an item at the very border
    # Neither fit is exact, so items at a border between classes may fall on either side.
    assert (found.predicted == by_hand(features, labels, train, test, found.l2[0])).mean() > 0.96


def test_the_minimum_is_that_of_sentevals_loss():
    # SentEval's layer has two columns of weights; mean cross-entropy + L2 / 2 * |W|^2, the bias left out of |W|
    features, labels = blobs(150, 3)
    strength, x, y = 1e-1, features[:100].astype(float), labels[:100]

    def loss(w):
        logits = x @ w[:6].reshape(3, 2) + w[6:]
        return (logsumexp(logits, axis=1) - logits[np.arange(100), y]).mean() + strength / 2 * (w[:6] ** 2).sum()

    w = minimize(loss, np.zeros(8), tol=1e-10).x
    margin = (features[100:] @ w[:6].reshape(3, 2) + w[6:]) @ [-1, 1]
    predicted = transfer._predict(features, labels, np.arange(100), np.arange(100, 150), [strength])[0]
    clear = abs(margin) > 1e-2
    assert clear.sum() > 40 and (predicted[clear] == (margin > 0)[clear]).all()


def test_dev_chooses_the_strength():
    features, labels = blobs(460, 100, distance=1.5)
    found = classify(features, labels, parts(train=200, dev=200, test=60))
    train, dev = np.arange(200), np.arange(200, 400)
    accuracy = [(by_hand(features, labels, train, dev, s) == labels[dev]).mean() for s in STRENGTHS]
    assert len(set(accuracy)) > 1 and found.l2[0] == STRENGTHS[int(np.argmax(accuracy))]
    assert (found["item"] == np.arange(400, 460)).all()


def test_nested_folds_test_every_item_once_by_a_classifier_that_has_not_seen_it():
    features, labels = blobs(120, 6, distance=8.0)
    found = classify(features, labels, parts(all=120))
    assert (found["item"] == np.arange(120)).all() and (found.predicted == labels).mean() > 0.95
    noise = np.random.default_rng(1).normal(size=(120, 300))  # wide enough to learn any labels by heart
    shuffled = np.random.default_rng(2).integers(0, 2, 120)
    assert 0.3 < (classify(noise, shuffled, parts(all=120)).predicted == shuffled).mean() < 0.7


def test_the_labels_of_test_items_change_nothing():
    features, labels = blobs(300)
    splits = parts(train=150, test=150)
    other = np.where(splits == "test", 1 - labels, labels)
    first, second = classify(features, labels, splits), classify(features, other, splits)
    assert (first.predicted == second.predicted).all() and (first.l2 == second.l2).all()


def test_a_massive_constant_dimension_changes_nothing():
    features, labels = blobs(300)
    wide = np.concatenate([features, np.full((300, 1), 500.0, np.float32)], axis=1)
    same = classify(features, labels, parts(all=300)).predicted == classify(wide, labels, parts(all=300)).predicted
    assert same.mean() > 0.99


class SentEvalClassifier:
    """SentEval's classifier without a hidden layer, after its public code: Adam, and early stopping on accuracy."""

    def __init__(self, width, classes, l2, seed=1111):
        torch.manual_seed(seed)
        self.shuffle = np.random.RandomState(seed).permutation
        self.layer = torch.nn.Linear(width, classes)
        self.adam = torch.optim.Adam(self.layer.parameters(), weight_decay=l2)

    def fit(self, x, y, held, gold):
        best, epochs, worse = -1.0, 0, 0
        while epochs <= 200 and worse <= 5:
            for _ in range(4):
                order = torch.from_numpy(self.shuffle(len(x)))
                for rows in order.split(64):
                    self.adam.zero_grad()
                    torch.nn.functional.cross_entropy(self.layer(x[rows]), y[rows]).backward()
                    self.adam.step()
            epochs += 4
            accuracy = self.accuracy(held, gold)
            if accuracy > best:
                best, state = accuracy, {k: v.clone() for k, v in self.layer.state_dict().items()}
            else:
                worse += 1
        self.layer.load_state_dict(state)
        return best

    @torch.no_grad()
    def accuracy(self, x, y):
        return (self.layer(x).argmax(dim=1) == y).double().mean().item()


@pytest.mark.parametrize("scale", [0.2, 1.0])
@pytest.mark.parametrize("classes", [2, 4])
def test_accuracy_is_near_that_of_sentevals_own_classifier(classes, scale, one_thread):
    features, labels = blobs(5600, 64, classes, distance=2.0, scale=scale)
    splits = parts(train=1200, dev=400, test=4000)
    x, y = ({s: torch.from_numpy(v[splits == s]) for s in ("train", "dev", "test")} for v in (features - 5 * scale, labels))
    fits = []
    for l2 in (1e-5, 1e-4, 1e-3, 1e-2):
        classifier = SentEvalClassifier(64, classes, l2)
        fits.append((classifier.fit(x["train"], y["train"], x["dev"], y["dev"]), classifier.accuracy(x["test"], y["test"])))
    theirs = 100 * max(fits, key=lambda fit: fit[0])[1]
    found = classify(features, labels, splits)
    ours = 100 * (found.predicted == labels[found["item"]]).mean()
    assert 100 / classes + 15 < theirs < 97  # so that there is something to tell apart
    # With four classes and few items to train on, stopping early regularises more than our strongest L2: 0.9 to 1.3 points.
    assert ours == pytest.approx(theirs, abs=0.7 if classes == 2 else 1.5)


def test_a_rare_class_is_no_obstacle_and_no_warning():
    features, labels = blobs(60, classes=3)
    labels[labels == 2] = 0
    labels[7] = 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(classify(features, labels, parts(train=50, test=10))) == 10
        assert len(classify(features[:30], labels[:30], parts(all=30))) == 30


@pytest.mark.parametrize("arguments, message", [
    (([0, 1, 0], ["all"] * 3), "4 embeddings, 3 labels and 3 split names"),
    (([0, 1, 0, 1], ["all", "all", "train", "test"]), "got all, test, train"),
    (([0, 1, 0, 1], ["train", "train", "dev", "dev"]), "got dev, train"),
    (([0, 0, 0, 1], ["train", "train", "dev", "test"]), "same label"),
    (([0, 0, 0, 1], ["train", "train", "train", "test"]), "3 of class 0"),
    (([0, 0, 0, 1], ["all"] * 4), "3 of class 0, 1 of class 1"),
    (([0, 0, 1, 1], ["all"] * 4), "of class 1"),
])
def test_what_cannot_be_fitted_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        classify(np.arange(8.0).reshape(4, 2), *arguments)


def test_undefined_features_are_refused():
    with pytest.raises(ValueError, match="not a number"):
        classify(np.array([[1.0], [np.nan]]), [0, 1], ["all", "all"])


def test_pair_features():
    np.testing.assert_array_equal(pair_features(np.array([[1.0, 2.0]]), np.array([[3.0, -1.0]])), [[2, 3, 3, -2]])


def predictions(task, gold, predicted, layer=3):
    columns = {"item": range(len(gold)), "gold": gold, "predicted": predicted, "l2": 0.1}
    return pd.DataFrame({"task": task, "layer": layer} | columns)


def test_scores_by_hand():
    table = pd.concat([predictions("MR", [0, 1, 1, 0], [0, 1, 0, 0]), predictions("MRPC", [1, 1, 1, 0], [1, 1, 0, 1])])
    scores = transfer_scores(table).set_index(["task", "metric"])
    accuracy = "accuracy_x100"
    expected = {("MR", accuracy): 75, ("MRPC", accuracy): 50, ("MRPC", "f1_x100"): 200 / 3, (AVERAGE, accuracy): 62.5}
    assert scores["value"].to_dict() == pytest.approx(expected)
    assert scores.loc[(AVERAGE, accuracy), "items"] == 8
    wide = score_table({("p", "v"): table}, draws=50)
    assert list(wide.columns) == ["prompt", "variant", "layer", "MR", "MRPC", AVERAGE, "low", "high", "MRPC F1"]
    assert wide.loc[0, "low"] <= wide.loc[0, AVERAGE] == 62.5 <= wide.loc[0, "high"]


def random_predictions(seed, accuracy=0.7, sizes=(("A", 60), ("B", 150))):
    generator = np.random.default_rng(seed)
    return pd.concat(
        predictions(task, [0] * size, (generator.random(size) > accuracy).astype(int)) for task, size in sizes
    )


def test_bootstrap_agrees_with_resampling_item_by_item():
    methods = [random_predictions(0), random_predictions(1, 0.8)]
    tasks, values, resampled = bootstrap_accuracy(methods, draws=20_000)
    assert tasks == ["A", "B", AVERAGE] and values.shape == (3, 2) and resampled.shape == (3, 20_000, 2)
    generator, differences = np.random.default_rng(5), []
    for k, task in enumerate(tasks[:2]):
        right = np.stack([(m["gold"] == m["predicted"])[m["task"] == task] for m in methods]).astype(float)
        assert values[k] == pytest.approx(100 * right.mean(axis=1))
        again = 100 * right[:, generator.integers(0, right.shape[1], (20_000, right.shape[1]))].mean(axis=2)
        differences.append(again[0] - again[1])
        tails = [2.5, 25, 50, 75, 97.5]
        step = 100 / right.shape[1]
        np.testing.assert_allclose(np.percentile(differences[-1], tails),
                                   np.percentile(resampled[k, :, 0] - resampled[k, :, 1], tails), atol=1.01 * step)
    average = resampled[2, :, 0] - resampled[2, :, 1]
    assert average.std() == pytest.approx(np.mean(differences, axis=0).std(), rel=0.03)
    found = intervals(*methods, draws=20_000).set_index("task")
    assert found.loc[AVERAGE, "value"] == pytest.approx(found["value"][:2].mean())
    assert found.loc[AVERAGE, ["low", "high"]].to_list() == pytest.approx(np.percentile(average, [2.5, 97.5]))


def test_intervals_are_seeded_paired_and_fast():
    one = random_predictions(0, sizes=[(task, 10_000) for task in "ABCDEFG"])
    begin = time.perf_counter()
    alone = intervals(one)
    assert time.perf_counter() - begin < 5
    assert alone.equals(intervals(one)) and not alone.equals(intervals(one, seed=1))
    assert (alone["low"] < alone["value"]).all() and (alone["value"] < alone["high"]).all()
    assert (intervals(one, one, draws=50)[["value", "low", "high"]] == 0).all(axis=None)
    assert (intervals(one, random_predictions(1, 0.6, [(task, 10_000) for task in "ABCDEFG"]))["low"] > 0).all()


def test_intervals_refuse_other_items():
    one = random_predictions(0)
    with pytest.raises(ValueError, match="same items"):
        intervals(one, one.iloc[::-1])


def sweep(scores, spread):
    draws = np.asarray(scores) + spread * np.random.default_rng(0).normal(size=(400, len(scores)))
    return sweep_table([2, 8, 14], np.asarray(scores, float), draws)


def test_the_sentence_about_ends_says_what_the_data_can_tell():
    near, far = sweep([70, 71, 71.5], 1.0), sweep([80, 60, 50], 1.0)
    assert list(near["behind"]) == [1.5, 0.5, 0] and (far["behind_low"][1:] > 0).all() and near["behind_low"][0] < 0
    text = describe_sweeps(near, far)
    assert "transfer is best at end 14 (71.5, 95 % interval" in text and "STS-B dev is best at end 2 (80.0" in text
    assert text.endswith("deeper for transfer, and paired intervals tell them apart on STS-B dev.")
    both = describe_sweeps(sweep([50, 60, 80], 1.0), far)
    assert both.endswith("deeper for transfer, and paired intervals tell them apart on transfer and STS-B dev.")
    assert describe_sweeps(near, sweep([71.2, 71, 70.9], 1.0)).endswith("and no paired interval tells them apart.")
    assert describe_sweeps(far, near).endswith("less deep for transfer, and paired intervals tell them apart on transfer.")
    assert describe_sweeps(far, far).endswith("the same end for both.")


@pytest.fixture
def stored(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    monkeypatch.delenv("TP_RUN_LOG", raising=False)


@pytest.mark.parametrize("task, tested", [("subjectivity", 32), ("question_type", 36), ("paraphrase", 32)])
def test_sample_tasks_at_several_layers(task, tested, stored, one_thread):
    encoder, dataset = SentenceEncoder(tiny_backbone(), tp=TokenPrepending(1, 2)), load_transfer(task, SAMPLE)
    first, again = (stored_predictions(encoder, task, dataset, [2, -1]) for _ in range(2))
    assert (first.reused, again.reused) == (False, True) and first.value.equals(again.value)
    assert list(first.value["layer"].unique()) == [2, 4] and Counter(first.value["layer"]) == {2: tested, 4: tested}
    assert first.provenance["settings"]["data"]["task"] == task and first.provenance["settings"]["tp"]["end"] == 2
    labels, table = np.array(dataset["label"]), first.value[first.value["layer"] == 4]
    assert (labels[table["item"]] == table["gold"]).all()
    assert (np.array(dataset["split"])[table["item"]] == "test").all()
    only = transfer_predictions(SentenceEncoder(tiny_backbone(), tp=TokenPrepending(1, 2)), task, dataset)
    assert (only["predicted"].to_numpy() == table["predicted"].to_numpy()).mean() > 0.9  # the same but for rounding


def test_evaluate_transfer_on_few_rows(monkeypatch, one_thread):
    few = {task: cap_rows(load_transfer(task, SAMPLE), 20, seed=0, within="split") for task in ("sentiment", "paraphrase")}
    monkeypatch.setattr(transfer, "load_transfer", few.get)
    scores = evaluate_transfer(SentenceEncoder(tiny_backbone(), exit_layer=2), few)
    assert list(scores["task"]) == ["sentiment", "paraphrase", "paraphrase", AVERAGE] and (scores["items"][:3] == 20).all()
    assert scores["value"].between(0, 100).all() and (scores["layer"] == 2).all()
