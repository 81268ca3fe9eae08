"""Each pooling, format and family of embedder on tiny random models, against a computation of its own; the registry."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import FAMILIES, assert_same, build_tokenizer, randomise, tiny_backbone
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers import models as token_models
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertModel,
    DPRContextEncoder,
    PreTrainedTokenizerFast,
)

import lib.core.embedder_registry as registry
from lib.studies.contrastive import NAME
from lib.data.download import DownloadError
from lib.core.embedder_registry import EMBEDDERS, Embedder, Format, get_embedder, status
from lib.core.embedders import embedder_of, embedder_table, load_embedder
from lib.core.encoder import POOLINGS, SentenceEncoder
from lib.core.backbone import ModelNotFoundError, UnsupportedModelError, load_backbone
from lib.core.store import EmbeddingStore
from lib.core.token_prepending import TokenPrepending

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = ["A man is playing a large flute on the street .", "The stock market fell by 3.5 %.", "The dog's bone [1]", "Nothing"]
PAPER = {"SGPT_nli", "SGPT_msmarco", "OPT_EOL", "OPT_EOL+CSE", "LLaMA_EOL", "LLaMA_EOL+CSE", "GritLM", "LLM2Vec"}
HERE = {"dtype": "float32", "device": "cpu"}


def own(name: str, folder, base=None, **changes) -> Embedder:
    """An embedder of the registry with a local folder in the place of the hub."""
    return replace(EMBEDDERS[name], hub=str(folder), backbone=str(base or folder), **changes)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """family -> a folder with its tiny model and tokenizer; `base=True` leaves its head out, as many checkpoints do."""
    made = {}

    def save(family: str, base: bool = False):
        if (family, base) not in made:
            folder = made[family, base] = tmp_path_factory.mktemp(family)
            backbone = tiny_backbone(family)
            (backbone.base if base else backbone.model).save_pretrained(folder)
            backbone.tokenizer.save_pretrained(folder)
        return made[family, base]

    return save


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """A random LoRA on a tiny model, with or without its head, in a folder."""
    def save(family: str, base: bool = False, seed: int = 1):
        folder = tmp_path_factory.mktemp("lora")
        backbone = tiny_backbone(family)
        model = copy.deepcopy(backbone.base if base else backbone.model)
        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_" in name:
                    weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
        model.save_pretrained(folder)
        return folder, model.eval()

    return save


@torch.inference_mode()
def states(model, ids: list[int], **inputs) -> torch.Tensor:
    """Last states (tokens, hidden) of one unpadded row, by the model's own `output_hidden_states`."""
    return model(input_ids=torch.tensor([ids]), output_hidden_states=True, **inputs).hidden_states[-1][0]


def weighted(rows: torch.Tensor) -> torch.Tensor:
    weights = torch.arange(1, len(rows) + 1)[:, None]
    return (rows * weights).sum(0) / weights.sum()


# --- the registry

def test_the_registry_holds_the_paper_s_eight_and_the_repository_s():
    assert {embedder.paper for embedder in EMBEDDERS.values()} - {""} == PAPER
    aligned = {name: embedder.aligned for name, embedder in EMBEDDERS.items() if embedder.aligned is not None}
    assert {name for name, flag in aligned.items() if flag} == {
        "prompt_bert", "prompt_bert_sup", "prompt_bert_unsup", "dpr", "dpr_context", "mpnet", "spider",
    }
    assert {name for name, flag in aligned.items() if not flag} == {"bert", "simcse", "sentence_t5", "contriever", "gte", "e5"}
    assert {"llama2", "llama2_eol", "e5_mistral", NAME} <= EMBEDDERS.keys()


@pytest.mark.parametrize("name", EMBEDDERS)
def test_every_entry_is_complete(name):
    embedder = EMBEDDERS[name]
    for role in ("query", "document"):
        form = embedder.format(role)
        assert all(template.count("{sentence}") == 1 for template in form.templates)
        assert form.pooling in (POOLINGS if embedder.causal else ("mean", "sentence_mean", "mask", "pooler"))
        assert (form.pooling == "mask") == ("[MASK]" in form.templates[0])
    assert embedder.hub and embedder.backbone and (embedder.decoder or embedder.obstacle)


