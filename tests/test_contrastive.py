"""Contrastive training, against hand-computed losses and on a tiny random Llama; the pairs it may train on."""

import copy
import os
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import PeftModel
from tiny_models import assert_same, tiny_backbone

import lib.studies.contrastive as contrastive
import lib.studies.training_pairs as training_pairs
from lib.core.adapters import merge_adapter, merged_backbone, read_adapter
from lib.studies.contrastive import Training, batches, info_nce, train
from lib.data.sts import STS_FEATURES, DataSource, SampleDataWarning, find_source, load_sts
from lib.core.encoder import SentenceEncoder
from lib.data.sources import DATA, make_dataset
from lib.studies.training_pairs import make_pairs, normalised, positive_pairs
from lib.data.transfer import TRANSFER_FEATURES

pytestmark = pytest.mark.usefixtures("one_thread")

SAMPLE = DataSource("sample", DATA / "sample")
TINY = Training(steps=6, pairs=4, tokens=64, first_block=2, rank=4, alpha=8, learning_rate=2e-2)
TEXTS = [
    ("A man plays the flute.", "Someone is playing a flute."), ("The market fell on Tuesday.", "Stocks lost value on Tuesday."),
    ("Children run across the snow.", "Some kids run in the snow."), ("The plane takes off.", "An aircraft leaves."),
    ("A dog eats its bone.", "The bone is eaten by the dog."), ("She sings in the old house.", "A woman sings in a house."),
]


def toy_pairs():
    return make_pairs({"toy": TEXTS}, [])


def hand_computed(first, second, groups, temperature):
    losses = []
    for i in range(len(first)):
        cosine = [first[i] @ row / np.linalg.norm(first[i]) / np.linalg.norm(row) for row in second]
        terms = [np.exp(c / temperature) for j, c in enumerate(cosine) if j == i or groups[j] != groups[i]]
        losses.append(-np.log(np.exp(cosine[i] / temperature) / sum(terms)))
    return np.mean(losses)


def test_loss_by_hand():
    # Cosines: row 0 against both 1 and 0, row 1 against both 0.6 and 0.8. At temperature 1:
    # -log(e^1 / (e^1 + e^0)) = 0.31326 and -log(e^0.8 / (e^0.6 + e^0.8)) = 0.59814.
    first = torch.tensor([[2.0, 0.0], [3.0, 4.0]])
    second = torch.tensor([[1.0, 0.0], [0.0, 5.0]])
    assert info_nce(first, second, torch.tensor([0, 1]), 1.0).item() == pytest.approx((0.31326 + 0.59814) / 2, abs=1e-5)


@pytest.mark.parametrize("groups", [[0, 1, 2, 3, 4], [0, 1, 0, 2, 1], [3, 3, 3, 3, 0]])
def test_loss_equals_a_loop_without_the_negatives_of_the_same_group(groups):
    generator = np.random.default_rng(0)
    first, second = generator.normal(size=(2, 5, 8))
    ours = info_nce(torch.tensor(first), torch.tensor(second), torch.tensor(groups), 0.3).item()
    assert ours == pytest.approx(hand_computed(first, second, groups, 0.3), rel=1e-5)


