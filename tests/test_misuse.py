"""What users did and the package did not foresee: each case stands for a kind, and the right answer is the test."""

import concurrent.futures
import os
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import _LLAMA, SENTENCES, build_tokenizer, cosines, random_model, save_tiny, tiny_backbone
from transformers import AutoConfig

from lib.core.backbone import Backbone, UnsupportedModelError, load_backbone
from lib.core.encoder import SentenceEncoder
from lib.core.prompts import Prompt
from lib.core.store import follow_umask, write_atomically
from lib.core.token_prepending import TokenPrepending
from lib.data import sources
from lib.evaluation.retrieval import BM25Retriever
from lib.run import __main__ as runner


def checkpoint(folder, change) -> str:
    """A tiny Llama on disk whose weights, name -> tensor, went through `change`."""
    weights = change(load_file(save_tiny(folder) / "model.safetensors"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


BROKEN = {
    "all under module.": (lambda w: {f"module.{key}": value for key, value in w.items()}, "has module.lm_head"),
    "one block's part": (lambda w: {k: v for k, v in w.items() if "2.mlp.up" not in k}, r"layers\.2\.mlp\.up_proj"),
    "no head": (lambda w: {key: value for key, value in w.items() if not key.startswith("lm_head")}, "lm_head.weight"),
    "another size": (lambda w: w | {"model.norm.weight": torch.ones(7)}, "model.norm.weight|size"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_checkpoint_that_lacks_weights_is_refused_by_name(case, tmp_path):
    change, named = BROKEN[case]
    with pytest.raises((UnsupportedModelError, RuntimeError, OSError), match=named):
        load_backbone(checkpoint(tmp_path, change), "float32")


def test_a_head_may_be_missing_where_it_is_not_used_or_tied(tmp_path):
    folder = checkpoint(tmp_path, BROKEN["no head"][0])
    encoders = [SentenceEncoder(of, "ke") for of in (tiny_backbone(), load_backbone(folder, "float32", head=False))]
    np.testing.assert_array_equal(*(encoder.encode(SENTENCES) for encoder in encoders))
    config = AutoConfig.from_pretrained(folder, tie_word_embeddings=True)
    config.save_pretrained(folder)
    tied = load_backbone(folder, "float32")
    assert torch.equal(tied.unembedding.weight, tied.embeddings.weight)


@pytest.mark.parametrize("method", [None, TokenPrepending(1, 2)])
def test_threads_that_share_a_model_get_their_own_rows(method):
    encoder = SentenceEncoder(tiny_backbone(), "prompteol", method, exit_layer=3)
    expected = {sentence: encoder.encode(sentence) for sentence in SENTENCES}
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            found = list(pool.map(encoder.encode, SENTENCES * 8))
    finally:
        sys.setswitchinterval(interval)
    for sentence, row in zip(SENTENCES * 8, found, strict=True):
        np.testing.assert_array_equal(row, expected[sentence])


def test_long_rope_is_cut_where_positions_would_hang_on_the_longest_row():
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0, 8.0, 16.0, 32.0],
            "original_max_position_embeddings": 64, "rope_theta": 10000.0}
    model = random_model("phi3", **_LLAMA, rope_parameters=rope, original_max_position_embeddings=64)
    backbone = Backbone.from_model(model, build_tokenizer(), "tiny-longrope")
    assert backbone.max_length == 64
    sentences = ["A dog runs.", "the old house and the snowy field where three children run across it " * 4, "Cold."]
    encoder = SentenceEncoder(backbone, "prompteol")
    with pytest.warns(UserWarning, match="1 of 3 sentences were cut"):
        together = encoder.encode(sentences)
    with pytest.warns(UserWarning, match="1 of 1 sentences were cut"):
        alone = np.stack([encoder.encode(sentence) for sentence in sentences])
    assert cosines(together, alone).min() > 0.99999


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "falcon_mamba", "rwkv"])
def test_models_that_count_their_states_otherwise_are_refused(kind):
    options = {"num_heads": 8, "head_dim": 8, "n_groups": 1} if kind == "mamba2" else {}
    options |= {"attention_hidden_size": 32} if kind == "rwkv" else {"state_size": 8}
    model = random_model(kind, hidden_size=32, num_hidden_layers=2, **options)
    with pytest.raises(UnsupportedModelError, match="begin after the first block"):
        Backbone.from_model(model, build_tokenizer(), f"tiny-{kind}")


def an_encoder(*choices, **more):
    return SentenceEncoder(tiny_backbone(), *choices, **more)