def test_the_table_states_what_is_here_and_never_raises(monkeypatch):
    def unreachable(*_):
        raise DownloadError("the hub did not answer")

    monkeypatch.setattr(registry, "ask_hub", unreachable)
    monkeypatch.setattr(registry, "try_to_load_from_cache", lambda *_: None)
    table = embedder_table().set_index("embedder")
    assert list(table.index) == list(EMBEDDERS)
    assert table.loc["opt_eol", "status"] == "not reachable: facebook/opt-1.3b not on this machine; the hub did not answer"
    assert table.loc["sentence_t5", "status"].startswith("not supported: needs the dense layer")
    assert table.loc["e5", "aligned"] == "no" and table.loc["opt_eol", "aligned"] == "not stated"
    with pytest.raises(ModelNotFoundError, match="opt_eol: not reachable: facebook/opt-1.3b"):
        load_embedder("opt_eol")
    with pytest.raises(UnsupportedModelError, match="sentence_t5: not supported"):
        load_embedder("sentence_t5")


def test_status_with_a_hub(monkeypatch):
    def gated(repo):
        if repo.startswith("meta-llama"):
            raise OSError("403: the licence is to be accepted\nmore")

    monkeypatch.setattr(registry, "ask_hub", lambda *_: None)
    monkeypatch.setattr(registry, "auth_check", gated)
    cached = {("facebook/opt-1.3b", "pytorch_model.bin")}
    monkeypatch.setattr(registry, "try_to_load_from_cache", lambda repo, file: "path" if (repo, file) in cached else None)
    assert status(EMBEDDERS["opt_eol"]) == "ready"
    assert status(EMBEDDERS["opt_eol_cse"]) == "on the hub: royokong/prompteol-opt-1.3b"
    assert status(EMBEDDERS["llama2"]).endswith("not on this machine; 403: the licence is to be accepted")


def test_unknown_names_list_what_exists():
    with pytest.raises(ValueError, match="Unknown embedder 'sbert'; choose from smollm2-eol-cse, sgpt_nli"):
        get_embedder("sbert")
    with pytest.raises(ValueError, match="Unknown role 'answer'; choose from query, document"):
        EMBEDDERS["opt_eol"].format("answer")


# --- decoders, causal

def test_gpt_neo_weighted_mean_in_brackets(saved):
    folder, base = saved("gpt_neo", base=True), saved("gpt_neo")
    encoder, decoder = load_embedder(own("sgpt_msmarco", folder, base), **HERE)
    model, tokenizer = tiny_backbone("gpt_neo").model, tiny_backbone("gpt_neo").tokenizer
    for role, (before, after) in {"query": "[]", "document": "{}"}.items():
        before, after = tokenizer.convert_tokens_to_ids([before, after])
        expected = [weighted(states(model, [before, *tokenizer(text)["input_ids"], after])) for text in TEXTS]
        assert_same(encoder.changed(role=role).encode(TEXTS), torch.stack(expected), role)
    assert tokenizer("bone [1]")["input_ids"][-1] == tokenizer.convert_tokens_to_ids("]")  # the text's own stays, ours is added
    assert decoder.name == str(base) and encoder.backbone.unembedding is decoder.unembedding


def test_gpt_neo_weighted_mean_without_brackets(saved):
    encoder, _ = load_embedder(own("sgpt_nli", saved("gpt_neo")), **HERE)
    backbone = tiny_backbone("gpt_neo")
    expected = [weighted(states(backbone.model, backbone.tokenizer(text)["input_ids"])) for text in TEXTS]
    assert_same(encoder.encode(TEXTS), torch.stack(expected))


def test_opt_last_token_of_the_template_decodes_to_its_next_token_logits(saved):
    encoder, decoder = load_embedder(own("opt_eol", saved("opt")), **HERE)
    backbone = tiny_backbone("opt")
    ids = [backbone.tokenizer(f'This sentence : "{text}" means in one word:"')["input_ids"] for text in ("Nothing.", "A man.")]
    embeddings = encoder.encode(["Nothing", "A man."])
    assert_same(embeddings, torch.stack([states(backbone.model, row)[-1] for row in ids]))
    with torch.inference_mode():
        logits = torch.stack([backbone.model(torch.tensor([row])).logits[0, -1] for row in ids])
        assert_same(decoder.unembedding(torch.from_numpy(embeddings)), logits)