def test_one_group_leaves_no_negative_and_no_gradient():
    first = torch.randn(3, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    loss = info_nce(first, first.detach().flip(0), torch.zeros(3, dtype=torch.long), 0.05)
    loss.backward()
    assert loss.item() == 0 and first.grad.abs().max() == 0


def test_batches_take_every_row_once_a_round_and_none_twice():
    chosen = batches(count=10, size=4, steps=5, seed=1)
    assert sorted(np.concatenate(chosen[:2]).tolist() + chosen[2].tolist())[0] == 0
    assert all(len(set(batch)) == len(batch) <= 4 for batch in chosen)
    assert set(np.concatenate(chosen[:3])) == set(range(10))  # the first round ends within the third batch
    assert [b.tolist() for b in batches(10, 4, 5, 1)] == [b.tolist() for b in chosen]
    assert [b.tolist() for b in batches(10, 4, 5, 2)] != [b.tolist() for b in chosen]
    assert [len(b) for b in batches(count=3, size=64, steps=2, seed=0)] == [3, 3]


def test_pairs_leave_out_what_evaluations_hold():
    positives = {
        "one": [("A dog runs.", "a  DOG is running"), ("It rains!", "Rain falls"), ("Same words.", "same words !")],
        "two": [("A dog is running.", "A dog runs"), ("The sun rises", "Dawn breaks"), ("Dawn breaks.", "Morning comes")],
    }
    pairs = make_pairs(positives, ["it RAINS", "Nothing of this."])
    assert list(zip(pairs.first, pairs.second)) == [positives["one"][0], positives["two"][1], positives["two"][2]]
    assert pairs.provenance["pairs"] == {
        "one": {"positive": 3, "in_evaluation": 1, "equal": 1, "repeated": 0, "kept": 1},
        "two": {"positive": 3, "in_evaluation": 0, "equal": 0, "repeated": 1, "kept": 2},
    }
    # "Dawn breaks" links the last two pairs, so that their other sentences are no negatives of each other either.
    assert pairs.groups[1] == pairs.groups[2] != pairs.groups[0]


def test_no_pair_left_is_an_error():
    with pytest.raises(ValueError, match="No positive pair is left"):
        make_pairs({"one": [("A.", "B.")]}, ["b"])


def test_normalised_compares_words_only():
    assert normalised("  It's  the DOG , isn't it ?") == normalised("it 's the dog, isn 't it") == "it s the dog isn t it"


@pytest.fixture
def written_data(monkeypatch):
    """Data sets in the place of the real ones: task and split -> (sentence1, sentence2, score)."""
    sts = {(task, split): [(f"{task} {split}", "Only here.", 5.0)] for task, splits in {
        **dict.fromkeys(("STS12", "STS13", "STS14", "STS15", "STS16"), ["test"]),
        **dict.fromkeys(("STS-B", "SICK-R"), ["train", "dev", "test"]),
    }.items() for split in splits}
    sts["STS-B", "train"] = [("a1", "a2", 4.0), ("b1", "b2", 3.9), ("c1", "c2", 5.0), ("d1", "d2", 4.5)]
    sts["SICK-R", "train"] = [("e1", "e2", 4.2), ("f1", "f2", 4.1), ("g1", "g2", 4.9)]
    sts["STS14", "test"] = [("C1 !", "x", 1.0)]
    sts["SICK-R", "dev"] = [("y", "g2 .", 1.0)]
    mrpc = [("train", "h1", "h2", 1), ("train", "i1", "i2", 0), ("train", "j1", "j2", 1), ("test", "J2", "z", 0)]

    def sts_rows(task, split, source):
        rows = [dict(zip(("sentence1", "sentence2", "score"), row)) | {"subset": ""} for row in sts[task, split]]
        return make_dataset(rows, STS_FEATURES, source, {f"{task} {split}": "0"}, task=task, split=split)

    def mrpc_rows(task, source):
        assert task == "MRPC"
        rows = [dict(zip(("split", "sentence1", "sentence2", "label"), row)) for row in mrpc]
        return make_dataset(rows, TRANSFER_FEATURES, source, {"mrpc": "0"}, task=task)

    monkeypatch.setattr(training_pairs, "load_sts", sts_rows)
    monkeypatch.setattr(training_pairs, "load_transfer", mrpc_rows)
    monkeypatch.setattr(training_pairs, "find_source", lambda: DataSource("folder", DATA))


@pytest.mark.usefixtures("written_data")
def test_positive_pairs_come_from_training_parts_by_score_and_label():
    pairs = positive_pairs()
    assert pairs.first == ["a1", "d1", "e1", "h1"]
    parts = [(d["task"], d.get("split")) for d in pairs.provenance["data"]]
    assert len(parts) == 12 and {part for part in parts if part[1] != "test"} == {
        ("STS-B", "train"), ("SICK-R", "train"), ("STS-B", "dev"), ("SICK-R", "dev"), ("MRPC", None),
    }


def test_sample_pairs_are_loud_and_not_from_its_test_part(monkeypatch):
    monkeypatch.setattr(training_pairs, "find_source", lambda: SAMPLE)
    with pytest.warns(SampleDataWarning, match="sample data"):
        pairs = positive_pairs()
    data = load_sts("sample", "test", SAMPLE)
    test = {normalised(text) for column in ("sentence1", "sentence2") for text in data[column]}
    assert len(pairs.groups) == 24
    assert not set(map(normalised, pairs.first + pairs.second)) & test


@pytest.mark.skipif("TP_DATA_DIR" not in os.environ, reason="TP_DATA_DIR is not set: no real evaluation data")
def test_real_pairs():
    pairs = positive_pairs()
    kept = {name: (count["positive"], count["kept"]) for name, count in pairs.provenance["pairs"].items()}
    assert kept == {"STS-B train": (1406, 41), "SICK-R train": (1357, 9), "MRPC train": (2753, 2166)}
    test = {normalised(s) for c in ("sentence1", "sentence2") for s in load_sts("STS-B", "test", find_source())[c]}
    assert not set(map(normalised, pairs.first + pairs.second)) & test


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny model trained on the toy pairs: its adapter's folder, its provenance and the model as it was after training."""
    models, save = [], contrastive.save_adapter
    folder = tmp_path_factory.mktemp("adapters") / "toy"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contrastive, "save_adapter", lambda model, *rest: models.append(model) or save(model, *rest))
        about = train(tiny_backbone("llama"), toy_pairs(), replace(TINY, steps=12), folder)
    return folder, about, models[0].eval()


def test_the_loss_falls(trained):
    losses = trained[1]["losses"]
    assert len(losses) == 12 and np.mean(losses[-3:]) < 0.5 * np.mean(losses[:3])


