"""Every format and family of embedder on tiny random models, against a computation of its own; the table of them."""

import copy
import json
from dataclasses import replace
from unittest.mock import MagicMock, Mock

import numpy as np
import pytest
import tiny_models
import torch
import transformers
from huggingface_hub.errors import GatedRepoError
from peft import LoraConfig, get_peft_model
from tiny_models import FAMILIES, assert_same, build_tokenizer, random_model, randomise, save_tiny, tiny_backbone
from tokenizers.processors import TemplateProcessing
from torch.nn.functional import normalize

from lib import EmbeddingStore, SentenceEncoder, TokenPrepending, load_backbone
from lib.core import embedders
from lib.core.backbone import ModelNotFoundError, UnsupportedModelError
from lib.core.embedders import EMBEDDERS, Entry, embedder_of, embedder_table, load_embedder, status
from lib.evaluation.alignment import decode_logits

TEXTS = ["A man is playing a large flute on the street .", "The market fell by 3.5 %.", "The dog's bone [1]", "Nothing"]
TASK = "Given a web search query, retrieve relevant passages that answer the query"
TP = TokenPrepending(1, 2)
EOL = 'This sentence : "{}" means in one word:"'


def load(name: str, folder, base=None, backbone=None, store=None, dtype="float32", **changes):
    """An embedder of the table with a local folder in the place of the hub."""
    entry = replace(EMBEDDERS[name], hub=str(folder), backbone=str(base or folder), **changes)
    return load_embedder(entry, dtype, "cpu", backbone, store)


def saved(folder, family: str, part: str = "model"):
    return save_tiny(folder / f"{family}-{part}", family, part)


def lora(folder, family: str, part: str = "model", seed: int = 1):
    """A random LoRA on a tiny model: its folder and the model with it."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(copy.deepcopy(getattr(tiny_backbone(family), part)), config)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data = 0.3 * torch.randn(weight.shape, generator=generator)
    model.save_pretrained(folder / f"lora{seed}")
    return str(folder / f"lora{seed}"), model.eval()


@torch.inference_mode()
def read(model, rows, part=lambda states, ids: states[-1], layer: int = -1, **inputs) -> torch.Tensor:
    """Of each unpadded row the `part` of its states (tokens, hidden), by the model's own `output_hidden_states`."""
    outputs = [model(input_ids=torch.tensor([ids]), output_hidden_states=True, **inputs) for ids in rows]
    return torch.stack([part(output.hidden_states[layer][0], ids) for output, ids in zip(outputs, rows)])


def test_the_table_says_what_may_be_had_and_a_silent_hub_is_asked_once(monkeypatch):
    def gated(repo):
        if repo.startswith("meta-llama"):
            raise GatedRepoError("403: the licence is to be accepted\nmore", response=MagicMock())
    silent, cached = Mock(side_effect=OSError("no way")), {("facebook/opt-1.3b", "pytorch_model.bin")}
    monkeypatch.setattr(embedders, "_silence", [])
    monkeypatch.setattr(embedders, "auth_check", gated)
    monkeypatch.setattr(embedders, "try_to_load_from_cache", lambda *file: "path" if file in cached else None)
    assert status(EMBEDDERS["llama2"]).endswith("not on this machine; 403: the licence is to be accepted")
    assert status(EMBEDDERS["opt_eol"]) == "ready"
    assert status(EMBEDDERS["opt_eol_cse"]) == "on the hub: royokong/prompteol-opt-1.3b"
    cached.clear()
    monkeypatch.setattr(embedders, "auth_check", silent)
    table = embedder_table().set_index("embedder")
    eight = "SGPT_nli SGPT_msmarco OPT_EOL OPT_EOL+CSE LLaMA_EOL LLaMA_EOL+CSE GritLM LLM2Vec"
    assert len(table) == 26 and set(table["paper"]) - {""} == set(eight.split()) and silent.call_count == 1
    assert table.loc["opt_eol", "status"] == "not reachable: facebook/opt-1.3b not on this machine; no way"
    assert table.loc["e5", "aligned"] == "no" and table.loc["opt_eol", "aligned"] == "not stated"
    for name, error in {"opt_eol": ModelNotFoundError, "sentence_t5": ValueError, "smollm2-eol-cse": OSError}.items():
        with pytest.raises(error, match=f"{name}: not "):
            load_embedder(name)
    with pytest.raises(ValueError, match="Unknown embedder 'sbert'"):
        load_embedder("sbert")