def test_llama_with_a_merged_lora_and_the_backbone_s_unembedding(saved, lora):
    folder, model = lora("llama")
    base = load_backbone(str(saved("llama")), **HERE)
    before = {key: value.clone() for key, value in base.model.state_dict().items()}
    encoder, decoder = load_embedder(own("llama_eol_cse", saved("llama"), adapters=(str(folder),)), backbone=base)
    assert decoder is base and encoder.backbone.unembedding is base.unembedding
    prompt = base.tokenizer('This sentence : "A man." means in one word:"')["input_ids"]
    assert_same(encoder.encode("A man."), states(model, prompt)[-1])
    assert np.abs(encoder.encode("A man.") - SentenceEncoder(base, "prompteol").encode("A man.")).max() > 0.05
    assert all(torch.equal(before[key], value) for key, value in base.model.state_dict().items())


def test_an_embedder_without_format_of_its_own_shares_the_store_with_the_plain_encoder(saved, tmp_path):
    encoder, decoder = load_embedder(own("opt_eol", saved("opt")), **HERE, store=EmbeddingStore(tmp_path))
    plain = SentenceEncoder(decoder, "prompteol", store=EmbeddingStore(tmp_path))
    template = plain.prompt.templates[0]
    assert encoder.key(template, 4, ["a"]) == plain.key(template, 4, ["a"])
    framed, _ = load_embedder(own("sgpt_msmarco", saved("gpt_neo")), **HERE)
    keys = {framed.changed(role=role).key("{sentence}", 4, ["a"]) for role in ("query", "document")}
    assert len(keys) == 2


def test_the_embedder_of_a_backbone(saved, lora, monkeypatch):
    folder, _ = lora("llama")
    base = load_backbone(str(saved("llama")), **HERE)
    assert isinstance(embedder_of(base), SentenceEncoder) and embedder_of(base).backbone is base  # PromptEOL
    trained = own("llama_eol_cse", saved("llama"), adapters=(str(folder),))
    monkeypatch.setitem(EMBEDDERS, "ours", replace(trained, name="ours"))
    found = embedder_of(base)
    assert found.embedder.name == "ours" and found.backbone is not base
    np.testing.assert_array_equal(found.encode("A man."), embedder_of(base, "ours").encode("A man."))
    with pytest.raises(ValueError, match="Unknown embedder"):
        embedder_of(base, "nothing")


def test_a_changed_embedder_takes_tp_and_a_length(saved, lora):
    folder, _ = lora("llama")
    encoder, base = load_embedder(own("llama_eol_cse", saved("llama"), adapters=(str(folder),)), **HERE)
    tp = TokenPrepending(1, 2)
    expected = SentenceEncoder(encoder.backbone, "prompteol", tp).encode("A man eats.")
    np.testing.assert_array_equal(encoder.changed(tp=tp).encode("A man eats."), expected)
    assert encoder.tp is None and encoder.changed(max_length=40).max_length == 40 and encoder.changed(tp=tp).changed(role="document").tp == tp


def test_e5_mistral_reads_a_closing_token_and_has_length_1(saved):
    encoder, _ = load_embedder(own("e5_mistral", saved("mistral", base=True), saved("mistral")), **HERE)
    model, tokenizer = tiny_backbone("mistral").model, tiny_backbone("mistral").tokenizer
    instruction = "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery: "
    for role, head in {"query": instruction, "document": ""}.items():
        rows = [[*tokenizer(head + text)["input_ids"], tokenizer.eos_token_id] for text in TEXTS]
        expected = torch.stack([states(model, row)[-1] for row in rows])
        ours = encoder.changed(role=role).encode(TEXTS)
        assert_same(ours, torch.nn.functional.normalize(expected, dim=1), role)
        assert np.linalg.norm(ours, axis=1) == pytest.approx(1, abs=1e-5)


