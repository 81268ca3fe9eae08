"""Sentences to embeddings: deduplicated, sorted by length, cut into batches by tokens, no layer too many."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from tqdm import tqdm

from lib.core import processes
from lib.core.backbone import Backbone
from lib.core.batches import halves, is_out_of_memory, token_batches, token_budget
from lib.core.code_version import code_version
from lib.core.forward import check_finite, run_prefix, shares_prefix
from lib.core.pooling import Pooling, get_pooling
from lib.core.postprocess import Normalise, Postprocess
from lib.core.prompts import PLACEHOLDER, Prompt, get_prompt
from lib.core.store import EmbeddingStore, fingerprint
from lib.core.tokens import Batch, PromptTokenizer, TokenRows

# How many sentences are encoded together and then stored: what an interrupt can cost.
CHUNK = 2048


class Method(Protocol):
    """What an encoder expects of a method: something that is changed inside the forward pass.

    `templates` gives the prompt's templates with the placeholders that the method needs, `check` looks whether it can be
    applied to a model (both raise `ValueError` if not), `describe` gives it as plain data. `attach` is a context manager:
    while it is active, forward passes on this batch run with the method; it leaves nothing behind.
    """

    def templates(self, prompt: Prompt) -> tuple[str, ...]: ...
    def check(self, backbone: Backbone) -> None: ...
    def attach(self, backbone: Backbone, batch: Batch): ...
    def describe(self) -> dict: ...


@dataclass(frozen=True)
class Pass:
    """What is computed together: the rows of one template and one chunk of texts, and which of them form a batch."""

    template: str
    rows: TokenRows
    batches: list[list[int]]


class SentenceEncoder:
    """Embeddings of sentences from a frozen causal language model. An encoder is four choices on a backbone.

    Args:
        backbone: from `load_backbone`; several encoders can share it.
        prompt: a name in `lib.core.prompts.PROMPTS`, or a `Prompt`.
        method: what is changed inside the forward pass, such as `TokenPrepending`; None is the baseline.
        exit_layer: which state is the embedding, in Hugging Face's numbering: n is the output of block n - 1, before the
            final norm; -1 (or the number of blocks) is the last block's output after it. Later blocks are not run.
        pooling: a `Pooling` or its name, `"last"`, `"mean"` or `"weighted_mean"`; None takes the prompt's own.
        postprocess: what is done to finished embeddings (`lib.core.postprocess`); None leaves them as they are.
        max_length: tokens, prompt included; longer sentences are cut, with a warning.
        share_prefix: run the part of the prompt before the sentence once and not for every sentence.
        store: an `EmbeddingStore`; embeddings found there are not computed again.

    Raises:
        ValueError: unknown prompt or pooling; no such layer; a method that does not suit the prompt or the model; no method
            on a prompt whose template holds a placeholder.
    """

    def __init__(
        self,
        backbone: Backbone,
        prompt: str | Prompt = "prompteol",
        method: Method | None = None,
        exit_layer: int = -1,
        pooling: str | Pooling | None = None,
        postprocess: Postprocess | None = None,
        *,
        max_length: int = 512,
        share_prefix: bool = True,
        store: EmbeddingStore | None = None,
    ):
        self.backbone = backbone
        self.prompt = get_prompt(prompt)
        self.method = method
        self.exit_layer = backbone.layer_index(exit_layer)
        self.pooling = get_pooling(pooling or self.prompt.pooling)
        self.postprocess = postprocess
        self.max_length = min(max_length, backbone.max_length)
        self.share_prefix = share_prefix
        self.store = store
        if method:
            method.check(backbone)
        self.templates = method.templates(self.prompt) if method else self.prompt.templates
        if method is None and any(PLACEHOLDER in template for template in self.templates):
            raise ValueError(f"Prompt {self.prompt.name!r} holds a placeholder, so it needs a method that uses it.")
        self.tokenize = PromptTokenizer(backbone.tokenizer, self.max_length, self.prompt.before, self.prompt.after)
        choices = (self, self.pooling, *([method] if method else []))
        self.code = code_version(*(type(choice).__module__ for choice in choices))

    def changed(self, **choices) -> SentenceEncoder:
        """The same encoder with other choices, by the names of the arguments."""
        names = ("prompt", "method", "exit_layer", "pooling", "postprocess", "max_length", "share_prefix", "store")
        return SentenceEncoder(self.backbone, **{name: getattr(self, name) for name in names} | choices)

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
            embeddings = Normalise()(embeddings)
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

        The keys are the layers as given (a -1 stays -1). Arguments and errors as in `encode`; besides, `ValueError` for
        another layer than the exit layer if there is a postprocess, which belongs to that layer.
        """
        sentences = _checked(sentences)
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be at least 1 (or None), got {batch_size}.")
        index = {layer: self.backbone.layer_index(layer) for layer in layers}
        if self.postprocess and set(index.values()) != {self.exit_layer}:
            raise ValueError(f"The postprocess belongs to layer {self.exit_layer}, so no other layer can be read with it.")
        texts = [self.prompt.prepare(sentence) for sentence in sentences]
        position = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        wanted, total = sorted(set(index.values())), {}
        for template in self.templates:
            for n, states in self._encode_template(template, list(position), wanted, batch_size, show_progress_bar).items():
                total[n] = total.get(n, 0) + states / np.float32(len(self.templates))
        rows = [position[text] for text in texts]
        finish = self.postprocess or (lambda embeddings: embeddings)
        return {layer: finish(total[n][rows]) for layer, n in index.items()}

    def describe(self) -> dict:
        """The encoder as plain data, for the provenance of a result."""
        return self.backbone.describe() | {
            "prompt": self.prompt.name,
            "templates": list(self.prompt.templates),
            "cleaned": self.prompt.clean,
            "around": [list(self.prompt.before), list(self.prompt.after)],
            "method": self.method.describe() if self.method else None,
            "exit_layer": self.exit_layer,
            **self.pooling.describe(),
            "postprocess": self.postprocess.describe() if self.postprocess else None,
            "max_length": self.max_length,
            "share_prefix": self.share_prefix,
        }

    def key(self, template: str, layer: int, texts: list[str], batch_size: int | None) -> str:
        """Fingerprint of all that decides these embeddings before the postprocess.

        It has the template but not the prompt's name, so that CK finds what CoT and KE stored, and all texts that are
        computed together, because in half precision neighbours decide the rounding.
        """
        left_out = ("prompt", "templates", "exit_layer", "postprocess")
        choices = {name: value for name, value in self.describe().items() if name not in left_out}
        run = {"template": template, "layer": layer, "texts": texts, "batch_size": batch_size, "code": self.code}
        return fingerprint(choices | run)

    def passes(self, sentences: Sequence[str], batch_size: int | None = None) -> list[Pass]:
        """What `encode` computes, template by template and chunk by chunk, without the computation."""
        texts = list(dict.fromkeys(map(self.prompt.prepare, sentences)))
        return [self._pass(template, chunk, batch_size) for template in self.templates for chunk in chunks(texts)]

    def batch(self, rows: TokenRows, indices: Sequence[int]) -> Batch:
        """Some rows of a `Pass`, on the model's device."""
        return rows.batch(indices, self.backbone.device)

    def forward(self, batch: Batch, layers: Iterable[int], prefix=None) -> dict[int, torch.Tensor]:
        """One batch through the model: layer -> (batch, hidden), on its device. `prefix`: from `run_prefix`, if shared."""
        with self.method.attach(self.backbone, batch) if self.method else nullcontext():
            return self.pooling.read(self.backbone, batch, layers, prefix)

    def _pass(self, template: str, texts: list[str], batch_size: int | None) -> Pass:
        rows = self.tokenize(template, texts, span=self.pooling.needs_span)
        if not (self.share_prefix and rows.prefix and shares_prefix(self.backbone)):
            rows.prefix = 0
        budget = token_budget(self.backbone.device)
        return Pass(template, rows, token_batches([len(row) - rows.prefix for row in rows.ids], budget, batch_size))

    def _encode_template(self, template: str, texts: list[str], layers: list[int], batch_size, show) -> dict[int, np.ndarray]:
        """Embeddings of distinct, cleaned texts in one template, chunk by chunk, from the store as far as it has them."""
        states: dict[int, list[np.ndarray]] = {n: [] for n in layers}
        show = len(texts) > 1000 if show is None else show
        with tqdm(total=len(texts), desc=self.prompt.name, unit="sentence", disable=not show, leave=False) as bar:
            for chunk in chunks(texts):
                for n, rows in self._stored_or_computed(template, chunk, layers, batch_size, bar).items():
                    states[n].append(rows)
        back = np.argsort(_order(texts))
        return {n: np.concatenate(rows)[back] for n, rows in states.items()}

    def _stored_or_computed(self, template: str, texts: list[str], layers: list[int], batch_size, bar) -> dict[int, np.ndarray]:
        """One chunk: all its layers from the store, or all of them computed together and stored."""
        if self.store is None:
            return self._compute(self._pass(template, texts, batch_size), layers, bar)
        keys = {n: self.key(template, n, texts, batch_size) for n in layers}
        states = processes.from_main(lambda: {n: self.store.load(key) for n, key in keys.items()})
        if any(rows is None for rows in states.values()):
            states = self._compute(self._pass(template, texts, batch_size), layers, bar)
            for n, rows in states.items():
                self.store.save(keys[n], rows)
        return states

    def _compute(self, work: Pass, layers: list[int], bar: tqdm) -> dict[int, np.ndarray]:
        """Run the model, or of several processes each its share of the batches: layer -> float32 (texts, hidden)."""
        rows, prefix = work.rows, None
        if rows.prefix:
            ids = torch.tensor(rows.ids[0][: rows.prefix], device=self.backbone.device)
            prefix = run_prefix(self.backbone, ids, max(layers))
        own = work.batches[processes.index() :: processes.count()]
        parts = processes.gather(self._run_batches(rows, own, layers, prefix, bar))
        # Not all states need be equally wide: OPT-350m projects the last one down to its embeddings' width.
        states = {n: np.empty((len(rows.ids), parts[0][1][n].shape[1]), np.float32) for n in parts[0][1]}
        for batch, pooled in parts:
            for n, values in pooled.items():
                states[n][batch] = values
        for pooled in states.values():
            check_finite(pooled, self.backbone.name, self.backbone.dtype)
        return states

    def _run_batches(self, rows: TokenRows, batches: list[list[int]], layers: list[int], prefix, bar: tqdm) -> list[tuple]:
        """Pairs of a batch and its states, layer -> float32 (batch, hidden). Where memory runs out, batches are halved."""
        done, waiting = [], batches[::-1]
        while waiting:
            batch = waiting.pop()
            try:
                states = self.forward(self.batch(rows, batch), layers, prefix)
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


def chunks(texts: list[str]) -> list[list[str]]:
    """The distinct texts in the lists that are computed together, which depend on nothing but the texts."""
    order = _order(texts)
    return [[texts[i] for i in order[begin : begin + CHUNK]] for begin in range(0, len(order), CHUNK)]


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
