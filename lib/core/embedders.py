"""The embedders of the key-token paper (arXiv 2406.17378): ordinary encoders, each with the model that decodes it.

`embedders.yaml` beside this file is the table of them.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import pandas as pd
import torch
import transformers
import yaml
from huggingface_hub import auth_check, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError

from lib.core.adapters import merge_adapter, merged_backbone
from lib.core.backbone import Backbone, ModelNotFoundError, UnsupportedModelError, find_blocks, load_backbone
from lib.core.both_sides import BothSides, RowPart
from lib.core.bundled import BUNDLED
from lib.core.devices import DTYPES, choose_dtype
from lib.core.encoder import SentenceEncoder
from lib.core.pooling import POOLINGS
from lib.core.postprocess import Normalise
from lib.core.prompts import PROMPTS, SENTENCE, Prompt
from lib.core.store import EmbeddingStore

WEIGHTS = tuple(f"{stem}{end}" for stem in ("model", "pytorch_model", "adapter_model")
                for end in (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json"))
HUB_TIMEOUT = 8.0  # seconds


@dataclass(frozen=True)
class Entry:
    """A row of the table.

    Args:
        hub: hub id (or folder) of the weights. adapters: LoRA that are merged into them, in this order.
        backbone: the model whose unembedding decodes the embeddings; decoder: the class of Transformers that loads it.
        query: the format of a text, document: that of a document where it differs; a prompt's name or arguments of `Prompt`.
        pooling: a name in `lib.core.pooling.POOLINGS` or a part of `lib.core.both_sides.RowPart`.
        paper: its name among the paper's eight. aligned: whether the paper's repository calls it aligned with key tokens.
        normalised: whether embeddings have length 1.
        both_sides: whether a token sees what comes after it; loader: the class that loads such a model.
        trained_here: whether its adapter is trained by this package. obstacle: why it cannot be loaded, if so.
    """

    name: str
    hub: str
    backbone: str
    adapters: tuple[str, ...] = ()
    query: str | dict = field(default_factory=dict)
    document: str | dict | None = None
    pooling: str = "last"
    paper: str = ""
    aligned: bool | None = None
    normalised: bool = False
    both_sides: bool = False
    loader: str = "AutoModel"
    decoder: str = "AutoModelForCausalLM"
    trained_here: bool = False
    obstacle: str = ""

    def encoder(self, backbone: Backbone, form: str | dict, store: EmbeddingStore | None = None) -> SentenceEncoder:
        """The encoder of a format, `query` or `document`, on the loaded model."""
        pooling = POOLINGS.get(self.pooling) or RowPart(self.pooling)
        read = self.pooling if self.pooling in POOLINGS else "mean"  # not at the last token: methods go by this
        usual = {"templates": (SENTENCE,), "clean": False, "pooling": read}
        prompt = PROMPTS[form] if isinstance(form, str) else Prompt(self.name, **usual | form)
        method, finish = BothSides() if self.both_sides else None, Normalise() if self.normalised else None
        options = {"pooling": pooling, "postprocess": finish, "share_prefix": not self.both_sides, "store": store}
        return SentenceEncoder(backbone, prompt, method, **options)


@dataclass(frozen=True)
class Embedder:
    """A loaded embedder: the encoder of a query or any other text, that of a document, and what decodes their embeddings."""

    name: str
    query: SentenceEncoder
    document: SentenceEncoder
    decoder: Backbone

    def changed(self, **choices) -> Embedder:
        """The same with other choices for both encoders, such as `max_length`; see `SentenceEncoder.changed`."""
        return replace(self, query=self.query.changed(**choices), document=self.document.changed(**choices))


_ROWS = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
EMBEDDERS = {name: Entry(name, **{"backbone": row["hub"]} | row) for name, row in _ROWS.items()}


def embedder_table() -> pd.DataFrame:
    """One row an embedder: what it is, how it reads a text, whether it aligns by its paper's repository, its status."""
    said = {None: "not stated", True: "yes", False: "no"}
    rows = [(e.name, e.paper, e.backbone, "both sides" if e.both_sides else "causal", e.pooling, said[e.aligned], status(e))
            for e in EMBEDDERS.values()]
    return pd.DataFrame(rows, columns=["embedder", "paper", "decoded by", "attention", "pooling", "aligned", "status"])


def status(entry: Entry) -> str:
    """Whether it can be loaded: "ready", "on the hub: ...", "not reachable: ..." or "not supported: ..."."""
    if entry.obstacle:
        return f"not supported: {entry.obstacle}"
    adapters = () if entry.trained_here else entry.adapters
    absent = [repo for repo in dict.fromkeys((entry.hub, entry.backbone, *adapters)) if not _is_here(repo)]
    if not absent:
        return "ready, trained at its first use" if entry.trained_here else "ready"
    refusal = next(filter(None, map(_refusal, absent)), "")
    names = ", ".join(absent)
    return f"not reachable: {names} not on this machine; {refusal}" if refusal else f"on the hub: {names}"


def _is_here(repo: str) -> bool:
    if repo in BUNDLED:
        return BUNDLED[repo].folder is not None
    return Path(repo).is_dir() or any(isinstance(try_to_load_from_cache(repo, file), str) for file in WEIGHTS)


_silence: list[str] = []  # why the hub did not answer; then it is not asked again


def _refusal(repo: str) -> str:
    """Why a repository cannot be had (gated, gone, no network), in one line; empty if it can."""
    if repo in BUNDLED:
        return BUNDLED[repo].command
    if not _silence:
        try:  # in a thread, because looking up the name of a host has no time limit of its own
            return ThreadPoolExecutor(1).submit(auth_check, repo).result(HUB_TIMEOUT) or ""
        except HfHubHTTPError as error:
            return str(error).strip().partition("\n")[0]
        except Exception as error:  # no connection, for whatever reason: a status, and no end of a notebook
            _silence.append(str(error).strip().partition("\n")[0] or "the hub did not answer")
    return _silence[0]


