"""`lib.studies.concepts`, `lib.studies.instructions`, `lib.data.relatedness`: against counts by hand, the hub as a folder."""

import hashlib
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from tiny_models import tiny_backbone

from lib.studies import concepts
from lib.data import relatedness, sources
from lib.evaluation.alignment import decode_logits
from lib.studies.concepts import KINDS, load_minimal_pairs, minimal_pair_table, separation, similarity_scores, token_overlap
from lib.data.sts import DataError
from lib.core.encoder import SentenceEncoder
from lib.studies.instructions import INSTRUCTIONS, LABEL_WORDS, TASKS, label_ids, linear_predictions, zero_shot
from lib.report.plots_concepts import accuracy_by_instruction, similarity_by_kind
from lib.data.relatedness import load_str2022
from lib.core.token_prepending import TokenPrepending
from lib.evaluation.vocabulary import DEFAULT_RULE, token_classes

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def backbone():
    return tiny_backbone("llama")


def test_minimal_pairs():
    pairs = load_minimal_pairs()
    assert pairs["kind"].value_counts(sort=False).to_dict() == dict.fromkeys(KINDS, 16)
    assert (pairs["sentence1"] != pairs["sentence2"]).all() and not pairs.duplicated().any()
    for row in pairs[pairs["kind"] == "role swap"].itertuples():  # the same words, in another order
        assert sorted(row.sentence1.lower().strip(".").split()) == sorted(row.sentence2.lower().strip(".").split())


def test_overlap_against_sets(backbone):
    generator = np.random.default_rng(0)
    first, second = generator.normal(size=(2, 5, 32)).astype(np.float32)
    second[0] = first[0]
    found = token_overlap(backbone, first, second, -1, k=7)
    logits = decode_logits(backbone, np.concatenate([first, second]))
    classes = token_classes(backbone.tokenizer, logits.shape[1], DEFAULT_RULE)
    merged = np.stack([np.max(logits[:, classes == c], axis=1) for c in np.unique(classes[classes >= 0])], axis=1)
    top = np.argsort(-(merged - merged.mean(axis=0)), axis=1)[:, :7]
    assert found.tolist() == pytest.approx([len({*a} & {*b}) / 7 for a, b in zip(top[:5], top[5:])])
    assert found[0] == 1


@pytest.mark.filterwarnings("ignore:invalid value encountered in divide:RuntimeWarning")  # six pairs: some resamples are constant
def test_scores_of_cosine_overlap_and_both():
    gold = np.arange(6.0)
    table, resampled = similarity_scores(pd.DataFrame({"gold": gold, "cosine": gold[::-1], "overlap": [0, 1, 2, 3, 5, 4]}), draws=30)
    assert table["measure"].tolist() == ["cosine", "overlap", "both"]
    assert table["score"][:2].tolist() == pytest.approx([-100, 100 * 33 / 35])
    assert table["gain"][:2].tolist() == pytest.approx([0, 100 * 68 / 35])
    assert resampled.shape == (30, 3)


def test_what_pairs_share_and_what_changes(backbone, monkeypatch):
    pairs = pd.DataFrame({"kind": ["antonym", "role swap"], "sentence1": ["dog cat", "dog cat"], "sentence2": ["dog bird", "cat dog"]})
    encoder = SentenceEncoder(backbone, "prompteol")
    table = minimal_pair_table(encoder, backbone, pairs, k=5)
    assert np.isnan(table["changed"][1]) and 0 <= table["shared"][1] <= 1 and 0 <= table["changed"][0] <= 1
    monkeypatch.setattr(concepts, "HIGHEST", 300)
    whole = minimal_pair_table(encoder, backbone, pairs, k=5)
    assert whole["changed"][0] == 1 and whole["shared"].tolist() == [1, 1]  # deep enough, every token is found


def test_separation_by_hand():
    value, low, high = separation([1, 3, 2, 3], [False, True, False, False], draws=100)
    assert value == pytest.approx((1 + 1 + 0.5) / 3) and low <= value <= high
    assert separation([2, 1], [True, False], draws=10) == (1, 1, 1)


def test_every_task_has_an_instruction_and_words():
    for aspect, classes in TASKS.values():
        assert aspect in INSTRUCTIONS and set(classes) <= set(LABEL_WORDS)
    words = [word for name in LABEL_WORDS for word in LABEL_WORDS[name]]
    assert len(words) == len(set(words))


