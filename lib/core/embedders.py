"""The embedders of the key-token paper (arXiv 2406.17378): ordinary encoders, each with the model that decodes it.
`embedders.yaml` is their table. `lib/studies/train_embedder.py` trains the adapter of one: the argument `trained`."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pandas as pd
import torch
import yaml
from huggingface_hub import auth_check, errors, try_to_load_from_cache

from lib.core.adapters import merge_adapter, merged_backbone
from lib.core.backbone import Backbone, ModelNotFoundError, UnsupportedModelError, load_backbone, read_checkpoint
from lib.core.bundled import BUNDLED
from lib.core.encoder import SentenceEncoder
from lib.core.forward import read_states
from lib.core.hardware import choose
from lib.core.postprocess import Normalise
from lib.core.prompts import PROMPTS, SENTENCE, Prompt
from lib.core.store import EmbeddingStore
from lib.core.tokens import Batch

WEIGHTS = tuple(f"{stem}{end}" for stem in ("model", "pytorch_model", "adapter_model")
                for end in (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json"))
_silence: list[str] = []  # why the hub did not answer; then it is not asked again


@dataclass(frozen=True)
class BothSides:
    """The method of a model whose tokens attend to both sides: it masks padding, and puts the mask token at `<PST>`.
    Its encoder needs `share_prefix=False`, because the states of a prefix depend on what comes after it."""

    def check(self, backbone: Backbone) -> None:
        """Raise `UnsupportedModelError` if another last token leaves the first state as it is: the model is causal."""
        ids, last = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9]], device=backbone.device), torch.tensor([3, 3])
        with self.attach(backbone, Batch(ids, None, last, last, [])):
            states = read_states(backbone, ids, [-1])[backbone.num_layers]
        if torch.equal(states[0, 0], states[1, 0]):
            raise UnsupportedModelError(f"{backbone.name} stays causal in this version of Transformers.")

    @contextmanager
    def attach(self, backbone: Backbone, batch: Batch):
        """While active, every forward pass of `backbone` is on this batch, with its padding masked."""
        ids, places = batch.ids.clone(), torch.arange(batch.ids.shape[1], device=batch.ids.device)
        if batch.placeholders is not None:
            ids.scatter_(1, batch.placeholders, backbone.tokenizer.mask_token_id)
        real = places <= batch.last.to(ids.device)[:, None]
        inputs = {"input_ids": ids, "attention_mask": real.long(), "return_dict": True}
        with backbone.base.register_forward_pre_hook(lambda *_: ((), inputs), with_kwargs=True, prepend=True):
            yield

    def describe(self) -> dict:
        return {"method": "BothSides"}


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
        usual = {"templates": (SENTENCE,), "clean": False, "pooling": self.pooling}
        prompt = PROMPTS[form] if isinstance(form, str) else Prompt(self.name, **usual | form)
        both = {"method": BothSides(), "share_prefix": False} if self.both_sides else {}
        both |= {"postprocess": Normalise()} if self.normalised else {}
        return SentenceEncoder(backbone, prompt, pooling=self.pooling, store=store, **both)


@dataclass(frozen=True)
class Embedder:
    """A loaded embedder: the encoders of queries (and other texts) and of documents, and what decodes embeddings."""

    name: str
    query: SentenceEncoder
    document: SentenceEncoder
    decoder: Backbone

    def changed(self, **choices) -> "Embedder":
        """The same with other choices for both encoders, as in `SentenceEncoder.changed`."""
        return replace(self, query=self.query.changed(**choices), document=self.document.changed(**choices))


_ROWS = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
EMBEDDERS = {name: Entry(name, **{"backbone": row["hub"]} | row) for name, row in _ROWS.items()}


def embedder_table() -> pd.DataFrame:
    """One row an embedder: what it is, how it reads a text, whether it aligns by its paper's repository, its status."""
    aligned, sides = {None: "not stated", True: "yes", False: "no"}, {True: "both sides", False: "causal"}
    rows = [(e.name, e.paper, e.backbone, sides[e.both_sides], e.pooling, aligned[e.aligned], status(e))
            for e in EMBEDDERS.values()]
    return pd.DataFrame(rows, columns=["embedder", "paper", "decoded by", "attention", "pooling", "aligned", "status"])


def status(entry: Entry, can_train: bool = True) -> str:
    """Whether it can be loaded: "ready", "on the hub: ...", "not reachable: ..." or "not supported: ..."."""
    if entry.obstacle:
        return f"not supported: {entry.obstacle}"
    if entry.trained_here and not can_train:
        return "not reachable: no `trained` was given"
    repos = dict.fromkeys((entry.hub, entry.backbone, *(() if entry.trained_here else entry.adapters)))
    if not (absent := [repo for repo in repos if not _is_here(repo)]):
        return "ready, trained at its first use" if entry.trained_here else "ready"
    refusal, names = next(filter(None, map(_refusal, absent)), ""), ", ".join(absent)
    return f"not reachable: {names} not on this machine; {refusal}" if refusal else f"on the hub: {names}"