def test_gpt_neo_weighted_mean_in_brackets_that_are_tokens_of_their_own(tmp_path):
    base, tokenizer = saved(tmp_path, "gpt_neo"), tiny_backbone("gpt_neo").tokenizer
    embedder = load("sgpt_msmarco", saved(tmp_path, "gpt_neo", "base"), base)
    def weighted(states, ids):
        return torch.arange(1.0, len(ids) + 1) / sum(range(len(ids) + 1)) @ states
    for encoder, frame in ((embedder.query, "[]"), (embedder.document, "{}")):
        before, after = tokenizer.convert_tokens_to_ids(list(frame))
        rows = [[before, *tokenizer(text)["input_ids"], after] for text in TEXTS]
        assert_same(encoder.encode(TEXTS), read(tiny_backbone("gpt_neo").model, rows, weighted), frame)
    assert embedder.decoder.name == str(base) and embedder.query.backbone.unembedding is embedder.decoder.unembedding


def test_opt_decodes_to_its_next_token_logits_and_shares_the_baseline_s_store(tmp_path):
    model, tokenizer, store = tiny_backbone("opt").model, tiny_backbone("opt").tokenizer, tmp_path / "store"
    embedder = load("opt_eol", saved(tmp_path, "opt"), store=EmbeddingStore(store))
    rows = [tokenizer(EOL.format(text))["input_ids"] for text in ("Nothing.", "A man.")]
    embeddings = embedder.query.encode(["Nothing", "A man."])
    assert_same(embeddings, read(model, rows))
    with torch.inference_mode():
        logits = torch.stack([model(torch.tensor([row])).logits[0, -1] for row in rows])
        assert_same(embedder.decoder.unembedding(torch.from_numpy(embeddings)), logits)
    files = set(store.iterdir())
    SentenceEncoder(embedder.decoder, "prompteol", store=EmbeddingStore(store)).encode(["Nothing", "A man."])
    assert files and files == set(store.iterdir())


def test_llama_with_a_merged_lora_and_the_backbone_s_unembedding(tmp_path, monkeypatch):
    (folder, model), base = lora(tmp_path, "llama"), load_backbone(str(saved(tmp_path, "llama")), "float32", "cpu")
    with tiny_models.untouched(base):
        embedder = load("llama_eol_cse", base.name, backbone=base, adapters=(folder,))
    assert embedder.decoder is base and embedder.query.backbone.unembedding is base.unembedding
    ours = embedder.query.encode(["A man."])
    assert_same(ours, read(model, [base.tokenizer(EOL.format("A man."))["input_ids"]]))
    assert np.abs(ours - SentenceEncoder(base, "prompteol").encode("A man.")).max() > 0.05
    expected = SentenceEncoder(embedder.query.backbone, "prompteol", TP).encode("A man eats.")
    assert_same(embedder.changed(method=TP).query.encode("A man eats."), expected)
    with pytest.raises(ValueError, match="is decoded by .*, not by tiny-llama"):
        load("opt_eol", base.name, backbone=tiny_backbone("llama"))
    # The embedder of a backbone is PromptEOL with the adapter that is trained here, if there is one.
    prompteol, asked, store = embedder_of(base), [], EmbeddingStore(tmp_path, fresh_since=5.0)
    assert prompteol.name == "prompteol" and prompteol.query.backbone is prompteol.decoder is base
    entry = Entry("ours", base.name, base.name, ("here",), query="prompteol", trained_here=True)
    monkeypatch.setitem(EMBEDDERS, "ours", entry)
    found = embedder_of(base, store=store, trained=lambda *arguments: asked.append(arguments) or folder)
    assert found.name == "ours" and found.query.backbone is not base and asked == [(base, 5.0)]
    np.testing.assert_array_equal(found.query.encode("A man."), ours[0])