def test_the_backbone_and_the_global_generator_stay_as_they_were(tmp_path):
    backbone = tiny_backbone("llama")
    before = {key: value.clone() for key, value in backbone.model.state_dict().items()}
    modules = {name: type(module) for name, module in backbone.model.named_modules()}
    state = torch.get_rng_state()
    train(backbone, toy_pairs(), TINY, tmp_path / "a")
    merged_backbone(backbone, tmp_path / "a", "merged")
    after = backbone.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert modules == {name: type(module) for name, module in backbone.model.named_modules()}
    assert torch.equal(state, torch.get_rng_state())
    assert not any(parameter.requires_grad for parameter in backbone.model.parameters())


def test_a_seed_decides_the_adapter(tmp_path):
    def digest(name, **change):
        return train(tiny_backbone("llama"), toy_pairs(), replace(TINY, **change), tmp_path / name)["adapter_sha256"]

    first = digest("a")
    torch.manual_seed(5)
    assert digest("b") == first
    assert digest("c", seed=1) != first


def test_only_the_upper_blocks_have_a_lora(trained):
    names = [name for name, parameter in trained[2].named_parameters() if "lora_" in name]
    assert {int(name.split("layers.")[1].split(".")[0]) for name in names} == {2, 3}
    assert {name.split(".lora_")[0].rsplit(".", 1)[1] for name in names} == set(TINY.targets)


@torch.inference_mode()
def test_saved_loaded_and_merged_it_embeds_as_the_trained_model(trained):
    folder, _, model = trained
    backbone = tiny_backbone("llama")
    merged = merged_backbone(backbone, folder, "merged")
    texts = [text for pair in TEXTS for text in pair]
    ours = SentenceEncoder(merged, "prompteol").encode(texts)
    prompts = [f'This sentence : "{text}" means in one word:"' for text in texts]
    inputs = [backbone.tokenizer(prompt, return_tensors="pt") for prompt in prompts]
    theirs = [model(**row, output_hidden_states=True).hidden_states[-1][0, -1] for row in inputs]
    assert_same(ours, torch.stack(theirs))
    plain = SentenceEncoder(backbone, "prompteol").encode(texts)
    assert np.abs(ours - plain).max() > 0.1 * np.abs(plain).max()
    assert merged.fingerprint != backbone.fingerprint
    assert not any("lora" in key for key in merged.model.state_dict())


def test_provenance(trained):
    folder, about, _ = trained
    assert read_adapter(folder) == about
    assert about["config"]["seed"] == 3407 and about["config"]["temperature"] == 0.05
    assert about["backbone"]["model"] == "tiny-llama" and about["pairs"]["toy"]["kept"] == 6
    assert about["seconds"] >= 0 and len(about["code"]) == 16
    assert [path.name for path in folder.parent.iterdir()] == ["toy"]  # nothing temporary is left


def test_a_damaged_or_old_adapter_is_not_used(tmp_path, monkeypatch):
    folder = tmp_path / "a"
    assert read_adapter(folder) is None
    train(tiny_backbone("llama"), toy_pairs(), replace(TINY, steps=1), folder)
    with monkeypatch.context() as patch:
        patch.setenv("TP_FRESH_SINCE", str(folder.stat().st_mtime + 1000))
        assert read_adapter(folder) is None
    file = folder / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.warns(UserWarning, match="damaged"):
        assert read_adapter(folder) is None


def test_an_adapter_of_another_model_is_refused(trained):
    headless = copy.deepcopy(tiny_backbone("llama").base)  # its modules are named otherwise
    with pytest.raises(ValueError, match="does not fit"):
        merge_adapter(headless, trained[0])


def test_an_interrupt_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(PeftModel, "save_pretrained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_backbone("llama"), toy_pairs(), replace(TINY, steps=1), tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_the_embedder_is_trained_once_and_then_read(tmp_path, monkeypatch):
    backbone = tiny_backbone("llama")
    monkeypatch.setattr(contrastive, "ADAPTERS", tmp_path)
    monkeypatch.setattr(contrastive, "find_source", lambda: SAMPLE)
    monkeypatch.setattr(training_pairs, "find_source", lambda: SAMPLE)
    monkeypatch.setattr(contrastive, "load_backbone", lambda name, dtype, device: backbone)
    with pytest.warns(SampleDataWarning):
        first, about = contrastive.smollm2_eol_cse(backbone, replace(TINY, sample_steps=2))
    assert len(about["losses"]) == 2 and about["data"][0]["source"]["kind"] == "sample"
    assert first.name == "smollm2-eol-cse" and first.title == "smollm2-eol-cse"
    with warnings.catch_warnings(), monkeypatch.context() as patch:
        warnings.simplefilter("ignore", SampleDataWarning)
        patch.setattr(contrastive, "train", lambda *_: pytest.fail("trained again"))
        again, same = contrastive.smollm2_eol_cse(backbone, replace(TINY, sample_steps=2))
        assert same == about and again.fingerprint == first.fingerprint and again.revision == first.revision
        with pytest.raises(pytest.fail.Exception, match="trained again"):
            contrastive.smollm2_eol_cse(backbone, replace(TINY, sample_steps=2, seed=7))
