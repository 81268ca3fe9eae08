"""Load an embedder (`lib.core.embedder_registry`) as an encoder, beside the backbone whose unembedding decodes its embeddings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
import transformers

from lib.core.adapters import merge_adapter, merged_backbone
from lib.studies.contrastive import NAME, smollm2_eol_cse
from lib.core.devices import DTYPES, choose_dtype
from lib.core.embedder_registry import EMBEDDERS, MASK, Embedder, Format, embedder_table, get_embedder, status
from lib.core.encoder import SentenceEncoder, pool
from lib.core.backbone import Backbone, ModelNotFoundError, UnsupportedModelError, find_blocks, load_backbone
from lib.core.prompts import PLACEHOLDER
from lib.core.store import EmbeddingStore
from lib.core.token_prepending import TokenPrepending
from lib.core.tokens import PromptTokenizer, TokenRows

__all__ = ["EmbedderEncoder", "embedder_of", "embedder_table", "load_embedder"]


class _FramedTokenizer(PromptTokenizer):
    """Adds a `Format`'s tokens around every prompt, and puts the mask token in its place."""

    def __init__(self, tokenizer, max_length: int, form: Format):
        super().__init__(tokenizer, max_length - len(form.before) - len(form.after))
        self.before, self.after = (tokenizer.convert_tokens_to_ids(list(side)) for side in (form.before, form.after))
        if set(self.before + self.after) & {None, tokenizer.unk_token_id}:
            raise UnsupportedModelError(f"This tokenizer has no single tokens for {form.before} and {form.after}.")
        if self.after and tokenizer("")["input_ids"][-len(self.after):] == self.after:
            self.after = []  # this tokenizer closes every text with them by itself

    def __call__(self, template: str, sentences: list[str], mean_span: bool = False) -> TokenRows:
        rows = super().__call__(template.replace(MASK, PLACEHOLDER), sentences, mean_span)
        if MASK in template:
            rows.first = rows.placeholders
            for ids, place in zip(rows.ids, rows.placeholders):
                ids[place] = self.tokenizer.mask_token_id
        rows.ids = [[*self.before, *ids, *self.after] for ids in rows.ids]
        rows.first = [first and first + len(self.before) for first in rows.first]
        rows.prefix = rows.prefix and rows.prefix + len(self.before)
        return rows


class EmbedderEncoder(SentenceEncoder):
    """A `SentenceEncoder` with an embedder's format and pooling, and its attention to both sides where it has that."""

    def __init__(
        self, embedder: Embedder, backbone: Backbone, role: str = "query", store: EmbeddingStore | None = None,
        tp: TokenPrepending | None = None, max_length: int = 512,
    ):
        form = embedder.format(role)
        known = form.pooling if embedder.causal else "mean"  # the base class refuses those that need both sides
        super().__init__(backbone, form, tp, pooling=known, max_length=max_length, share_prefix=embedder.causal, store=store)
        self.embedder, self.role, self.pooling = embedder, role, form.pooling
        self._tokenize = _FramedTokenizer(backbone.tokenizer, self.max_length, form)

    def changed(self, **changes) -> EmbedderEncoder:
        """The same model with another role (the format of queries or documents), TP or max_length."""
        kept = {"role": self.role, "tp": self.tp, "max_length": self.max_length}
        return EmbedderEncoder(self.embedder, self.backbone, store=self.store, **(kept | changes))

    def encode(self, sentences, *arguments, normalize_embeddings: bool = False, **options):
        """As `SentenceEncoder.encode`; of length 1 where the embedder's are."""
        unit = normalize_embeddings or self.embedder.normalised
        return super().encode(sentences, *arguments, normalize_embeddings=unit, **options)

    def describe(self) -> dict:
        frame = {"before": list(self.prompt.before), "after": list(self.prompt.after)}
        attention = {} if self.embedder.causal else {"causal": False}
        return super().describe() | {side: tokens for side, tokens in frame.items() if tokens} | attention

    @torch.inference_mode()
    def _run(self, rows: TokenRows, batch: list[int], layers: list[int], prefix) -> dict[int, torch.Tensor]:
        if self.embedder.causal:
            return super()._run(rows, batch, layers, prefix)
        ids, _, first, last = self._positions(rows, batch)
        real = torch.arange(ids.shape[1], device=ids.device)[None] <= last[:, None]
        output = self.backbone.model(input_ids=ids, attention_mask=real.long(), output_hidden_states=True)
        if self.pooling == "pooler":
            if layers != [self.backbone.num_layers]:
                raise ValueError(f"The pooler of {self.embedder.name} works on the last state only, not on {layers}.")
            return {layers[0]: output.pooler_output}
        spans = {"mean": (torch.zeros_like(last), last), "sentence_mean": (first, last), "mask": (first, first)}
        return {n: pool(output.hidden_states[n], "mean", *spans[self.pooling]) for n in layers}