@pytest.mark.parametrize("closes", [False, True])
def test_e5_mistral_reads_one_closing_token_and_has_length_1(tmp_path, closes):
    model, tokenizer = tiny_backbone("mistral").model, tiny_backbone("mistral").tokenizer
    folder, closing = saved(tmp_path, "mistral", "base"), build_tokenizer("bytes")
    if closes:  # a tokenizer that closes every text itself
        end = [("</s>", closing.convert_tokens_to_ids("</s>"))]
        closing.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=end)
        closing.save_pretrained(folder)
    embedder = load("e5_mistral", folder, saved(tmp_path, "mistral"))
    for encoder, head in ((embedder.query, f"Instruct: {TASK}\nQuery: "), (embedder.document, "")):
        rows = [[*tokenizer(head + text)["input_ids"], tokenizer.eos_token_id] for text in TEXTS]
        assert_same(encoder.encode(TEXTS), normalize(read(model, rows), dim=1))


@pytest.mark.parametrize("kind", ["bytes_bos", "metaspace_bos"])
@pytest.mark.parametrize("name, role, head, tail", [
    ("gritlm", "query", "<|user|>\nGiven a scientific paper title, retrieve the paper's abstract\n<|embed|>\n", ""),
    ("gritlm", "document", "<|embed|>\n", ""), ("llm2vec_mistral_sup", "query", f"[INST] {TASK}: ", " [/INST]"),
    ("llm2vec_mistral_sup", "document", "[INST] ", " [/INST]")])
def test_bidirectional_mistral_mean_from_the_sentence_on(tmp_path, kind, name, role, head, tail):
    options = FAMILIES["mistral"][1] | {"sliding_window": None}  # as Mistral-7B-Instruct-v0.2
    model, tokenizer = random_model("mistral", **options).eval(), build_tokenizer(kind)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    encoder, expected = getattr(load(name, tmp_path, adapters=()), role), []
    for text in TEXTS:
        row = tokenizer(head + text + tail, return_offsets_mapping=True)
        first = next(i for i, (_, end) in enumerate(row["offset_mapping"]) if end > len(head))
        hides_nothing = torch.zeros(1, 1, len(row["input_ids"]), len(row["input_ids"]))
        expected += read(model, [row["input_ids"]], lambda s, _: s[first:].mean(0), attention_mask=hides_nothing)
    ours, expected = encoder.encode(TEXTS), torch.stack(expected)
    assert_same(ours, normalize(expected, dim=1) if name == "gritlm" else expected)
    assert_same(encoder.encode(TEXTS[3]), ours[3], "alone or padded")
    with pytest.raises(ValueError, match="not read at its last token"):
        encoder.changed(method=TP)
    with pytest.raises(ValueError, match="needs the method BothSides"):  # else it would attend to padding
        encoder.changed(method=None).encode(TEXTS)


def test_bidirectional_mistral_takes_two_adapters_for_a_model_without_head(tmp_path):
    (first, _), (second, model) = (lora(tmp_path, "mistral", "base", seed) for seed in (1, 2))
    one, two = (load("llm2vec_mistral_sup", saved(tmp_path, "mistral"), adapters=adapters).query
                for adapters in ((first,), (first, second)))
    weight = "layers.1.self_attn.q_proj.weight"
    delta = two.backbone.model.state_dict()[weight] - one.backbone.model.state_dict()[weight]
    assert_same(delta, model.base_model.model.layers[1].self_attn.q_proj.get_delta_weight("default"))
    assert np.abs(two.encode("A man.") - one.encode("A man.")).max() > 0.01
    with pytest.raises(UnsupportedModelError, match="stays causal"):  # for GPT-Neo's code has no other attention
        load("gritlm", saved(tmp_path, "gpt_neo"))


