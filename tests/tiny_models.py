"""Random models of many families and the reference they are tested against: a plain loop over the blocks, no hooks.

The models are built from their configurations, so nothing is downloaded. Their weights are drawn wide enough that
attention is far from uniform; with the libraries' own small initial weights hardly any mistake would show.
"""

from __future__ import annotations

import copy
import functools
import json
from contextlib import contextmanager
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers import models as token_models
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from lib import PROMPTS, Backbone, Prompt, SentenceEncoder, TokenPrepending
from lib.core.prompts import PLACEHOLDER, SENTENCE

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
KINDS = ("bytes", "bytes_bos", "metaspace")  # of tokenizers, see `build_tokenizer`
VOCABULARY = 400
# A row of every model's embedding matrix that no tokenizer below reaches: the reference puts the placeholder there.
SPARE_TOKEN = VOCABULARY + 8
ROWS = VOCABULARY + 16
LAYERS = 4
HIDDEN = 32
WINDOW = 12
TP = TokenPrepending(1, 3)  # for tests to which its settings are no matter
# Largest difference allowed, as a part of the largest value. Rounding reaches 3e-6 here.
TOLERANCE = 2e-5

# Of several lengths; none is cut, the longest is longer than the sliding windows, the third fits into one.
SENTENCES = [
    "A man is playing a large flute on the street, and nobody who walks by that morning seems to hear him at all.",
    "The plane takes off.", "No.", 'She said "nothing at all" about it?', "Three children run across the field!"]

_IDS = {"bos_token_id": 0, "eos_token_id": 1}
_COMMON = {**_IDS, "pad_token_id": 2, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
_LLAMA = {**_COMMON, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 256}
_GPT2 = {**_IDS, "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": 4, "n_positions": 256}
_OPT = {**_COMMON, "ffn_dim": 48, "max_position_embeddings": 256, "dropout": 0.0}
_ALTERNATING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2)}