def load_embedder(
    name: str | Embedder, dtype: str = "auto", device: str = "auto", backbone: Backbone | None = None,
    store: EmbeddingStore | None = None,
) -> tuple[EmbedderEncoder, Backbone]:
    """The encoder of an embedder, and the `Backbone` whose unembedding decodes its embeddings.

    It reads queries, and texts that are neither query nor document; see `EmbedderEncoder.changed`.

    Args:
        dtype, device: as of `load_backbone`.
        backbone: the decoding backbone where it is loaded already; its dtype and device are then taken.

    Raises:
        ModelNotFoundError: something of it is neither here nor to be had from the hub.
        UnsupportedModelError: Transformers and peft cannot load it, or its checkpoint is not what was expected.
    """
    embedder = get_embedder(name)
    state = status(embedder)
    if state.startswith("not "):
        raise (UnsupportedModelError if embedder.obstacle else ModelNotFoundError)(f"{embedder.name}: {state}")
    if backbone is not None and backbone.name != embedder.backbone:
        raise ValueError(f"{embedder.name} is decoded by {embedder.backbone}, not by {backbone.name}.")
    decoder = backbone or _load_decoder(embedder, dtype, device)
    if embedder.adapters == (NAME,):
        model = smollm2_eol_cse(decoder)[0]
    elif embedder.causal:
        same, dtype = embedder.hub == embedder.backbone, str(decoder.dtype).removeprefix("torch.")
        model = decoder if same else load_backbone(embedder.hub, dtype, str(decoder.device))
        for adapter in embedder.adapters:
            model = merged_backbone(model, adapter, embedder.name)
    else:
        model = _load_bidirectional(embedder, decoder)
    return EmbedderEncoder(embedder, replace(model, unembedding=decoder.unembedding), store=store), decoder


def embedder_of(backbone: Backbone, name: str = "auto", store: EmbeddingStore | None = None) -> SentenceEncoder:
    """The encoder of an embedder that `backbone` decodes, by its name in the registry. Errors as in `load_embedder`.

    "auto" takes the first that was trained from this backbone and can be had; else the backbone under PromptEOL, which
    the paper counts among its embedders too.
    """
    if name == "auto":
        trained = [e for e in EMBEDDERS.values() if e.backbone == backbone.name and (e.adapters or e.hub != e.backbone)]
        name = next((e.name for e in trained if not status(e).startswith("not ")), "")
    if not name:
        return SentenceEncoder(backbone, "prompteol", store=store)
    return load_embedder(name, backbone=backbone, store=store)[0]


def _load_decoder(embedder: Embedder, dtype: str, device: str) -> Backbone:
    if embedder.decoder == "AutoModelForCausalLM":
        return load_backbone(embedder.backbone, dtype, device)
    target = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    chosen = choose_dtype(target)[0] if dtype == "auto" else DTYPES[dtype]
    model, tokenizer, revision = _from_pretrained(embedder.decoder, embedder.backbone, chosen, target)
    head = next(part for key, part in model.named_children() if key != model.base_model_prefix)
    return Backbone(model, tokenizer, find_blocks(model)[0], None, head, embedder.backbone, revision)


def _load_bidirectional(embedder: Embedder, decoder: Backbone) -> Backbone:
    """The embedding model with attention to both sides. A decoder-only one gets it from `config.is_causal`."""
    may_lack = "" if embedder.query.pooling == "pooler" else "pooler."
    model, tokenizer, revision = _from_pretrained(embedder.loader, embedder.hub, decoder.dtype, decoder.device, may_lack)
    for adapter in embedder.adapters:
        model, revision = merge_adapter(model, adapter), f"{revision} + {Path(adapter).name}"
    model.config.is_causal = False
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9]], device=decoder.device)
    states = model.eval().requires_grad_(False)(input_ids=ids, output_hidden_states=True).hidden_states[-1]
    if torch.equal(states[0, 0], states[1, 0]):
        raise UnsupportedModelError(f"{embedder.name} stays causal in this version of Transformers.")
    return Backbone(model, tokenizer, find_blocks(model)[0], None, decoder.unembedding, embedder.name, revision)


def _from_pretrained(loader: str, name: str, dtype: torch.dtype, device: torch.device, may_lack: str = ""):
    """Model, tokenizer, revision. Refuses a checkpoint that lacks weights, other than those that begin with `may_lack`."""
    try:
        options = {"dtype": dtype, "trust_remote_code": False, "output_loading_info": True}
        model, info = getattr(transformers, loader).from_pretrained(name, **options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelNotFoundError(f"Cannot load {name!r}: {error}") from error
    missing = [key for key in info["missing_keys"] if not (may_lack and key.startswith(may_lack))]
    if missing:
        raise UnsupportedModelError(f"{name} lacks {len(missing)} weights of {type(model).__name__}: {missing[0]}, ...")
    return model.to(device).eval(), tokenizer, getattr(model.config, "_commit_hash", None) or "local folder"