def test_instructions_differ_only_after_the_sentence_and_take_tp(backbone):
    starts = {prompt.templates[0].partition("{sentence}")[0] for prompt in INSTRUCTIONS.values()}
    assert starts == {'This sentence : "'}
    for prompt in INSTRUCTIONS.values():
        assert SentenceEncoder(backbone, prompt, TokenPrepending(1, 2)).encode(["A dog."]).shape == (1, 32)


@pytest.fixture
def words():
    """A vocabulary of label words, and a backbone whose logits are its states."""
    vocabulary = {"good": 0, " good": 1, "bad": 2, "other": 3}
    encode = lambda text, **_: {"input_ids": [vocabulary[text]] if text in vocabulary else [3, 3]}  # noqa: E731
    linear = torch.nn.Linear(4, 4, bias=False)
    linear.weight.data = torch.eye(4)
    return SimpleNamespace(tokenizer=encode, unembedding=linear.requires_grad_(False), final_norm=None, num_layers=1, name="words",
                           layer_index=lambda n: n % 2)


def test_label_words_of_one_token(words):
    assert label_ids(words.tokenizer, ("negative", "positive")) == [[2], [0, 1]]
    with pytest.raises(ValueError, match="None of the words of 'number'"):
        label_ids(words.tokenizer, ("number",))


def test_zero_shot_by_hand_and_what_calibration_does(words):
    states = np.array([[4, 4, 1, 0], [4, 4, 3, 0], [2, 4, 1, 0]], np.float32)  # "good" is always above "bad"
    assert zero_shot(words, states, 1, ("negative", "positive"), calibrate=False).tolist() == [1, 1, 1]
    # Means: 3.33, 4, 1.67. Positive: 0.33, 0.33, -0.67; negative: -0.67, 1.33, -0.67.
    assert zero_shot(words, states, 1, ("negative", "positive"), calibrate=True).tolist() == [1, 0, 0]


def test_linear_predictions_find_what_is_there_and_nothing_else():
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, 80)
    noise = generator.normal(size=(80, 4))
    assert (linear_predictions(noise + 6 * labels[:, None], labels) == labels).mean() == 1
    assert 0.25 < (linear_predictions(noise, labels) == labels).mean() < 0.75


TABLE = 'PairID,Text,Score\n1,"A dog runs.\nA ""cat"", too.",0.5\n2,"One.\nTwo.",1\n'


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("TP_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(relatedness, "ROWS", 2)
    (tmp_path / "str-2022").mkdir()
    return tmp_path / "str-2022"


def test_str2022_from_a_folder(folder):
    (folder / relatedness.FILE).write_text(TABLE)
    data = load_str2022()
    assert data["sentence1"][:] == ["A dog runs.", "One."] and data["sentence2"][0] == 'A "cat", too.'
    assert data["score"][:] == [0.5, 1.0]
    assert hashlib.sha256(TABLE.encode()).hexdigest() in data.info.description


@pytest.mark.parametrize("old, new, message", [
    ("0.5", "1.5", "pair 1: expected two sentences"), ("One.\nTwo.", "One.", "pair 2: expected two sentences"),
    ("Score", "score", "pair 1: expected two sentences"), ('2,"One.\nTwo.",1\n', "", "found 1 pairs, expected 2"),
])
def test_str2022_that_is_malformed(folder, old, new, message):
    (folder / relatedness.FILE).write_text(TABLE.replace(old, new))
    with pytest.raises(DataError, match=message):
        load_str2022()


def test_str2022_that_is_nowhere_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.delenv("TP_DATA_DIR", raising=False)
    monkeypatch.setenv("TP_HUB_UNREACHABLE", "1")
    monkeypatch.setattr(sources, "DATA", tmp_path)
    with pytest.raises(DataError, match="STR-2022 is not here.*TP_HUB_UNREACHABLE is set.*put its file"):
        load_str2022()


def test_figures():
    pairs = load_minimal_pairs().assign(method="m", cosine=0.5, overlap=0.1)
    figure = similarity_by_kind(pd.concat([pairs, pairs.assign(method="n")]), "title")
    assert len(figure.axes) == 4 and figure.axes[0].get_yticklabels()[0].get_text() == "paraphrase"
    keys = pd.MultiIndex.from_product([["zero-shot", "linear"], ["CR"], ["fitting", "wrong", "none"], [False, True]])
    accuracy = pd.DataFrame(list(keys), columns=["measure", "task", "instruction", "TP"]).assign(accuracy=50.0, low=40.0, high=60.0)
    figure = accuracy_by_instruction(accuracy, "title")
    assert [text.get_text() for text in figure.legends[0].get_texts()][:2] == ["fitting", "fitting + TP"]
    plt.close("all")
