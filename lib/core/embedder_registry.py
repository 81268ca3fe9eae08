"""Embedders as data: the eight of arXiv 2406.17378, those that its repository adds, and one made here.

Formats are those of its code and of the embedders' own repositories. `lib.core.embedders` loads them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
from huggingface_hub import auth_check, try_to_load_from_cache

from lib.studies.contrastive import NAME
from lib.data.download import ask_hub
from lib.core.bundled import PACKAGE
from lib.core.backbone import EMBEDDED_MODEL
from lib.core.prompts import PROMPTS, Prompt
from lib.data.sources import SENTEVAL

# In a template: the place of the tokenizer's own mask token.
MASK = "[MASK]"
ROLES = ("query", "document")
WEIGHTS = tuple(f"{stem}{end}" for stem in ("model", "pytorch_model", "adapter_model")
                for end in (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json"))


@dataclass(frozen=True)
class Format(Prompt):
    """A prompt with tokens around it that are put there as ids, so that they never melt into the text's own tokens.

    Its poolings, besides `Prompt`'s: `"sentence_mean"`, from the sentence's first token to the end (`"mean"` counts every
    token); `"mask"`, the token [MASK]; `"pooler"`, the model's own.
    """

    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()


@dataclass(frozen=True)
class Embedder:
    """What is needed to load an embedder and to decode what it gives.

    Args:
        hub: hub id (or folder) of its weights. adapters: LoRA merged into them, in this order.
        backbone: whose unembedding decodes its embeddings.
        query: the format of a text; document: that of a document where it differs.
        paper: its name among the eight of the paper.
        normalised: whether its embeddings have length 1.
        causal: whether a token sees only what comes before it. loader: class of Transformers that loads it where not.
        decoder: the class that loads `backbone`.
        aligned: whether the paper's repository found it to align with key tokens; None: not stated.
        obstacle: why it cannot be loaded here, if so.
    """

    name: str
    hub: str
    backbone: str
    query: Format
    document: Format | None = None
    adapters: tuple[str, ...] = ()
    paper: str = ""
    normalised: bool = False
    causal: bool = True
    loader: str = "AutoModel"
    decoder: str = "AutoModelForCausalLM"
    aligned: bool | None = None
    obstacle: str = ""

    def format(self, role: str) -> Format:
        """The format of a text in this role. Raises `ValueError` for an unknown role."""
        if role not in ROLES:
            raise ValueError(f"Unknown role {role!r}; choose from {', '.join(ROLES)}.")
        return self.document if role == "document" and self.document else self.query


_SEARCH = "Given a web search query, retrieve relevant passages that answer the query"
_PAPERS = "Given a scientific paper title, retrieve the paper's abstract"
_EOL = Format("prompteol", PROMPTS["prompteol"].templates)
_plain = partial(Format, clean=False)
_bare, _last = _plain("bare", ("{sentence}",), "mean"), _plain("last", ("{sentence}",))
_SGPT = _plain("weighted", ("{sentence}",), "weighted_mean")
_PROMPT_BERT = _plain("promptbert", ('This sentence : "{sentence}" means [MASK].',), "mask")
_pooler = replace(_bare, name="pooler", pooling="pooler")
_grit, _l2v = partial(_plain, "gritlm", pooling="sentence_mean"), partial(_plain, "llm2vec", pooling="sentence_mean")
_NEO, _OPT, _LLAMA = "EleutherAI/gpt-neo-1.3B", "facebook/opt-1.3b", "huggyllama/llama-7b"
_LLAMA2, _MISTRAL = "meta-llama/Llama-2-7b-hf", "mistralai/Mistral-7B-Instruct-v0.2"
_L2V = "McGill-NLP/LLM2Vec-Mistral-7B-Instruct-v2-mntp"
_llm2vec = partial(
    Embedder, hub=_MISTRAL, backbone=_MISTRAL, causal=False, paper="LLM2Vec",
    query=_l2v(templates=(f"[INST] {_SEARCH}: {{sentence}} [/INST]",)),
    document=_l2v(templates=("[INST] {sentence} [/INST]",)),
)
_bert = partial(Embedder, backbone="bert-base-uncased", query=_bare, causal=False, decoder="AutoModelForMaskedLM")

_ALL = (
    Embedder(NAME, EMBEDDED_MODEL, EMBEDDED_MODEL, _EOL, adapters=(NAME,)),
    Embedder("sgpt_nli", "Muennighoff/SGPT-1.3B-weightedmean-nli", _NEO, _SGPT, paper="SGPT_nli"),
    # The official code leaves the brackets out.
    Embedder(
        "sgpt_msmarco", "Muennighoff/SGPT-1.3B-weightedmean-msmarco-specb-bitfit", _NEO, paper="SGPT_msmarco",
        query=replace(_SGPT, before=("[",), after=("]",)), document=replace(_SGPT, before=("{",), after=("}",)),
    ),
    Embedder("opt_eol", _OPT, _OPT, _EOL, paper="OPT_EOL"),
    Embedder("opt_eol_cse", _OPT, _OPT, _EOL, adapters=("royokong/prompteol-opt-1.3b",), paper="OPT_EOL+CSE"),
    Embedder("llama_eol", _LLAMA, _LLAMA, _EOL, paper="LLaMA_EOL"),
    Embedder("llama_eol_cse", _LLAMA, _LLAMA, _EOL, adapters=("royokong/prompteol-llama-7b",), paper="LLaMA_EOL+CSE"),
    # Its own unembedding, because it was also trained to generate.
    Embedder(
        "gritlm", "GritLM/GritLM-7B", "GritLM/GritLM-7B", causal=False, normalised=True, paper="GritLM",
        query=_grit(templates=(f"<|user|>\n{_PAPERS}\n<|embed|>\n{{sentence}}",)),
        document=_grit(templates=("<|embed|>\n{sentence}",)),
    ),
    _llm2vec("llm2vec_mistral_sup", adapters=(_L2V, f"{_L2V}-supervised")),
    _llm2vec("llm2vec_mistral_unsup", adapters=(_L2V, f"{_L2V}-unsup-simcse")),
    Embedder("llama2", _LLAMA2, _LLAMA2, _last),
    Embedder("llama2_eol", _LLAMA2, _LLAMA2, _EOL),
    Embedder(
        "e5_mistral", "intfloat/e5-mistral-7b-instruct", "mistralai/Mistral-7B-v0.1", normalised=True,
        query=_plain("e5_mistral", (f"Instruct: {_SEARCH}\nQuery: {{sentence}}",), after=("</s>",)),
        document=replace(_last, after=("</s>",)),
    ),
    _bert("bert", "bert-base-uncased", query=_pooler, aligned=False),
    _bert("prompt_bert", "bert-base-uncased", query=_PROMPT_BERT, aligned=True),
    _bert("prompt_bert_sup", "royokong/sup-PromptBERT", query=_PROMPT_BERT, aligned=True),
    _bert("prompt_bert_unsup", "royokong/unsup-PromptBERT", query=_PROMPT_BERT, aligned=True),
    _bert("simcse", "princeton-nlp/sup-simcse-bert-base-uncased", query=_pooler, aligned=False),
    _bert("contriever", "facebook/contriever", aligned=False),
    _bert("dpr", "facebook/dpr-question_encoder-single-nq-base", query=_pooler, aligned=True),
    _bert("dpr_context", "facebook/dpr-ctx_encoder-single-nq-base", query=_pooler, loader="DPRContextEncoder", aligned=True),
    _bert("spider", "tau/spider", query=_pooler, loader="DPRContextEncoder", aligned=True),
    _bert("gte", "thenlper/gte-base", normalised=True, aligned=False),
    _bert(
        "e5", "intfloat/e5-base-v2", query=replace(_bare, templates=("query: {sentence}",)),
        document=replace(_bare, templates=("passage: {sentence}",)), normalised=True, aligned=False,
    ),
    _bert(
        "mpnet", "sentence-transformers/all-mpnet-base-v2", backbone="microsoft/mpnet-base", normalised=True, aligned=True
    ),
    Embedder(
        "sentence_t5", "sentence-transformers/sentence-t5-large", "google-t5/t5-large", _bare, causal=False, normalised=True,
        decoder="", aligned=False,
        obstacle="needs the dense layer of the package sentence-transformers, and decodes through T5's whole decoder",
    ),
)
EMBEDDERS: dict[str, Embedder] = {embedder.name: embedder for embedder in _ALL}


def get_embedder(name: str | Embedder) -> Embedder:
    """An embedder by its name in `EMBEDDERS`; one of your own passes through. Raises `ValueError`, listing the names."""
    if isinstance(name, Embedder):
        return name
    if name not in EMBEDDERS:
        raise ValueError(f"Unknown embedder {name!r}; choose from {', '.join(EMBEDDERS)} or pass an Embedder.")
    return EMBEDDERS[name]


def status(embedder: Embedder) -> str:
    """Whether it can be loaded: "ready", "on the hub: ...", "not reachable: ..." or "not supported: ..."."""
    if embedder.obstacle:
        return f"not supported: {embedder.obstacle}"
    absent = [repo for repo in dict.fromkeys((embedder.hub, embedder.backbone, *embedder.adapters)) if not _is_here(repo)]
    if not absent:
        return "ready" if NAME not in embedder.adapters else "ready, trained at its first use"
    if EMBEDDED_MODEL in absent:
        return f"not reachable: the package {PACKAGE} is not installed"
    try:
        ask_hub(*SENTEVAL[:2])  # asked once for all, with a limit on the time it may take
        for repo in absent:
            auth_check(repo)
    except Exception as error:  # gated, gone, no network: all of it is a status, none of it stops a notebook
        return f"not reachable: {', '.join(absent)} not on this machine; {str(error).splitlines()[0]}"
    return f"on the hub: {', '.join(absent)}"


def _is_here(repo: str) -> bool:
    if repo in (EMBEDDED_MODEL, NAME):
        return repo == NAME or find_spec(PACKAGE.replace("-", "_")) is not None
    return Path(repo).is_dir() or any(isinstance(try_to_load_from_cache(repo, file), str) for file in WEIGHTS)


def embedder_table() -> pd.DataFrame:
    """One row an embedder: what it is, how it reads a text, whether it aligns by its paper's repository, its status here."""
    return pd.DataFrame([{
        "embedder": embedder.name,
        "paper": embedder.paper,
        "decoded by": embedder.backbone,
        "attention": "causal" if embedder.causal else "both sides",
        "pooling": embedder.query.pooling,
        "aligned": {None: "not stated", True: "yes", False: "no"}[embedder.aligned],
        "status": status(embedder),
    } for embedder in EMBEDDERS.values()])
