"""The embedders of the key-token paper (arXiv 2406.17378): ordinary encoders, each with the model that decodes it.

`embedders.yaml` beside this file is the table of them. One that is trained by this package needs to be told how: see
`lib/studies/train_embedder.py`, which offers the same functions with that one filled in.
"""

from __future__ import annotations

from collections.abc import Callable
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

# From a backbone to the folder of the adapter that was trained on it.
Trained = Callable[[Backbone], Path]


@dataclass(frozen=True)
class Entry:
    """A row of the table.

    Args:
        hub: hub id (or folder) of the weights. adapters: LoRA that are merged into them, in this order.
        backbone: the model whose unembedding decodes the embeddings, by default `hub`; decoder: the class that loads it.
        query: the format of a text, document: that of a document where it differs. Each is a prompt's name, or a mapping
            that may have a `template`, and a token `before` and `after` it that is put there as an id.
        pooling: a name in `lib.core.pooling.POOLINGS` or a part of `RowPart`.
        paper: its name among the eight of the paper. aligned: whether the paper's repository found its embeddings to align
            with key tokens; None where it does not say.
        normalised: whether embeddings have length 1.
        both_sides: whether a token sees what comes after it; loader: the class that loads such a model.
        trained_here: whether its adapter is trained by this package. obstacle: why it cannot be loaded, if so.
    """

    name: str
    hub: str
    backbone: str = ""
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

    def encoder(self, backbone: Backbone, form: str | dict, store: EmbeddingStore | None) -> SentenceEncoder:
        """The encoder on this backbone of a format, `query` or `document`."""
        if isinstance(form, str):
            prompt = PROMPTS[form]
        else:
            before, after = ((form[side],) if side in form else () for side in ("before", "after"))
            pooling = self.pooling if self.pooling in POOLINGS else "mean"  # what methods go by: not at the last token
            prompt = Prompt(self.name, (form.get("template", SENTENCE),), pooling, False, before=before, after=after)
        return SentenceEncoder(
            backbone, prompt, BothSides() if self.both_sides else None,
            pooling=POOLINGS.get(self.pooling) or RowPart(self.pooling),
            postprocess=Normalise() if self.normalised else None, share_prefix=not self.both_sides, store=store,
        )


def _read(file: Path) -> dict[str, Entry]:
    rows = yaml.safe_load(file.read_text(encoding="utf-8"))
    return {name: Entry(name, **{"backbone": row["hub"], **row}) for name, row in rows.items()}


EMBEDDERS: dict[str, Entry] = _read(Path(__file__).with_suffix(".yaml"))


@dataclass(frozen=True)
class Embedder:
    """A loaded embedder: the encoders of a query, or any other text, and of a document; and what decodes their embeddings."""

    name: str
    query: SentenceEncoder
    document: SentenceEncoder
    decoder: Backbone

    def changed(self, **choices) -> Embedder:
        """The same with other choices for both encoders, such as `max_length` or `method`; see `SentenceEncoder.changed`."""
        return replace(self, query=self.query.changed(**choices), document=self.document.changed(**choices))


def embedder_table() -> pd.DataFrame:
    """One row an embedder: what it is, how it reads a text, whether it aligns by its paper's repository, its status here."""
    return pd.DataFrame([{
        "embedder": entry.name,
        "paper": entry.paper,
        "decoded by": entry.backbone,
        "attention": "both sides" if entry.both_sides else "causal",
        "pooling": entry.pooling,
        "aligned": {None: "not stated", True: "yes", False: "no"}[entry.aligned],
        "status": status(entry),
    } for entry in EMBEDDERS.values()])


def status(entry: Entry) -> str:
    """Whether it can be loaded: "ready", "on the hub: ...", "not reachable: ..." or "not supported: ..."."""
    if entry.obstacle:
        return f"not supported: {entry.obstacle}"
    adapters = () if entry.trained_here else entry.adapters
    absent = [repo for repo in dict.fromkeys((entry.hub, entry.backbone, *adapters)) if not _is_here(repo)]
    if not absent:
        return "ready, trained at its first use" if entry.trained_here else "ready"
    names = ", ".join(absent)
    refusal = next(filter(None, map(_refusal, absent)), "")
    return f"not reachable: {names} not on this machine; {refusal}" if refusal else f"on the hub: {names}"


def _is_here(repo: str) -> bool:
    if repo in BUNDLED:
        return BUNDLED[repo].folder is not None
    return Path(repo).is_dir() or any(isinstance(try_to_load_from_cache(repo, file), str) for file in WEIGHTS)


_silence: list[str] = []  # why the hub did not answer: then it is not asked again