@pytest.mark.parametrize("error, named, call", [
    (TypeError, "tuples of strings", lambda: Prompt("mine", 'This: "{sentence}" is')),
    (TypeError, "tuples of strings", lambda: Prompt("mine", (1,))),
    (ValueError, "{sentence}", lambda: Prompt("mine", ("This: {text} is",))),
    (ValueError, "needs a template", lambda: Prompt("mine", ())),
    (ValueError, "holds 1 <PST> of its own, so not count=2",
     lambda: an_encoder(Prompt("mine", ('Sum <PST> "{sentence}" x',)), TokenPrepending(1, 3, count=2))),
    (TypeError, "got a str", lambda: an_encoder().encode_layers("Nope", [1])),  # and not four embeddings of one letter
    (ValueError, "list of layers is empty", lambda: an_encoder().encode_layers(SENTENCES, [])),
    (ValueError, "batch_size must be a whole number", lambda: an_encoder().encode(SENTENCES, batch_size=1.5)),
    (ValueError, "batch_size.*0", lambda: an_encoder().encode(SENTENCES, batch_size=0)),
    (ValueError, "A layer is a whole number", lambda: an_encoder(exit_layer=None)),
    (ValueError, "Unknown device 'gpu'", lambda: load_backbone(device="gpu")),
    (ValueError, f"torch sees {torch.cuda.device_count()} CUDA devices", lambda: load_backbone(device="cuda:99")),
    (ValueError, "no document holds a word", lambda: BM25Retriever(["a", "b"], ["!", "?"]))])
def test_a_slip_is_refused_and_named_where_it_is_made(error, named, call):
    with pytest.raises(error, match=named):
        call()


class Frame:
    columns = ["text"]

    def __iter__(self):
        return iter(self.columns)


@pytest.mark.parametrize("error, given, named", [
    (TypeError, {"a": "A dog.", "b": "A cat."}, "got a dict"), (TypeError, Frame(), "got a Frame"),
    (TypeError, ["A dog.", None], "Sentence 1 is NoneType"), (ValueError, ["A dog.", "\ud800"], "Sentence 1 holds"),
    (TypeError, None, "not iterable"), (ValueError, [], "empty")])
def test_what_is_no_list_of_strings_is_refused_before_anything_is_computed(error, given, named, monkeypatch):
    encoder = SentenceEncoder(tiny_backbone(), "none")
    monkeypatch.setattr(encoder, "_compute", None)
    with pytest.raises(error, match=named):
        encoder.encode(given)


def test_numpy_strings_and_series_are_texts():
    encoder, pandas = SentenceEncoder(tiny_backbone(), "none"), pytest.importorskip("pandas")
    expected = encoder.encode(SENTENCES)
    for given in (np.array(SENTENCES), pandas.Series(SENTENCES), tuple(SENTENCES)):
        np.testing.assert_array_equal(encoder.encode(given), expected)


def test_a_quoted_home_is_the_users(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    checkpoint(tmp_path / "model", dict)
    assert load_backbone("~/model", "float32").num_layers == tiny_backbone().num_layers


def test_files_have_the_modes_that_the_umask_says(tmp_path):
    before = os.umask(0o002)
    try:
        write_atomically(tmp_path / "file", b"x")
        (folder := tmp_path / "model").mkdir()
        (folder / "weights").touch(0o600)
        follow_umask(folder)
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in (tmp_path / "file", folder / "weights")] == [0o664, 0o664]


GIVEN = [
    ("01", "sts_pairs", "None", None), ("01", "sts_pairs", "8", 8), ("01", "prompts", "cot", ["cot"]),
    ("01", "prompts", "[cot, ke]", ["cot", "ke"]), ("01", "model", "2024-01-01", "2024-01-01"), ("03", "exits", "", []),
    ("01", "seeds", "1,2", [1, 2]), ("02", "complete", "TREC", ["TREC"]),
    ("04", "text", "Warning: the pasta was cold.", "Warning: the pasta was cold."),
]


@pytest.mark.parametrize("notebook, name, text, value", GIVEN)
def test_a_parameter_is_parsed_as_its_default_is(notebook, name, text, value):
    [parameters] = runner.parameters_of("smoke", [notebook], {name: text}).values()
    assert parameters[name] == value and type(parameters[name]) is type(value)


@pytest.mark.parametrize("name, text", [("sts_pairs", "few"), ("seeds", "1,a"), ("draws", "None"), ("draws", "1.5")])
def test_a_parameter_that_does_not_fit_ends_the_program_at_once(name, text, capsys):
    with pytest.raises(SystemExit) as end:
        runner.parameters_of("smoke", ["01"], {name: text})
    assert end.value.code == 2 and f"parameter {name}: '{text}' does not fit" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "- a", "a: [", "just words"])
def test_a_broken_profile_is_one_line(content, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runner, "CONFIGS", tmp_path)
    (tmp_path / "mine.yaml").write_text(content)
    for arguments in (["mine"], ["--list"]):
        with pytest.raises(SystemExit) as end:
            runner.main(arguments)
        assert end.value.code == 2 and "profile mine (configs/mine.yaml) is empty or broken" in capsys.readouterr().err


def test_a_data_folder_that_is_not_there_is_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(runner.kernels, "preload", lambda: None)
    monkeypatch.setenv("TP_DATA_DIR", str(tmp_path / "none"))
    sources._search.cache_clear()
    with pytest.raises(SystemExit) as end:
        runner.run({}, tmp_path, 0.0, {})
    assert end.value.code == 2 and "error: TP_DATA_DIR is" in capsys.readouterr().err