def test_a_tokenizer_that_closes_texts_itself_gets_no_second_closing_token(saved, tmp_path):
    backbone = tiny_backbone("mistral")
    tokenizer = build_tokenizer("bytes")
    end = [("</s>", tokenizer.convert_tokens_to_ids("</s>"))]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=end)
    backbone.model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    encoder, _ = load_embedder(own("e5_mistral", tmp_path), **HERE)
    expected = states(backbone.model, [*backbone.tokenizer(TEXTS[0])["input_ids"], end[0][1]])[-1]
    assert_same(encoder.changed(role="document").encode(TEXTS[0]), torch.nn.functional.normalize(expected, dim=0))


def test_a_bracket_that_is_no_token_is_refused(saved):
    form = Format("x", ("{sentence}",), before=("no such token",))
    with pytest.raises(UnsupportedModelError, match="no single tokens"):
        load_embedder(own("opt_eol", saved("opt"), query=form), **HERE)


def test_the_decoding_backbone_must_be_the_embedder_s(saved):
    with pytest.raises(ValueError, match="is decoded by .*, not by tiny-llama"):
        load_embedder(own("opt_eol", saved("opt")), backbone=tiny_backbone("llama"))


# --- decoders that see both sides

@pytest.fixture(scope="module")
def wide_mistral(tmp_path_factory):
    """A Mistral without a sliding window, as Mistral-7B-Instruct-v0.2: folder, model, tokenizer."""
    folder = tmp_path_factory.mktemp("wide")
    kind, options = FAMILIES["mistral"]
    config = AutoConfig.for_model(kind, vocab_size=416, **{**options, "sliding_window": None})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    randomise(model)
    tokenizer = build_tokenizer("bytes_bos")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, model, tokenizer


def both_sides(model, ids: list[int]) -> torch.Tensor:
    """Reference: the causal model with a mask that hides nothing."""
    return states(model, ids, attention_mask=torch.zeros(1, 1, len(ids), len(ids)))


@pytest.mark.parametrize("name, role, head, tail", [
    ("gritlm", "query", "<|user|>\nGiven a scientific paper title, retrieve the paper's abstract\n<|embed|>\n", ""),
    ("gritlm", "document", "<|embed|>\n", ""),
    ("llm2vec_mistral_sup", "document", "[INST] ", " [/INST]"),
])
def test_bidirectional_mistral_mean_from_the_sentence_on(wide_mistral, name, role, head, tail):
    folder, model, tokenizer = wide_mistral
    encoder = load_embedder(own(name, folder, adapters=()), **HERE)[0].changed(role=role)
    expected = []
    for text in TEXTS:
        row = tokenizer(head + text + tail, return_offsets_mapping=True)
        first = next(i for i, (_, end) in enumerate(row["offset_mapping"]) if end > len(head))
        expected.append(both_sides(model, row["input_ids"])[first:].mean(0))
    ours = encoder.encode(TEXTS)
    expected = torch.stack(expected)
    assert_same(ours, torch.nn.functional.normalize(expected, dim=1) if name == "gritlm" else expected)
    assert_same(encoder.encode(TEXTS[3]), ours[3], "alone or padded")


def test_bidirectional_mistral_takes_two_adapters_for_a_model_without_head(saved, lora):
    (first, _), (second, model) = lora("mistral", base=True, seed=1), lora("mistral", base=True, seed=2)
    folder = saved("mistral")
    one, _ = load_embedder(own("llm2vec_mistral_sup", folder, adapters=(str(first),)), **HERE)
    two, _ = load_embedder(own("llm2vec_mistral_sup", folder, adapters=(str(first), str(second))), **HERE)
    weight = "layers.1.self_attn.q_proj.weight"
    delta = two.backbone.model.state_dict()[weight] - one.backbone.model.state_dict()[weight]
    assert_same(delta, model.base_model.model.layers[1].self_attn.q_proj.get_delta_weight("default"))
    assert np.abs(two.encode("A man.") - one.encode("A man.")).max() > 0.01


# --- encoders

_BERT = {
    "vocab_size": 120, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 128, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}