# family -> (model type of Transformers, configuration). The sliding windows are shorter than every prompt.
FAMILIES: dict[str, tuple[str, dict]] = {
    **{name: (name, _LLAMA) for name in ("llama", "qwen2", "olmo2", "stablelm")},
    **{name: (name, {**_LLAMA, "sliding_window": WINDOW}) for name in ("mistral", "phi3")},
    **{name: (name, {**_LLAMA, "head_dim": 8}) for name in ("qwen3", "gemma")},
    "gemma2": ("gemma2", {
        **_LLAMA, **_ALTERNATING, "head_dim": 8, "attn_implementation": "eager", "query_pre_attn_scalar": 8}),
    "gemma3": ("gemma3_text", {**_LLAMA, **_ALTERNATING, "head_dim": 8}),
    "phi": ("phi", {**_LLAMA, "num_key_value_heads": 4}),
    "gpt2": ("gpt2", _GPT2),
    "gpt_neo": ("gpt_neo", {
        **_IDS, "hidden_size": HIDDEN, "num_layers": LAYERS, "num_heads": 4, "max_position_embeddings": 256,
        "window_size": WINDOW, "attention_types": [[["global", "local"], LAYERS // 2]]}),
    "gptj": ("gptj", {**_GPT2, "rotary_dim": 4}),
    "gpt_neox": ("gpt_neox", {**_COMMON, "intermediate_size": 48, "max_position_embeddings": 256}),
    "opt": ("opt", {**_OPT, "word_embed_proj_dim": HIDDEN}),
    # OPT-350m alone in its family has no final norm, and embeddings narrower than its hidden states.
    "opt_narrow": ("opt", {**_OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "falcon": ("falcon", {**_COMMON, "alibi": False}),
    "falcon_alibi": ("falcon", {**_COMMON, "alibi": True}),
    "bloom": ("bloom", {**_IDS, "hidden_size": HIDDEN, "n_layer": LAYERS, "n_head": 4}),
    "mixtral": ("mixtral", {**_LLAMA, "num_local_experts": 4}),
    # Granite scales what attention and MLP return before it adds it.
    "granite": ("granite", {**_LLAMA, "residual_multiplier": 0.7})}

_CORPUS = [
    "A man is playing a large flute on the street .", "Three children, who are cold, run across the snowy field!",
    "What does the woman say about the old house? \"Nothing at all.\"",
    "The stock market fell by 3.5 percent on Tuesday, analysts said.", "It's the dog's bone; it isn't the cat's.",
    *(text.replace("{sentence}", "The plane takes off.") for prompt in PROMPTS.values() for text in prompt.templates)]


@functools.cache
def _trained(kind: str) -> str:
    """The JSON of a byte-level (as GPT-2, Llama 3, Qwen) or a metaspace (as Llama 2, Gemma) BPE tokenizer."""
    if kind == "metaspace":
        core = Tokenizer(token_models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        special, alphabet = [BOS, EOS, PAD, "<unk>", *(f"<0x{i:02X}>" for i in range(256))], []
    else:
        core = Tokenizer(token_models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        special, alphabet = [BOS, EOS, PAD], pre_tokenizers.ByteLevel.alphabet()
    # Without pre-tokenisation whole sentences would become tokens, so the metaspace kind is trained on words.
    corpus = _CORPUS if kind != "metaspace" else [word for text in _CORPUS for word in text.split()]
    options = {"special_tokens": special, "initial_alphabet": alphabet, "show_progress": False}
    core.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=VOCABULARY, **options))
    trained = json.loads(core.to_str())  # the bytes need a place in the vocabulary, but are ordinary tokens
    trained["added_tokens"] = [token for token in trained["added_tokens"] if not token["content"].startswith("<0x")]
    return json.dumps(trained)


def build_tokenizer(kind: str = "bytes") -> PreTrainedTokenizerFast:
    """An offline tokenizer: `"bytes"`, `"bytes_bos"` (puts <s> before every text) or `"metaspace"` (the same)."""
    core = Tokenizer.from_str(_trained(kind.removesuffix("_bos")))
    if kind != "bytes":
        core.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, core.token_to_id(BOS))])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=BOS, eos_token=EOS, pad_token=PAD)


@functools.cache
def tiny_backbone(family: str = "llama", tokenizer: str = "bytes") -> Backbone:
    """A random model of a family, float32, the same in every run. Shared by all tests: nothing may change it."""
    kind, options = FAMILIES[family]
    return Backbone.from_model(random_model(kind, **options), build_tokenizer(tokenizer), name=f"tiny-{family}")


def save_tiny(folder, family: str = "llama", part: str = "model") -> Path:
    """Save a tiny model and its tokenizer as a checkpoint; the part "base" is without its head, as in many of them."""
    getattr(tiny_backbone(family), part).save_pretrained(folder)
    tiny_backbone(family).tokenizer.save_pretrained(folder)
    return Path(folder)


def random_model(kind: str, **options) -> nn.Module:
    """A model of a type of Transformers with the weights of `randomise`."""
    return randomise(AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=ROWS, **options)))


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give a model seeded weights with a gain near one, so that every part of a block has its say."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = model.get_input_embeddings().weight
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:  # norms and biases
                parameter.add_(0.2 * noise)
            else:
                parameter.copy_(noise if parameter is embeddings else noise * 1.5 * parameter.shape[-1] ** -0.5)
    return model


# A model of its own for the reference, so that it can put the placeholder into the embedding matrix.
_copy = functools.lru_cache(maxsize=2)(copy.deepcopy)


@torch.inference_mode()
def loop_states(backbone: Backbone, ids: list[int], writes=(), vector=None, change=None) -> list:
    """All states of one unpadded prompt, by a loop over the blocks: `num_layers + 1` tensors (tokens, hidden).

    The model's own pass, on a copy, gives what each block is called with besides the states (masks, positions).

    Args:
        ids: token ids; `SPARE_TOKEN` where a placeholder stands.
        writes: (start, end, positions of the placeholders) of each TP setting that is active.
        vector: the row of the embedding matrix that a placeholder token has. Without it the row is not a number.
        change: called as `change(i, h, block, args, kwargs, states before)`; returns h and kwargs for the block.
    """
    model, calls, tokens = _copy(backbone.model), [], torch.tensor([ids])
    base = model.base_model
    model.get_input_embeddings().weight[SPARE_TOKEN] = torch.nan if vector is None else vector
    blocks = next(m for m in base.modules() if isinstance(m, nn.ModuleList) and len(m) == backbone.num_layers)
    def record(_, args, kwargs):
        calls.append((args[0].clone(), args[1:], kwargs))
    handles = [block.register_forward_pre_hook(record, with_kwargs=True) for block in blocks]
    base(input_ids=tokens, use_cache=False)
    for handle in handles:
        handle.remove()

    states, h = [], calls[0][0]
    for i, (block, (_, args, kwargs)) in enumerate(zip(blocks, calls, strict=True)):
        for start, end, positions in writes:
            if start <= i < end:
                h = h.clone()
                h[:, positions] = h[:, -1:].clone()
        if change:
            h, kwargs = change(i, h.clone(), block, args, dict(kwargs), states)
        states.append(h[0])
        output = block(h, *args, **kwargs)
        h = output[0] if isinstance(output, tuple) else output
    return [*states, after_last_block(base, h)[0]]