def _refusal(repo: str) -> str:
    """Why a repository cannot be had (gated, gone, no network), in one line; empty if it can."""
    if repo in BUNDLED:
        return f"install it: {BUNDLED[repo].command}"
    if not _silence:
        asked = ThreadPoolExecutor(1).submit(auth_check, repo)  # the look-up of a host's name has no time limit of its own
        try:
            return asked.result(HUB_TIMEOUT) or ""
        except HfHubHTTPError as error:
            return str(error).strip().partition("\n")[0]
        except Exception as error:  # there is no connection, whatever the reason: a status, and no end of a notebook
            _silence.append(str(error).strip().partition("\n")[0] or "the hub did not answer")
    return _silence[0]


def load_embedder(
    name: str | Entry, dtype: str = "auto", device: str = "auto", backbone: Backbone | None = None,
    store: EmbeddingStore | None = None, trained: Trained | None = None,
) -> Embedder:
    """Load an embedder by its name in `EMBEDDERS`, or one of your own as an `Entry`.

    Args:
        dtype, device: as of `load_backbone`.
        backbone: the decoding backbone where it is loaded already; its dtype and device are then taken.
        store: for both encoders. trained: gives the adapter of an embedder that is trained here.

    Raises:
        ValueError: there is no such name (the message lists them), another model decodes it, or an adapter does not fit.
        ModelNotFoundError: something of it is neither here nor to be had from the hub.
        UnsupportedModelError: Transformers cannot load it, or its checkpoint is not what was expected.
    """
    if not isinstance(name, Entry) and name not in EMBEDDERS:
        raise ValueError(f"Unknown embedder {name!r}; choose from {', '.join(EMBEDDERS)} or pass an Entry.")
    entry = name if isinstance(name, Entry) else EMBEDDERS[name]
    state = status(entry)
    if entry.trained_here and trained is None:
        state = "not reachable: it is trained by lib.studies.train_embedder, which also loads it"
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
        for adapter in [trained(decoder)] if entry.trained_here else entry.adapters:
            model = merged_backbone(model, adapter, entry.name)
    model = model if model is decoder else replace(model, unembedding=decoder.unembedding)
    query, document = (entry.encoder(model, form, store) for form in (entry.query, entry.document or entry.query))
    return Embedder(entry.name, query, document, decoder)


def embedder_of(
    backbone: Backbone, name: str = "auto", store: EmbeddingStore | None = None, trained: Trained | None = None
) -> Embedder:
    """An embedder that `backbone` decodes, by its name in `EMBEDDERS`. Arguments and errors as in `load_embedder`.

    "auto" takes the first that was trained from this backbone and can be had; else, under the name "prompteol", the backbone
    with PromptEOL, which the paper counts among its embedders too.
    """
    if name == "auto":
        made = [e for e in EMBEDDERS.values() if e.backbone == backbone.name and (e.adapters or e.hub != e.backbone)]
        usable = [e.name for e in made if (trained or not e.trained_here) and not status(e).startswith("not ")]
        if not usable:
            encoder = SentenceEncoder(backbone, "prompteol", store=store)
            return Embedder("prompteol", encoder, encoder, backbone)
        name = usable[0]
    return load_embedder(name, backbone=backbone, store=store, trained=trained)


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
    unused = "" if entry.pooling == "pooler" else "pooler."
    model, tokenizer, revision = _from_pretrained(entry.loader, entry.hub, decoder.dtype, decoder.device, unused)
    for adapter in entry.adapters:
        model, revision = merge_adapter(model, adapter), f"{revision} + {Path(adapter).name}"
    model.config.is_causal = False
    model.base_model.register_forward_pre_hook(_refuse_without_mask, with_kwargs=True)
    return Backbone(model.requires_grad_(False), tokenizer, find_blocks(model)[0], None, decoder.unembedding, entry.name, revision)


def _refuse_without_mask(_, __, inputs: dict) -> None:
    if inputs.get("attention_mask") is None:
        raise ValueError("This model attends to both sides, also to padding: its encoder needs the method BothSides.")


def _from_pretrained(loader: str, name: str, dtype: torch.dtype, device: torch.device, unused: str = ""):
    """Model, tokenizer, revision. Refuses a checkpoint that lacks weights, other than those that begin with `unused`."""
    try:
        options = {"dtype": dtype, "trust_remote_code": False, "output_loading_info": True}
        model, info = getattr(transformers, loader).from_pretrained(name, **options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelNotFoundError(f"Cannot load {name!r}: {error}") from error
    missing = [key for key in info["missing_keys"] if not (unused and key.startswith(unused))]
    if missing:
        raise UnsupportedModelError(f"{name} lacks {len(missing)} weights of {type(model).__name__}: {missing[0]}, ...")
    return model.to(device).eval(), tokenizer, getattr(model.config, "_commit_hash", None) or "local folder"