def _is_here(repo: str) -> bool:
    if repo in BUNDLED:
        return not BUNDLED[repo].missing
    return Path(repo).is_dir() or any(isinstance(try_to_load_from_cache(repo, file), str) for file in WEIGHTS)


def _refusal(repo: str) -> str:
    """Why a repository cannot be had (gated, gone, no network), in one line; empty if it can."""
    if repo in BUNDLED or _silence:
        return BUNDLED[repo].command if repo in BUNDLED else _silence[0]
    try:  # in a thread, because looking up the name of a host has no time limit (in seconds) of its own
        return ThreadPoolExecutor(1).submit(auth_check, repo).result(timeout=8) or ""
    except Exception as error:  # whatever the reason: a status, and no end of a notebook
        reason = str(error).strip().partition("\n")[0] or "the hub did not answer"
        _silence.extend([] if isinstance(error, errors.HfHubHTTPError) else [reason])
        return reason


def load_embedder(name: str | Entry, dtype: str = "auto", device: str = "auto", backbone: Backbone | None = None,
                  store: EmbeddingStore | None = None, trained=None) -> Embedder:
    """Load an embedder by its name in `EMBEDDERS`, or an `Entry` of your own. `ValueError` for an unknown name, another
    `backbone` than its own and an adapter that does not fit; errors of `load_backbone` and `BothSides.check`.

    Args:
        dtype, device: as of `load_backbone`; where the decoding `backbone` is given, its own are taken.
        store: for both encoders; its `fresh_since` holds for a trained adapter too.
        trained: `lib.studies.train_embedder.trained_adapter`: (backbone, `fresh_since`) -> an adapter's folder."""
    if not (entry := name if isinstance(name, Entry) else EMBEDDERS.get(name)):
        raise ValueError(f"Unknown embedder {name!r}; choose from {', '.join(EMBEDDERS)} or pass an Entry.")
    if (state := status(entry, trained is not None)).startswith("not "):
        raise (UnsupportedModelError if entry.obstacle else ModelNotFoundError)(f"{entry.name}: {state}")
    if backbone is not None and backbone.name != entry.backbone:
        raise ValueError(f"{entry.name} is decoded by {entry.backbone}, not by {backbone.name}.")
    decoder = backbone or _load_decoder(entry, dtype, device)
    if entry.both_sides:
        model = _load_both_sides(entry, decoder)
    else:
        chosen = str(decoder.dtype).removeprefix("torch."), str(decoder.device)
        model = decoder if entry.hub == entry.backbone else load_backbone(entry.hub, *chosen, head=False)
        since = store.fresh_since if store else 0.0
        for adapter in [trained(decoder, since)] if entry.trained_here else entry.adapters:
            model = merged_backbone(model, adapter, entry.name)
    model = model if model is decoder else replace(model, unembedding=decoder.unembedding)
    query, document = (entry.encoder(model, form, store) for form in (entry.query, entry.document or entry.query))
    return Embedder(entry.name, query, document, decoder)


def embedder_of(backbone: Backbone, name: str = "auto", store: EmbeddingStore | None = None, trained=None) -> Embedder:
    """An embedder that `backbone` decodes, by its name in `EMBEDDERS`; arguments and errors as in `load_embedder`.
    "auto" is the first that was trained from this backbone and can be had, else the backbone itself with PromptEOL."""
    made = [e for e in EMBEDDERS.values() if e.backbone == backbone.name and (e.adapters or e.hub != e.backbone)]
    usable = (e.name for e in made if not status(e, trained is not None).startswith("not "))
    if name := next(usable, "") if name == "auto" else name:
        return load_embedder(name, backbone=backbone, store=store, trained=trained)
    encoder = SentenceEncoder(backbone, "prompteol", store=store)
    return Embedder("prompteol", encoder, encoder, backbone)


def _load_decoder(entry: Entry, dtype: str, device: str) -> Backbone:
    if entry.decoder == "AutoModelForCausalLM":
        return load_backbone(entry.backbone, dtype, device)
    chosen, target, _ = choose(dtype, device)
    model, tokenizer, revision = read_checkpoint(entry.decoder, entry.backbone, chosen)
    head = next(part for key, part in model.named_children() if key != model.base_model_prefix)
    return Backbone(model.to(target), tokenizer, head, entry.backbone, revision)


def _load_both_sides(entry: Entry, decoder: Backbone) -> Backbone:
    """The embedding model with attention to both sides, which a decoder-only one gets from `config.is_causal`."""
    unused = () if entry.pooling == "pooler" else ("pooler.",)
    model, tokenizer, revision = read_checkpoint(entry.loader, entry.hub, decoder.dtype, unused)
    model = model.to(decoder.device)
    for adapter in entry.adapters:
        model, revision = merge_adapter(model, adapter), f"{revision} + {Path(adapter).name}"
    model.config.is_causal = False

    def check_mask(_, __, inputs):  # without BothSides, it would attend to padding
        if inputs.get("attention_mask") is None:
            raise ValueError(f"{entry.name} attends to both sides, so it needs the method BothSides.")

    model.base_model.register_forward_pre_hook(check_mask, with_kwargs=True)
    return Backbone(model, tokenizer, decoder.unembedding, entry.name, revision)
