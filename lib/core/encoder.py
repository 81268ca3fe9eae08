"""Sentences -> embeddings: deduplicated, sorted by length, cut into batches by tokens, no layer too many."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from contextlib import nullcontext

import numpy as np
import torch
from tqdm import tqdm

from lib.core import processes
from lib.core.batches import halves, is_out_of_memory, token_batches, token_budget
from lib.core.forward import read_states, run_prefix, shares_prefix
from lib.core.backbone import OVERFLOW, Backbone
from lib.core.prompts import PLACEHOLDER, Prompt, get_prompt
from lib.core.store import EmbeddingStore, code_version, fingerprint
from lib.core.token_prepending import TokenPrepending
from lib.core.tokens import PromptTokenizer, TokenRows

POOLINGS = ("last", "mean", "weighted_mean")

# How many sentences are encoded together and then stored: what an interrupt can cost.
CHUNK = 2048


class SentenceEncoder:
    """Embeddings of sentences from a frozen causal language model.

    Args:
        backbone: from `load_backbone`; several encoders can share it.
        prompt: a name in `lib.core.prompts.PROMPTS`, or a `Prompt`.
        tp: a `TokenPrepending` setting, or None for the plain model.
        exit_layer: which state is the embedding, in Hugging Face's numbering: n is the output of block n - 1, before the
            final norm; -1 (or the number of blocks) is the last block's output after it. Later blocks are not run.
        pooling: `"last"`, `"mean"` or `"weighted_mean"`; None takes the prompt's own (`"last"` for all but Echo).
        max_length: tokens, prompt included; longer sentences are cut, with a warning.
        share_prefix: run the part of the prompt before the sentence once and not for every sentence.
        store: an `EmbeddingStore`; embeddings found there are not computed again.

    Raises:
        ValueError: unknown prompt or pooling; no such layer; TP on a prompt that is not read at its last token; no TP on a
            prompt whose template holds a placeholder.
    """

    def __init__(
        self,
        backbone: Backbone,
        prompt: str | Prompt = "prompteol",
        tp: TokenPrepending | None = None,
        exit_layer: int = -1,
        pooling: str | None = None,
        *,
        max_length: int = 512,
        share_prefix: bool = True,
        store: EmbeddingStore | None = None,
    ):
        self.backbone = backbone
        self.prompt = get_prompt(prompt)
        self.tp = tp
        self.exit_layer = backbone.layer_index(exit_layer)
        self.pooling = pooling or self.prompt.pooling
        self.max_length = min(max_length, backbone.max_length)
        self.share_prefix = share_prefix
        self.store = store
        if self.pooling not in POOLINGS:
            raise ValueError(f"Unknown pooling {pooling!r}; choose from {', '.join(POOLINGS)}.")
        if tp is not None and self.prompt.pooling != "last":
            raise ValueError(f"Prompt {self.prompt.name!r} is not read at its last token, so TP does not apply to it.")
        if tp is None and any(PLACEHOLDER in template for template in self.prompt.templates):
            raise ValueError(f"Prompt {self.prompt.name!r} holds a placeholder, so it needs TP.")
        if tp is not None and tp.end > backbone.num_layers:
            raise ValueError(f"TP end={tp.end}, but {backbone.name} has only {backbone.num_layers} blocks.")
        self._tokenize = PromptTokenizer(backbone.tokenizer, self.max_length)

    def encode(
        self,
        sentences: str | Sequence[str],
        batch_size: int | None = None,
        show_progress_bar: bool | None = None,
        convert_to_numpy: bool = True,
        normalize_embeddings: bool = False,
    ) -> np.ndarray | torch.Tensor:
        """Embed sentences at the exit layer.

        Args:
            sentences: a list of strings, or one string.
            batch_size: at most so many sentences in a batch; None leaves it to the token budget alone.
            show_progress_bar: None shows one when there are more than 1,000 sentences to compute.
            convert_to_numpy: a numpy array if true, else a torch tensor on the CPU.
            normalize_embeddings: scale each embedding to length 1.

        Returns:
            float32 (sentences, hidden), or (hidden,) for one string.

        Raises:
            ValueError: the list is empty, or the batch size below 1. TypeError: an item is not a string.
            FloatingPointError: a state is not finite (float16 overflows in some models).
        """
        single = isinstance(sentences, str)
        states = self.encode_layers([sentences] if single else sentences, [self.exit_layer], batch_size, show_progress_bar)
        embeddings = states[self.exit_layer]
        if normalize_embeddings:
            embeddings = embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)
        if single:
            embeddings = embeddings[0]
        return embeddings if convert_to_numpy else torch.from_numpy(embeddings)

    def encode_layers(
        self,
        sentences: Sequence[str],
        layers: Iterable[int],
        batch_size: int | None = None,
        show_progress_bar: bool | None = None,
    ) -> dict[int, np.ndarray]:
        """Embed sentences at several layers in one pass: layer -> float32 (sentences, hidden).

        The keys are the layers as given (a -1 stays -1). Arguments and errors as in `encode`.
        """
        sentences = _checked(sentences)
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be at least 1 (or None), got {batch_size}.")
        index = {layer: self.backbone.layer_index(layer) for layer in layers}
        texts = [self.prompt.prepare(sentence) for sentence in sentences]
        position = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        wanted, total = sorted(set(index.values())), {}
        for template in self._templates:
            for n, states in self._encode_template(template, list(position), wanted, batch_size, show_progress_bar).items():
                total[n] = total.get(n, 0) + states / np.float32(len(self._templates))
        rows = [position[text] for text in texts]
        return {layer: total[n][rows] for layer, n in index.items()}

    @property
    def _templates(self) -> tuple[str, ...]:
        return self.prompt.with_placeholder(self.tp.place, self.tp.count) if self.tp else self.prompt.templates

    def key(self, template: str, layer: int, texts: list[str]) -> str:
        """Fingerprint of all that decides these embeddings. It has the template but not the prompt's name, so that CK finds
        what CoT and KE stored, and all texts of the batch run, because in half precision neighbours decide the rounding.
        """
        setting = {k: v for k, v in self.describe().items() if k not in ("prompt", "templates")}
        return fingerprint(setting | {"template": template, "layer": layer, "texts": texts, "code": ENCODER_CODE})

    def describe(self) -> dict:
        """The setting as plain data, for the provenance of a result."""
        return self.backbone.describe() | {
            "prompt": self.prompt.name,
            "templates": list(self.prompt.templates),
            "cleaned": self.prompt.clean,
            "pooling": self.pooling,
            "tp": self.tp.describe() if self.tp else None,
            "max_length": self.max_length,
        }

    def _encode_template(self, template: str, texts: list[str], layers: list[int], batch_size, show) -> dict[int, np.ndarray]:
        """Embeddings of distinct, cleaned texts in one template, chunk by chunk, from the store as far as it has them."""
        states: dict[int, list[np.ndarray]] = {n: [] for n in layers}
        show = len(texts) > 1000 if show is None else show
        with tqdm(total=len(texts), desc=self.prompt.name, unit="sentence", disable=not show, leave=False) as bar:
            for chunk in self.chunks(texts):
                for n, rows in self._stored_or_computed(template, chunk, layers, batch_size, bar).items():
                    states[n].append(rows)
        back = np.argsort(_order(texts))
        return {n: np.concatenate(rows)[back] for n, rows in states.items()}

    @staticmethod
    def chunks(texts: list[str]) -> list[list[str]]:
        """The distinct texts in the lists that are computed together, which depend on nothing but the texts."""
        order = _order(texts)
        return [[texts[i] for i in order[begin : begin + CHUNK]] for begin in range(0, len(order), CHUNK)]

    def _stored_or_computed(self, template: str, texts: list[str], layers: list[int], batch_size, bar) -> dict[int, np.ndarray]:
        """One chunk: all its layers from the store, or all of them computed together and stored."""
        if self.store is None:
            return self._compute(template, texts, layers, batch_size, bar)
        keys = {n: self.key(template, n, texts) for n in layers}
        states = processes.from_main(lambda: {n: self.store.load(key) for n, key in keys.items()})
        if any(rows is None for rows in states.values()):
            states = self._compute(template, texts, layers, batch_size, bar)
            for n, rows in states.items():
                self.store.save(keys[n], rows)
        return states

    def _compute(self, template: str, texts: list[str], layers: list[int], batch_size, bar: tqdm) -> dict[int, np.ndarray]:
        """Run the model, or of several processes each its share of the batches: layer -> float32 (texts, hidden)."""
        rows = self._tokenize(template, texts, mean_span=self.pooling != "last")
        prefix = None
        if not (self.share_prefix and rows.prefix and shares_prefix(self.backbone)):
            rows.prefix = 0
        if rows.prefix:
            ids = torch.tensor(rows.ids[0][: rows.prefix], device=self.backbone.device)
            prefix = run_prefix(self.backbone, ids, max(layers))
        batches = token_batches([len(row) - rows.prefix for row in rows.ids], token_budget(self.backbone.device), batch_size)
        own = batches[processes.index() :: processes.count()]
        parts = processes.gather(self._run_batches(rows, own, layers, prefix, bar))
        # Not all states need be equally wide: OPT-350m projects the last one down to its embeddings' width.
        states = {n: np.empty((len(texts), parts[0][1][n].shape[1]), np.float32) for n in parts[0][1]}
        for batch, pooled in parts:
            for n, values in pooled.items():
                states[n][batch] = values
        if not all(np.isfinite(pooled).all() for pooled in states.values()):
            raise FloatingPointError(OVERFLOW.format(name=self.backbone.name, dtype=self.backbone.dtype))
        return states

    def _run_batches(self, rows: TokenRows, batches: list[list[int]], layers: list[int], prefix, bar: tqdm) -> list[tuple]:
        """Pairs of a batch and its states, layer -> float32 (batch, hidden). Where memory runs out, batches are halved."""
        done, waiting = [], batches[::-1]
        while waiting:
            batch = waiting.pop()
            try:
                states = self._run(rows, batch, layers, prefix)
            except RuntimeError as error:
                if len(batch) == 1 or not is_out_of_memory(error):
                    raise
                states = None
            if states is None:  # outside `except`, whose error would keep the failed pass's activations alive
                warnings.warn(f"Out of memory with {len(batch)} sentences in a batch; halving the batches.", stacklevel=2)
                waiting = [half for whole in [*waiting, batch] for half in halves(whole)]
                continue
            done.append((batch, {n: pooled.float().cpu().numpy() for n, pooled in states.items()}))
            bar.update(len(batch))
        return done

    def _run(self, rows: TokenRows, batch: list[int], layers: list[int], prefix) -> dict[int, torch.Tensor]:
        """One batch through the model: layer -> (batch, hidden)."""
        ids, placeholders, first, last = self._positions(rows, batch)
        with self.tp.attach(self.backbone, placeholders, last) if self.tp else nullcontext():
            return read_states(self.backbone, ids, layers, lambda states: pool(states, self.pooling, first, last), prefix)

    def _positions(self, rows: TokenRows, batch: list[int]) -> tuple[torch.Tensor, ...]:
        """A batch after the shared prefix, int64: token ids (batch, tokens), placeholders (batch, count) or None without TP,
        first pooled position (batch,) and last position (batch,)."""
        device, skip = self.backbone.device, rows.prefix
        lengths = [len(rows.ids[i]) - skip for i in batch]
        ids = np.zeros((len(batch), max(lengths)), np.int64)
        for k, i in enumerate(batch):
            ids[k, : lengths[k]] = rows.ids[i][skip:]
        placeholders = None
        if self.tp:
            placeholders = torch.tensor([rows.placeholders[i] - skip for i in batch])[:, None] + torch.arange(self.tp.count)
        first = torch.tensor([rows.first[i] - skip for i in batch], device=device)
        return torch.from_numpy(ids).to(device), placeholders, first, torch.tensor(lengths, device=device) - 1


ENCODER_CODE = code_version(
    "bundled", "backbone", "hooks", "forward", "token_prepending", "prompts", "tokens", "batches", "encoder"
)


def pool(states: torch.Tensor, pooling: str, first: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """(batch, tokens, hidden) -> (batch, hidden): the last token's state, or a mean from `first` to `last` (inclusive).

    `"weighted_mean"` weights the k-th of those tokens by k (SGPT, arXiv 2202.08904), counting from 1.
    """
    first, last = first.to(states.device), last.to(states.device)
    if pooling == "last":
        return states[torch.arange(len(last), device=states.device), last]
    place = torch.arange(states.shape[1], device=states.device)[None] - first[:, None] + 1
    inside = (place >= 1) & (place <= (last - first + 1)[:, None])
    weights = (place if pooling == "weighted_mean" else torch.ones_like(place)) * inside
    weights = weights.float() / weights.sum(dim=1, keepdim=True)
    return torch.einsum("bth,bt->bh", states.float(), weights)


def _order(texts: list[str]) -> list[int]:
    """The longest first: what is computed together never depends on what was asked first."""
    return sorted(range(len(texts)), key=lambda i: (-len(texts[i]), texts[i]))


def _checked(sentences: Iterable[str]) -> list[str]:
    if isinstance(sentences, str):
        raise TypeError("Expected a list of sentences, got one string; encode takes a single string.")
    sentences = list(sentences)
    if not sentences:
        raise ValueError("There is nothing to encode: the list of sentences is empty.")
    for i, sentence in enumerate(sentences):
        if not isinstance(sentence, str):
            raise TypeError(f"Sentence {i} is {type(sentence).__name__}, not a string: {sentence!r:.60}")
    return sentences