def load_embedder(
    name: str | Entry, dtype: str = "auto", device: str = "auto", backbone: Backbone | None = None,
    store: EmbeddingStore | None = None,
) -> Embedder:
    """Load an embedder by its name in `EMBEDDERS`, or an `Entry` of your own.

    Args:
        dtype, device: as of `load_backbone`.
        backbone: the decoding backbone where it is loaded already; its dtype and device are then taken.
        store: for both encoders.

    Raises:
        ValueError: unknown name (the message lists them), a backbone that does not decode it, an adapter that does not fit.
        ModelNotFoundError: something of it is neither here nor to be had from the hub.
        UnsupportedModelError: Transformers cannot load it, or its checkpoint lacks weights, which are named.
    """
    if not isinstance(name, Entry) and name not in EMBEDDERS:
        raise ValueError(f"Unknown embedder {name!r}; choose from {', '.join(EMBEDDERS)} or pass an Entry.")
    entry = name if isinstance(name, Entry) else EMBEDDERS[name]
    state = "not here: lib.studies.train_embedder trains and loads it" if entry.trained_here else status(entry)
    if state.startswith("not "):
        raise (UnsupportedModelError if entry.obstacle else ModelNotFoundError)(f"{entry.name}: {state}")
    if backbone is not None and backbone.name != entry.backbone:
        raise ValueError(f"{entry.name} is decoded by {entry.backbone}, not by {backbone.name}.")
    decoder = backbone or _load_decoder(entry, dtype, device)
    if entry.both_sides:
        model = _load_both_sides(entry, decoder)
    else:
        same, dtype = entry.hub == entry.backbone, str(decoder.dtype).removeprefix("torch.")
        model = decoder if same else load_backbone(entry.hub, dtype, str(decoder.device))
        for adapter in entry.adapters:
            model = merged_backbone(model, adapter, entry.name)
    model = model if model is decoder else replace(model, unembedding=decoder.unembedding)
    encoders = (entry.encoder(model, form, store) for form in (entry.query, entry.document or entry.query))
    return Embedder(entry.name, *encoders, decoder)


def embedder_of(backbone: Backbone, name: str = "auto", store: EmbeddingStore | None = None) -> Embedder:
    """An embedder that `backbone` decodes, by its name in `EMBEDDERS`. Errors as in `load_embedder`.

    "auto" takes the first that was trained from this backbone and can be had. If there is none, it is the backbone with
    PromptEOL, under the name "prompteol": the paper counts it among its embedders too.
    """
    if name != "auto":
        return load_embedder(name, backbone=backbone, store=store)
    for entry in EMBEDDERS.values():
        trained = entry.backbone == backbone.name and (entry.adapters or entry.hub != entry.backbone)
        if trained and not entry.trained_here and not status(entry).startswith("not "):
            return load_embedder(entry, backbone=backbone, store=store)
    encoder = SentenceEncoder(backbone, "prompteol", store=store)
    return Embedder("prompteol", encoder, encoder, backbone)


def _load_decoder(entry: Entry, dtype: str, device: str) -> Backbone:
    if entry.decoder == "AutoModelForCausalLM":
        return load_backbone(entry.backbone, dtype, device)
    target = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    chosen = choose_dtype(target)[0] if dtype == "auto" else DTYPES[dtype]
    model, tokenizer, revision = _from_pretrained(entry.decoder, entry.backbone, chosen, target)
    head = next(part for key, part in model.named_children() if key != model.base_model_prefix)
    return Backbone(model, tokenizer, find_blocks(model)[0], None, head, entry.backbone, revision)


def _load_both_sides(entry: Entry, decoder: Backbone) -> Backbone:
    """The embedding model with attention to both sides, which a decoder-only one gets from `config.is_causal`."""
    unused = () if entry.pooling == "pooler" else ("pooler.",)
    model, tokenizer, revision = _from_pretrained(entry.loader, entry.hub, decoder.dtype, decoder.device, unused)
    for adapter in entry.adapters:
        model, revision = merge_adapter(model, adapter), f"{revision} + {Path(adapter).name}"
    model.config.is_causal = False
    model.base_model.register_forward_pre_hook(_check_mask, with_kwargs=True)
    return Backbone(model, tokenizer, find_blocks(model)[0], None, decoder.unembedding, entry.name, revision)


def _check_mask(model, _, inputs: dict) -> None:
    """Refuse to attend to padding, as such a model does if its encoder is given another method than `BothSides`."""
    if inputs.get("attention_mask") is None:
        raise ValueError(f"{type(model).__name__} attends to both sides here, so it is read with the method BothSides only.")


def _from_pretrained(loader: str, name: str, dtype: torch.dtype, device: torch.device, unused: tuple[str, ...] = ()):
    """Model, tokenizer, revision. Refuses a checkpoint that lacks weights, other than those that begin with `unused`."""
    options = {"dtype": dtype, "trust_remote_code": False, "output_loading_info": True}
    model, info = getattr(transformers, loader).from_pretrained(name, **options)
    tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    missing = [key for key in info["missing_keys"] if not key.startswith(unused)]
    if missing:
        raise UnsupportedModelError(f"{name} lacks {len(missing)} weights of {type(model).__name__}: {missing[0]}, ...")
    revision = getattr(model.config, "_commit_hash", None) or "local folder"
    return model.to(device).eval().requires_grad_(False), tokenizer, revision