def after_last_block(base: nn.Module, h: torch.Tensor) -> torch.Tensor:
    """What the families do between their last block and the unembedding, written out by name."""
    parts = dict(base.named_modules())
    names = ("norm", "final_layernorm", "ln_f", "final_layer_norm", "decoder.final_layer_norm", "decoder.project_out")
    for part in filter(None, map(parts.get, names)):
        h = part(h)
    return h


def official_ids(tokenizer, text: str) -> list[int]:
    """Token ids from a tokenizer to which the placeholder was added, the official way; here it is `SPARE_TOKEN`."""
    official, placeholder = _official(tokenizer)
    return [SPARE_TOKEN if token == placeholder else token for token in official(text)["input_ids"]]


@functools.lru_cache(maxsize=64)
def _official(tokenizer):
    official = copy.deepcopy(tokenizer)
    official.add_special_tokens({"additional_special_tokens": [PLACEHOLDER]})
    return official, official.convert_tokens_to_ids(PLACEHOLDER)


def hook_ids(model: nn.Module) -> dict[str, tuple]:
    """The ids of all hooks in a model, by module."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_with_kwargs")
    return {name: tuple(tuple(getattr(m, kind, ())) for kind in kinds) for name, m in model.named_modules()}


@contextmanager
def untouched(backbone: Backbone):
    """Afterwards the model has the hooks and, bit by bit, the parameters that it had, and its tokenizer the tokens."""
    hooks, tokenizer = hook_ids(backbone.model), backbone.tokenizer.backend_tokenizer.to_str()
    before = copy.deepcopy(backbone.model.state_dict())
    yield
    assert hook_ids(backbone.model) == hooks and backbone.tokenizer.backend_tokenizer.to_str() == tokenizer
    torch.testing.assert_close(backbone.model.state_dict(), before, rtol=0, atol=0)


def cosines(a, b) -> torch.Tensor:
    """Cosine of each pair of rows, in float64."""
    a, b = (torch.as_tensor(x).double().reshape(-1, x.shape[-1]) for x in (a, b))
    return torch.nn.functional.cosine_similarity(a, b, dim=1)


def assert_same(actual, expected, what: str = "") -> None:
    """Equal but for float32 rounding: cosine >= 0.99999 in every row, no element off by `TOLERANCE` of the largest."""
    actual, expected = torch.as_tensor(actual), torch.as_tensor(expected)
    assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert torch.isfinite(actual).all(), f"{what}: not finite"
    low, off = cosines(actual, expected).min(), (actual - expected).abs().max() / expected.abs().max()
    assert low >= 0.99999 and off < TOLERANCE, f"{what}: cosine {low:.7f}, off by {off:.1e} of the largest value"


def prompt_ids(backbone: Backbone, sentence: str, tp=None, prompt: Prompt = PROMPTS["prompteol"]) -> list[int]:
    """A prompt of one template with a sentence in it, and with the placeholders of TP, tokenised by `official_ids`."""
    (template,) = prompt.with_placeholder(tp.place, tp.count) if tp else prompt.templates
    return official_ids(backbone.tokenizer, template.replace(SENTENCE, prompt.prepare(sentence)))


def reference(backbone: Backbone, ids: list[int], tp=None) -> list[torch.Tensor]:
    """All states of one prompt, as `loop_states` gives them, with TP at the placeholders in `ids`."""
    places = [i for i, token in enumerate(ids) if token == SPARE_TOKEN]
    with_tp = ([(tp.start, tp.end, places)], tp.initial_vector(backbone)) if tp else ()
    return loop_states(backbone, ids, *with_tp)


def assert_equals_loop(encoder: SentenceEncoder, sentences: list[str], layers=range(LAYERS + 1)) -> None:
    """The encoder's embeddings at these layers are the loop's states of each sentence's last token."""
    found = encoder.encode_layers(sentences, layers)
    for i, sentence in enumerate(sentences):
        ids = prompt_ids(encoder.backbone, sentence, encoder.method, encoder.prompt)
        expected = reference(encoder.backbone, ids, encoder.method)
        for layer in layers:
            assert_same(found[layer][i], expected[layer][-1], f"{encoder.method}, {sentence!r}, layer {layer}")