def word_pieces() -> PreTrainedTokenizerFast:
    """A lower-casing WordPiece tokenizer of single characters and a few words, as BERT's."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<s>", "</s>", "<mask>"]
    letters = [chr(i) for i in range(33, 127) if not chr(i).isupper()]
    words = special + ["this", "sentence", "means"] + letters + [f"##{c}" for c in "abcdefgh"]
    core = Tokenizer(token_models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]"
    )


@pytest.fixture(scope="module")
def berts(tmp_path_factory):
    """Tiny models of BERT's kind: what -> (folder, model)."""
    made = {}

    def build(what: str):
        if what not in made:
            config = AutoConfig.for_model(what.split("_")[0], **_BERT, **({"projection_dim": 0} if "dpr" in what else {}))
            if what == "bert_pooler":
                model = BertModel(config)
            else:
                model = DPRContextEncoder(config) if what == "dpr" else AutoModelForMaskedLM.from_config(config)
            generator = torch.Generator().manual_seed(3)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
            folder = tmp_path_factory.mktemp(what)
            model.eval().save_pretrained(folder)
            word_pieces().save_pretrained(folder)
            made[what] = folder, model
        return made[what]

    return build


def rows_of(texts):
    return [word_pieces()(text)["input_ids"] for text in texts]


@pytest.mark.parametrize("name, role, head", [
    ("contriever", "query", ""), ("gte", "query", ""), ("e5", "query", "query: "), ("e5", "document", "passage: "),
])
def test_bert_mean_over_all_tokens(berts, name, role, head):
    folder, model = berts("bert")
    encoder = load_embedder(own(name, folder), **HERE)[0].changed(role=role)
    expected = torch.stack([states(model, row).mean(0) for row in rows_of([head + text for text in TEXTS])])
    unit = torch.nn.functional.normalize(expected, dim=1)
    assert_same(encoder.encode(TEXTS), expected if name == "contriever" else unit)


def test_prompt_bert_reads_the_mask_and_decodes_by_the_head_of_the_masked_language_model(berts):
    folder, model = berts("bert")
    encoder, decoder = load_embedder(own("prompt_bert", folder), **HERE)
    texts = ["a bad cab", "this [MASK] is text"]  # a [MASK] in a text is text
    embeddings = encoder.encode(texts)
    rows = [word_pieces()('This sentence : "a bad cab" means [MASK].')["input_ids"]]
    place = rows[0].index(4)
    assert_same(embeddings[0], states(model, rows[0])[place])
    with torch.inference_mode():
        logits = model(torch.tensor(rows)).logits[0, place]
        assert_same(decoder.unembedding(torch.from_numpy(embeddings[:1]))[0], logits)
    ids = encoder._tokenize(encoder.prompt.templates[0], texts).ids
    assert [row.count(4) for row in ids] == [1, 1]


def test_bert_pooler_comes_from_the_checkpoint_or_not_at_all(berts):
    folder, model = berts("bert_pooler")
    encoder, _ = load_embedder(own("simcse", folder, berts("bert")[0]), **HERE)
    with torch.inference_mode():
        expected = torch.cat([model(torch.tensor([row])).pooler_output for row in rows_of(TEXTS)])
    assert_same(encoder.encode(TEXTS), expected)
    with pytest.raises(ValueError, match="works on the last state only"):
        encoder.encode_layers(TEXTS, [1])
    with pytest.raises(UnsupportedModelError, match="lacks 2 weights of BertModel: pooler"):
        load_embedder(own("simcse", berts("bert")[0]), **HERE)


def test_dpr_context_encoder_gives_its_first_token(berts):
    folder, model = berts("dpr")
    encoder, _ = load_embedder(own("spider", folder, berts("bert")[0]), **HERE)
    assert_same(encoder.encode(TEXTS), torch.stack([states(model, row)[0] for row in rows_of(TEXTS)]))
    # The question encoder's names do not fit: nothing of the checkpoint would be used.
    with pytest.raises(UnsupportedModelError, match="lacks .* weights of DPRQuestionEncoder"):
        load_embedder(own("dpr", folder, berts("bert")[0]), **HERE)


def test_mpnet_is_decoded_by_its_own_head(berts):
    folder, model = berts("mpnet")
    encoder, decoder = load_embedder(own("mpnet", folder), **HERE)
    row = rows_of(TEXTS[:1])[0]
    mean = states(model, row).mean(0)
    assert_same(encoder.encode(TEXTS[0]), mean / mean.norm())
    with torch.inference_mode():
        assert_same(decoder.unembedding(mean[None]), model.lm_head(mean[None]))
