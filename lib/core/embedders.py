"""The embedders of the key-token paper (arXiv 2406.17378): ordinary encoders, each with the model that decodes it.

`embedders.yaml` beside this file is the table of them. The adapter of one of them is trained by this package, in
`lib/studies/train_embedder.py`; the functions below are told so by their argument `trained`.
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

# From a backbone, and the time before which no adapter counts, to the folder of the adapter that is trained here.
Trained = Callable[[Backbone, float], Path]


@dataclass(frozen=True)
class Entry:
    """A row of the table. `embedders.yaml` explains the fields."""

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
    """A loaded embedder: the encoder of queries and other texts, that of documents, and what decodes the embeddings."""

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
    aligned, sides = {None: "not stated", True: "yes", False: "no"}, {True: "both sides", False: "causal"}
    return pd.DataFrame([{
        "embedder": e.name, "paper": e.paper, "decoded by": e.backbone, "attention": sides[e.both_sides],
        "pooling": e.pooling, "aligned": aligned[e.aligned], "status": status(e),
    } for e in EMBEDDERS.values()])


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
    store: EmbeddingStore | None = None, trained: Trained | None = None,
) -> Embedder:
    """Load an embedder by its name in `EMBEDDERS`, or an `Entry` of your own.

    Args:
        dtype, device: as of `load_backbone`; where the decoding `backbone` is given, its own are taken.
        store: for both encoders; its `fresh_since` holds for a trained adapter too.
        trained: `lib.studies.train_embedder.trained_adapter`, without which the embedder that it trains cannot be had.

    Raises:
        ValueError: unknown name (the message lists them); `backbone` does not decode it; an adapter does not fit.
        ModelNotFoundError: something of it is neither here nor to be had from the hub.
        UnsupportedModelError: its checkpoint lacks weights, which are named, or it cannot attend to both sides here.
    """
    entry = name if isinstance(name, Entry) else EMBEDDERS.get(name)
    if entry is None:
        raise ValueError(f"Unknown embedder {name!r}; choose from {', '.join(EMBEDDERS)} or pass an Entry.")
    state = "not reachable: no `trained` was given" if entry.trained_here and not trained else status(entry)
    if state.startswith("not "):
        raise (UnsupportedModelError if entry.obstacle else ModelNotFoundError)(f"{entry.name}: {state}")
    if backbone is not None and backbone.name != entry.backbone:
        raise ValueError(f"{entry.name} is decoded by {entry.backbone}, not by {backbone.name}.")
    decoder = backbone or _load_decoder(entry, dtype, device)
    if entry.both_sides:
        model = _load_both_sides(entry, decoder)
    else:
        chosen = str(decoder.dtype).removeprefix("torch."), str(decoder.device)
        model = decoder if entry.hub == entry.backbone else load_backbone(entry.hub, *chosen)
        fresh_since = store.fresh_since if store else 0.0
        for adapter in [trained(decoder, fresh_since)] if entry.trained_here else entry.adapters:
            model = merged_backbone(model, adapter, entry.name)
    model = model if model is decoder else replace(model, unembedding=decoder.unembedding)
    encoders = (entry.encoder(model, form, store) for form in (entry.query, entry.document or entry.query))
    return Embedder(entry.name, *encoders, decoder)


def embedder_of(
    backbone: Backbone, name: str = "auto", store: EmbeddingStore | None = None, trained: Trained | None = None
) -> Embedder:
    """An embedder that `backbone` decodes, by its name in `EMBEDDERS`. Arguments and errors as in `load_embedder`.

    "auto" takes the first that was trained from this backbone and can be had. If there is none, it is the backbone with
    PromptEOL, under the name "prompteol": the paper counts it among its embedders too.
    """
    made = [e for e in EMBEDDERS.values() if e.backbone == backbone.name and (e.adapters or e.hub != e.backbone)]
    usable = (e.name for e in made if (trained or not e.trained_here) and not status(e).startswith("not "))
    name = next(usable, "") if name == "auto" else name
    if name:
        return load_embedder(name, backbone=backbone, store=store, trained=trained)
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
    for module in model.modules() if model.dtype == torch.float16 else ():
        if isinstance(module, torch.nn.LayerNorm):
            module.float()  # it norms a float32 sum, see `lib.core.forward.safe_float16`
    model.config.is_causal = False
    model.base_model.register_forward_pre_hook(_check_mask, with_kwargs=True)
    return Backbone(model, tokenizer, find_blocks(model)[0], None, decoder.unembedding, entry.name, revision)


def _check_mask(model, _, inputs: dict) -> None:
    """Refuse to attend to padding, as such a model does if its encoder is given another method than `BothSides`."""
    if inputs.get("attention_mask") is None:
        raise ValueError(f"This {type(model).__name__} attends to both sides, so it needs the method BothSides.")


def _from_pretrained(loader: str, name: str, dtype: torch.dtype, device: torch.device, unused: tuple[str, ...] = ()):
    """Model, tokenizer, revision. Refuses a checkpoint that lacks weights, but for those that begin with `unused`."""
    options = {"dtype": dtype, "trust_remote_code": False, "output_loading_info": True}
    model, info = getattr(transformers, loader).from_pretrained(name, **options)
    tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    missing = [key for key in info["missing_keys"] if not key.startswith(unused)]
    if missing:
        raise UnsupportedModelError(f"{name} lacks {len(missing)} weights of {type(model).__name__}: {missing[0]}, ...")
    revision = getattr(model.config, "_commit_hash", None) or "local folder"
    return model.to(device).eval().requires_grad_(False), tokenizer, revision
