"""Contrastive training, against hand-computed losses and on a tiny random Llama; what it may train on; its adapters."""

import copy
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from tiny_models import assert_same, prompt_ids, tiny_backbone

from lib import PROMPTS, SentenceEncoder
from lib.core.adapters import merge_adapter, merged_backbone, read_adapter
from lib.core.code_version import dependencies
from lib.data.sources import DATA, DataSource, EvaluationData, SampleDataWarning
from lib.studies import train_embedder
from lib.studies.train_embedder import Training, batches, info_nce, make_pairs, positive_pairs, train

TINY = Training(steps=6, pairs=4, tokens=128, first_block=2, rank=4, alpha=8, learning_rate=2e-2, sample_steps=2)
PAIRS = make_pairs({"toy": [
    ("A man plays the flute.", "Someone is playing a flute."), ("The market fell on Tuesday.", "Stocks lost value."),
    ("Children run across the snow.", "Some kids run in the snow."), ("The plane takes off.", "An aircraft leaves."),
    ("A dog eats its bone.", "The bone is eaten by the dog."), ("She sings in the old house.", "A woman sings.")]}, [])
TEXTS = [*PAIRS.first, *PAIRS.second]


@pytest.mark.parametrize("groups", [[0, 1, 2, 3, 4], [0, 1, 0, 2, 1], [3, 3, 3, 3, 3]])
def test_loss_equals_a_loop_without_the_negatives_of_the_same_group(groups):
    (first, second), losses = np.random.default_rng(0).normal(size=(2, 5, 8)), []
    for i in range(5):
        terms = [np.exp(first[i] @ row / np.linalg.norm(first[i]) / np.linalg.norm(row) / 0.3) for row in second]
        losses.append(-np.log(terms[i] / sum(t for j, t in enumerate(terms) if j == i or groups[j] != groups[i])))
    ours = info_nce(torch.tensor(first), torch.tensor(second), torch.tensor(groups), 0.3)
    assert ours.item() == pytest.approx(np.mean(losses), rel=1e-5)


def test_batches_take_every_row_once_a_round_and_none_twice():
    chosen = [batch.tolist() for batch in batches(count=10, size=4, steps=5, seed=1)]
    assert all(len(set(batch)) == len(batch) <= 4 for batch in chosen) and len(set(sum(chosen[:3], []))) == 10


def test_pairs_leave_out_what_evaluations_hold():
    positives = {
        "one": [("A dog runs.", "a  DOG is running"), ("It rains!", "Rain falls"), ("Same words.", "same words !")],
        "two": [("A dog is running.", "A dog runs"), ("The sun rises", "Dawn breaks"), ("Dawn breaks.", "It dawns")]}
    pairs = make_pairs(positives, ["it RAINS", "Nothing of this."])
    assert list(zip(pairs.first, pairs.second)) == [positives["one"][0], positives["two"][1], positives["two"][2]]
    assert pairs.provenance["pairs"] == {
        "one": {"positive": 3, "in_evaluation": 1, "equal": 1, "repeated": 0, "kept": 1},
        "two": {"positive": 3, "in_evaluation": 0, "equal": 0, "repeated": 1, "kept": 2}}
    # "Dawn breaks" links the last two pairs, so that their other sentences are no negatives of each other either.
    assert pairs.groups[1] == pairs.groups[2] != pairs.groups[0]
    with pytest.raises(ValueError, match="No positive pair is left"):
        make_pairs({"one": [("A.", "B.")]}, ["b"])


def test_positive_pairs_come_from_training_parts_by_score_and_label(monkeypatch):
    parts = {
        "STS-B train": "a1 a2 4.0, b1 b2 3.9, c1 c2 5, d1 d2 4.5", "SICK-R train": "e1 e2 4.2, f1 f2 4.1, g1 g2 4.9",
        "MRPC all": "h1 h2 1 train, i1 i2 0 train, j1 j2 1 train, J2 z 0 test", "STS14 test": "C1! x 1",
        "SICK-R dev": "y g2. 1"}
    def load(task, split, source):
        rows = [row.split() for row in parts.get(f"{task} {split}", "p q 5").split(", ")]
        columns = ("sentence1", "sentence2", "score", "label", "split")
        table = [dict(zip(columns, (a, b, float(n), float(n), "".join(of)))) for a, b, n, *of in rows]
        return EvaluationData(task, Dataset.from_list(table), {"part": f"{task} {split}"})
    monkeypatch.setattr(train_embedder, "load_sts", load)
    monkeypatch.setattr(train_embedder, "load_transfer", lambda task, source: load(task, "all", source))
    monkeypatch.setattr(train_embedder, "find_source", lambda: DataSource("folder", DATA))
    pairs = positive_pairs()
    assert pairs.first == ["a1", "d1", "e1", "h1"]
    used = {about["part"] for about in pairs.provenance["data"]}
    assert len(used) == 12 and {"STS-B train", "STS-B dev", "SICK-R dev", "STS16 test", "MRPC all"} < used