# Lower case, single characters and a few words; the mask token is number 4.
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<s>", "</s>", "<mask>", "this", "sentence", "means"]
WORDS += [chr(i) for i in range(33, 127) if not chr(i).isupper()] + [f"##{c}" for c in "abcdefgh"]
PIECES = transformers.BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)})


def bert(folder, kind: str = "BertForMaskedLM", model_type: str = "bert", **options):
    """A tiny model of BERT's kind: its folder and the model."""
    options |= {"vocab_size": 120, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = transformers.AutoConfig.for_model(model_type, **options)
    model = randomise(getattr(transformers, kind)(config).eval(), seed=3)
    model.save_pretrained(folder / kind)
    PIECES.save_pretrained(folder / kind)
    return folder / kind, model


@pytest.mark.parametrize("name, role, head", [
    ("contriever", "query", ""), ("mpnet", "query", ""), ("e5", "query", "query: "), ("e5", "document", "passage: ")])
def test_mean_over_all_tokens(tmp_path, name, role, head):
    folder, model = bert(tmp_path, "MPNetForMaskedLM", "mpnet") if name == "mpnet" else bert(tmp_path)
    expected = read(model, PIECES([head + text for text in TEXTS])["input_ids"], lambda states, _: states.mean(0))
    ours, half = (getattr(load(name, folder, dtype=kind), role).encode(TEXTS) for kind in ("float32", "float16"))
    assert_same(ours, expected if name == "contriever" else normalize(expected, dim=1))
    assert torch.cosine_similarity(torch.from_numpy(half), expected).min() > 0.9999


def test_prompt_bert_reads_the_mask_and_decodes_by_the_head_of_the_masked_language_model(tmp_path):
    folder, model = bert(tmp_path)
    embedder = load("prompt_bert", folder)
    texts = ["a bad cab", "this sentence", "this [MASK] is text"]  # a [MASK] in a text is text, as [mask] is
    rows = PIECES([f'This sentence : "{text.lower()}" means [MASK].' for text in texts])["input_ids"]
    embeddings = embedder.query.encode(texts)
    assert_same(embeddings, read(model, rows, lambda states, ids: states[ids.index(4)]))
    with torch.inference_mode():
        logits = model(torch.tensor(rows[:1])).logits[0, rows[0].index(4)]
        assert_same(decode_logits(embedder.decoder, embeddings[:1])[0], logits)


def test_bert_pooler_and_dpr_read_the_first_token_by_weights_from_the_checkpoint(tmp_path):
    (folder, model), (masked, _) = bert(tmp_path, "BertModel"), bert(tmp_path)
    encoder, rows = load("simcse", folder, masked).query, PIECES(TEXTS)["input_ids"]
    with torch.inference_mode():
        assert_same(encoder.encode(TEXTS), torch.cat([model(torch.tensor([row])).pooler_output for row in rows]))
    with pytest.raises(ValueError, match="works on the last state only"):
        encoder.encode_layers(TEXTS, [1])
    with pytest.raises(UnsupportedModelError, match="lacks 2 weights of BertModel, such as pooler"):
        load("simcse", masked)
    folder, model = bert(tmp_path, "DPRContextEncoder", "dpr", projection_dim=0)
    for layer, embeddings in load("spider", folder, masked).query.encode_layers(TEXTS, [1, -1]).items():
        assert_same(embeddings, read(model, rows, lambda states, _: states[0], layer))
    with pytest.raises(UnsupportedModelError, match="lacks .* weights of DPRQuestionEncoder"):  # whose names differ
        load("dpr", folder, masked)


def test_code_that_comes_with_a_model_is_not_run(tmp_path):
    (tmp_path / "own.py").write_text("raise SystemExit('the code of the model was run')\n")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}))
    with pytest.raises(ValueError, match="trust_remote_code"):
        load("contriever", tmp_path, bert(tmp_path)[0])
