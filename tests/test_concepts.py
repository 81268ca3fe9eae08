"""`lib.studies.concepts`: against counts by hand, sets and scikit-learn."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from sklearn.metrics import roc_auc_score
from tiny_models import tiny_backbone

from lib.core.encoder import SentenceEncoder
from lib.core.token_prepending import TokenPrepending
from lib.data.sources import EvaluationData
from lib.data.texts import load_minimal_pairs
from lib.evaluation.alignment import decode_logits
from lib.evaluation.sts import spearman
from lib.evaluation.vocabulary import DEFAULT_RULE, token_classes
from lib.studies import concepts
from lib.studies.concepts import INSTRUCTIONS, KINDS, TASKS, WORDS

pytestmark = pytest.mark.usefixtures("one_thread")
NO = "no instruction"


@pytest.fixture(scope="module")
def backbone():
    return tiny_backbone("llama")


def test_overlap_against_sets(backbone):
    first, second = np.random.default_rng(0).normal(size=(2, 5, 32)).astype(np.float32)
    second[0] = first[0]
    found = concepts.token_overlap(backbone, first, second, -1, k=7)
    logits = decode_logits(backbone, np.concatenate([first, second]))
    classes = token_classes(backbone.tokenizer, logits.shape[1], DEFAULT_RULE)
    merged = np.stack([np.max(logits[:, classes == c], axis=1) for c in np.unique(classes[classes >= 0])], axis=1)
    top = np.argsort(-(merged - merged.mean(axis=0)), axis=1)[:, :7]
    assert found.tolist() == pytest.approx([len({*a} & {*b}) / 7 for a, b in zip(top[:5], top[5:])])
    assert found[0] == 1


def test_scores_and_gaps_of_cosine_overlap_and_both():
    gold, other = np.arange(6.0), np.array([0, 1, 2, 3, 5, 4.0])
    whole = pd.concat([
        pd.DataFrame({"task": "similar", "gold": gold, "cosine": gold[::-1], "overlap": other}),
        pd.DataFrame({"task": "related", "gold": gold, "cosine": other, "overlap": gold}),
    ]).assign(method="m").rename_axis("item").reset_index()
    whole["both"] = whole["cosine"] + whole["overlap"]
    table = concepts.similarity_scores(whole, draws=50)
    assert table["measure"].tolist() == ["cosine", "overlap", "both"] * 2 and table["task"][3] == "related"
    near = spearman(gold, other)
    assert table["value"][[0, 1, 3, 4]].tolist() == pytest.approx([-100, near, near, 100])
    assert table["difference"][[0, 1, 3, 4]].tolist() == pytest.approx([0, near + 100, 0, 100 - near])
    gaps = concepts.similarity_gaps(whole, draws=50).set_index("measure")
    assert (gaps["gap to"] == "related").all()
    assert gaps["value"][["cosine", "overlap"]].tolist() == pytest.approx([-100 - near, near - 100])
    assert gaps["difference"]["overlap"] == pytest.approx(2 * near)
    assert (gaps["low"] <= gaps["value"]).all() and (gaps["value"] <= gaps["high"]).all()


def test_pairs_of_data_under_an_encoder(backbone):
    rows = {"sentence1": ["A dog.", "It rains.", "Go."], "sentence2": ["A dog.", "A cat.", "Hm."], "score": [5, 0, 3]}
    data = {"d": EvaluationData("d", Dataset.from_dict(rows), {})}
    table = concepts.pair_similarities({"m": SentenceEncoder(backbone, "prompteol")}, backbone, data, k=5)
    assert table["gold"].tolist() == rows["score"] and table["item"].tolist() == [0, 1, 2]
    assert table.loc[0, ["cosine", "overlap", "both"]].tolist() == pytest.approx([1, 1, 6])  # twice the third rank


def test_what_pairs_share_and_what_changes(backbone, monkeypatch):
    rows = [("antonym", "dog cat", "dog bird"), ("role swap", "dog cat", "cat dog")]
    pairs = pd.DataFrame(rows, columns=["kind", "sentence1", "sentence2"])
    encoders = {"m": SentenceEncoder(backbone, "prompteol")}
    table = concepts.minimal_pairs(encoders, backbone, pairs, k=5)
    assert np.isnan(table["changed"][1]) and 0 <= table["shared"][1] <= 1 and 0 <= table["changed"][0] <= 1
    monkeypatch.setattr(concepts, "HIGHEST", 300)  # deep enough, every token is found
    whole = concepts.minimal_pairs(encoders, backbone, pairs, k=5)
    assert whole["changed"][0] == 1 and whole["shared"].tolist() == [1, 1]


def test_separation_is_the_area_under_the_curve():
    generator, kinds = np.random.default_rng(0), np.repeat(KINDS, 4)
    values = {"cosine": generator.integers(0, 9, 20), "overlap": np.arange(20)}
    found = pd.DataFrame({"kind": kinds, "method": "m", **values})
    table = concepts.separation(found, draws=100).set_index(["task", "measure"])
    (similar, related), about = concepts.QUESTIONS, found[kinds != "topic shift"]
    areas = (roc_auc_score(about["kind"] == "paraphrase", about["cosine"]),
             roc_auc_score(kinds != "topic shift", found["cosine"]))
    assert table["value"][[(similar, "cosine"), (related, "cosine")]].tolist() == pytest.approx(areas)
    assert table["value"][related, "overlap"] == 0 and len(table) == 4
    assert (table["low"] <= table["value"]).all() and (table["value"] <= table["high"]).all()


def test_the_data_fits_together():
    assert tuple(load_minimal_pairs()["kind"].unique()) == KINDS
    for task in TASKS.values():
        assert task["aspect"] in INSTRUCTIONS and set(task["classes"]) <= set(WORDS)
    words = [word for name in WORDS for word in WORDS[name]]
    assert len(words) == len(set(words))
    assert {prompt.templates[0].partition("{sentence}")[0] for prompt in INSTRUCTIONS.values()} == {'This sentence : "'}


def test_class_scores_by_hand():
    vocabulary = {"good": 0, " good": 1, "bad": 2, "other": 3}
    linear = torch.nn.Linear(4, 4, bias=False).requires_grad_(False)
    linear.weight.data = torch.eye(4)
    words = SimpleNamespace(unembedding=linear, final_norm=None, num_layers=1, name="words", dtype=torch.float32)
    words.layer_index = lambda n: n % 2
    words.tokenizer = lambda text, **_: {"input_ids": [vocabulary[text]] if text in vocabulary else [3, 3]}
    states = np.array([[4, 2, 1, 9], [0, 2, 3, 9]], np.float32)
    assert concepts.class_scores(words, states, 1, ["negative", "positive"]).tolist() == [[1, 3], [3, 1]]
    with pytest.raises(ValueError, match="None of the words of 'number'"):
        concepts.class_scores(words, states, 1, ["number"])


def test_answers_under_all_instructions(backbone):
    texts = [f"It was {word} on day {i}." for i in range(10) for word in ("awful", "wonderful")]
    data = {"CR": EvaluationData("CR", Dataset.from_dict({"sentence1": texts, "label": [0, 1] * 10}), {})}
    words = {"negative": ["a", "b"], "positive": ["c", "d"]}
    answers = {}
    for variant, method in {"baseline": None, "TP": TokenPrepending(1, 2)}.items():
        encoders = {aspect: SentenceEncoder(backbone, prompt, method) for aspect, prompt in INSTRUCTIONS.items()}
        answers[variant] = concepts.instruction_answers(encoders, data, words)
    table = answers["baseline"].set_index(["measure", "instruction", "item"])["found"].sort_index()
    states = SentenceEncoder(backbone, "prompteol").encode(texts)
    scores = concepts.class_scores(backbone, states, -1, list(words), words)
    right = 100.0 * (scores.argmax(axis=1) == np.array([0, 1] * 10))
    assert table["zero-shot", NO].tolist() == right.tolist()
    assert set(table["zero-shot", "wrong"]) <= {0, 100 / 3, 200 / 3, 100}  # the mean over three instructions
    assert table["linear", "fitting"].mean() > 80  # the two words tell the classes apart
    whole = pd.concat(answers, names=["variant"]).reset_index("variant")
    accuracy = concepts.instruction_accuracy(whole, draws=20)
    accuracy = accuracy.set_index(["measure", "instruction", "variant"])["value"].sort_index()
    assert accuracy["zero-shot", NO, "baseline"] == pytest.approx(right.mean()) and len(accuracy) == 18
    effects = concepts.instruction_effects(whole, draws=20).set_index(["measure", "effect"])["difference"]
    gain = accuracy["calibrated", NO, "TP"] - accuracy["calibrated", NO, "baseline"]
    assert effects["calibrated", "TP, with no instruction"] == pytest.approx(gain) and len(effects) == 12