@pytest.mark.skipif("TP_DATA_DIR" not in os.environ, reason="TP_DATA_DIR is not set: no real evaluation data")
def test_real_pairs():
    kept = {name: (count["positive"], count["kept"]) for name, count in positive_pairs().provenance["pairs"].items()}
    assert kept == {"STS-B train": (1406, 41), "SICK-R train": (1357, 9), "MRPC train": (2753, 2166)}


def test_training_hangs_on_its_seed_and_leaves_nothing_else_behind(backbone, tmp_path, monkeypatch):
    state = torch.get_rng_state()
    first = train(backbone, PAIRS, TINY, tmp_path / "a")["adapter_sha256"]
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(5)
    assert train(backbone, PAIRS, TINY, tmp_path / "b")["adapter_sha256"] == first
    assert train(backbone, PAIRS, replace(TINY, seed=1), tmp_path / "c")["adapter_sha256"] != first
    monkeypatch.setattr(PeftModel, "save_pretrained", lambda _, folder: folder.mkdir())
    with pytest.raises(FileNotFoundError):  # interrupted: no weights, and nothing that looks like an adapter
        train(backbone, PAIRS, replace(TINY, steps=1), tmp_path / "d")
    assert read_adapter(tmp_path / "d") is None and read_adapter(tmp_path / "a")["adapter_sha256"] == first


def test_the_loss_falls_and_the_merged_adapter_embeds_as_the_saved_one(backbone, tmp_path):
    about = train(backbone, PAIRS, replace(TINY, steps=12), tmp_path / "toy")
    assert np.mean(about["losses"][-3:]) < 0.5 * np.mean(about["losses"][:3])
    assert read_adapter(tmp_path / "toy") == about and about["pairs"]["toy"]["kept"] == 6
    model = PeftModel.from_pretrained(copy.deepcopy(backbone.model), tmp_path / "toy").eval()
    assert {name.split("layers.")[1][0] for name in model.state_dict() if "lora_" in name} == {"2", "3"}
    ours = SentenceEncoder(merged_backbone(backbone, tmp_path / "toy", "merged"), "prompteol").encode(TEXTS)
    for text, row in zip(TEXTS, ours):
        ids = torch.tensor([prompt_ids(backbone, text)])
        assert_same(row, model(ids, output_hidden_states=True).hidden_states[-1][0, -1].detach(), text)
    assert np.abs(ours - SentenceEncoder(backbone, "prompteol").encode(TEXTS)).max() > 0.1 * np.abs(ours).max()
    with pytest.raises(ValueError, match="does not fit"):
        merge_adapter(copy.deepcopy(backbone.base), tmp_path / "toy")  # a model whose modules are named otherwise


@pytest.fixture
def count(tmp_path, monkeypatch):
    """Asks for the adapter of the tiny model on sample data; gives its folder and how often one was trained."""
    trainings = []
    monkeypatch.setattr(train_embedder, "CACHE", tmp_path)
    monkeypatch.setattr(train_embedder, "find_source", lambda: DataSource("sample", DATA / "sample"))
    monkeypatch.setattr(train_embedder, "load_backbone", lambda *_: tiny_backbone("llama"))
    monkeypatch.setattr(train_embedder, "train", lambda *arguments: trainings.append(train(*arguments)))
    def call(config=TINY, fresh_since=0.0):
        with pytest.warns(SampleDataWarning):
            return train_embedder.trained_adapter(tiny_backbone("llama"), fresh_since, config), len(trainings)
    return call


def test_an_adapter_is_trained_again_exactly_when_something_that_decides_it_changed(count, monkeypatch):
    folder, _ = count()
    about = read_adapter(folder)
    assert len(about["losses"]) == TINY.sample_steps and about["pairs"]["sample dev"]["kept"] == 24
    monkeypatch.setitem(PROMPTS, "new", replace(PROMPTS["prompteol"], name="new"))
    assert count() == (folder, 1)
    assert count(fresh_since=folder.stat().st_mtime + 1000) == (folder, 2)
    assert count(replace(TINY, seed=7))[1] == 3
    monkeypatch.setitem(PROMPTS, "prompteol", replace(PROMPTS["prompteol"], templates=("{sentence}",)))
    assert count()[1] == 4
    code = dependencies("lib.studies.train_embedder")
    assert {"lib.core.tokens", "lib.core.hardware", "lib.core.adapters", "lib.data.sts"} <= code
    assert not code & {"lib.core.encoder", "lib.core.embedders", "lib.core.token_prepending"}


@pytest.mark.parametrize("damage", ["model.safetensors", "model.safetensors ?", "config.json", "config.json {"])
def test_a_damaged_adapter_is_trained_again(count, damage):
    (folder, _), (file, *content) = count(), f"adapter_{damage}".split()
    (folder / file).write_text(*content) if content else (folder / file).unlink()
    with pytest.warns(UserWarning, match="damaged"):
        assert count() == (folder, 2)
    assert read_adapter(folder) and count() == (folder, 2)
