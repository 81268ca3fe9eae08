"""Sentences to embeddings: deduplicated, sorted by length, cut into batches by tokens, no layer too many."""

import warnings
from collections import namedtuple
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import KW_ONLY, dataclass, replace
from itertools import chain

import numpy as np
import torch
from tqdm import tqdm

from lib.core import processes
from lib.core.backbone import Backbone
from lib.core.code_version import code_version
from lib.core.forward import ONE_AT_A_TIME, check_finite, run_prefix, shares_prefix
from lib.core.hardware import token_batches
from lib.core.pooling import Pooling
from lib.core.postprocess import Normalise, Postprocess
from lib.core.prompts import PLACEHOLDER, Prompt, get_prompt
from lib.core.store import EmbeddingStore, fingerprint
from lib.core.tokens import Batch, PromptTokenizer, TokenRows

CHUNK = 2048  # sentences that are encoded together and then stored: what an interrupt can cost
# Computed together: the `TokenRows` of one template and one chunk of texts, and its batches, lists of rows' numbers.
Pass = namedtuple("Pass", "rows batches")


@dataclass(eq=False, repr=False)
class SentenceEncoder:
    """Embeddings of sentences from a frozen causal language model. An encoder is four choices on a backbone. Raises
    `ValueError` for an unknown prompt or pooling, a layer that does not exist, a method that does not suit the prompt
    or the model, and for no method on a prompt whose template holds a placeholder.

    Args:
        backbone: from `load_backbone`; encoders can share it. prompt: a `Prompt` or its name in `PROMPTS`.
        method: what is changed inside the forward pass; None is the baseline. An object as `TokenPrepending` is, with
            `attach(backbone, batch)`, a context manager in which forward passes on the batch run with it, and which
            leaves nothing behind; `describe()`, it as plain data; and where needed `templates(prompt)`, the prompt's
            with its placeholders, and `check(backbone)`, which both raise `ValueError` if it does not suit them.
        exit_layer: which state is the embedding, as `Backbone` counts them. Later blocks are not run.
        pooling: a `Pooling` or its name; None takes the prompt's own. postprocess: one of `lib.core.postprocess`.
        max_length: tokens, prompt included; longer sentences are cut, with a warning.
        batch_size: at most so many sentences in a batch, unless `encode` is told otherwise; None: as its tokens allow.
        share_prefix: run what stands before the sentence once. store: an `EmbeddingStore`, to compute nothing twice."""

    backbone: Backbone
    prompt: str | Prompt = "prompteol"
    method: object | None = None
    exit_layer: int = -1
    pooling: str | Pooling | None = None
    postprocess: Postprocess | None = None
    _: KW_ONLY
    max_length: int = 512
    batch_size: int | None = None
    share_prefix: bool = True
    store: EmbeddingStore | None = None

    def __post_init__(self):
        backbone, method, prompt = self.backbone, self.method, get_prompt(self.prompt)
        self.prompt, self.exit_layer = prompt, backbone.layer_index(self.exit_layer)
        self.pooling, self.max_length = self.pooling or prompt.pooling, min(self.max_length, backbone.max_length)
        self.pooling = Pooling(self.pooling) if isinstance(self.pooling, str) else self.pooling
        for choice in filter(lambda choice: hasattr(choice, "check"), (self.pooling, method)):
            choice.check(backbone)
        self.templates = method.templates(prompt) if hasattr(method, "templates") else prompt.templates
        if not method and any(PLACEHOLDER in template for template in self.templates):
            raise ValueError(f"Prompt {prompt.name!r} holds a placeholder, so it needs a method that uses it.")
        self.tokenize = PromptTokenizer(backbone.tokenizer, self.max_length, prompt.before, prompt.after)
        self.code = code_version(*(type(choice).__module__ for choice in (self, self.pooling, method) if choice))

    def changed(self, **choices) -> "SentenceEncoder":
        """The same encoder with other choices, by the names of the arguments."""
        return replace(self, **choices)

    def encode(self, sentences: str | Sequence[str], batch_size: int | None = None,
               show_progress_bar: bool | None = None, convert_to_numpy: bool = True,
               normalize_embeddings: bool = False) -> np.ndarray | torch.Tensor:
        """Embed a list of sentences, or one string, at the exit layer: float32 (sentences, hidden), or (hidden,).
        Raises `ValueError` for an empty list or a batch size below 1, `TypeError` for an item that is not a string, and
        `FloatingPointError` for a state that is not finite (float16 overflows in some models).

        Args:
            batch_size: at most so many sentences in a batch; None takes the encoder's.
            show_progress_bar: None shows one when there are more than 1,000 sentences to compute.
            convert_to_numpy: else a torch tensor on the CPU. normalize_embeddings: scale each embedding to length 1."""
        if isinstance(sentences, str):
            return self.encode([sentences], batch_size, show_progress_bar, convert_to_numpy, normalize_embeddings)[0]
        (embeddings,) = self.encode_layers(sentences, [self.exit_layer], batch_size, show_progress_bar).values()
        embeddings = Normalise()(embeddings) if normalize_embeddings else embeddings
        return embeddings if convert_to_numpy else torch.from_numpy(embeddings)

    def encode_layers(self, sentences: Sequence[str], layers: Iterable[int], batch_size: int | None = None,
                      show_progress_bar: bool | None = None) -> dict[int, np.ndarray]:
        """Embed sentences at several layers in one pass: layer as given (a -1 stays -1) -> float32 (sentences, hidden).
        Arguments and errors as in `encode`; besides, `ValueError` for another layer than the one of the postprocess."""
        sentences, batch_size = check_texts(sentences), self.batch_size if batch_size is None else batch_size
        if batch_size is not None and (not isinstance(batch_size, (int, np.integer)) or batch_size < 1):
            raise ValueError(f"batch_size must be a whole number from 1 on (or None), got {batch_size!r}.")
        if not (index := {layer: self.backbone.layer_index(layer) for layer in layers}):
            raise ValueError("No layer was asked for: the list of layers is empty.")
        if self.postprocess and set(index.values()) != {self.exit_layer}:
            raise ValueError(f"The postprocess belongs to layer {self.exit_layer}; no other can be read with it.")
        texts, wanted, count = list(map(self.prompt.prepare, sentences)), sorted({*index.values()}), len(self.templates)
        parts, total = chunks(texts), dict.fromkeys(wanted, 0)
        position = {text: i for i, text in enumerate(chain(*parts))}
        show = len(position) > 1000 if show_progress_bar is None else show_progress_bar
        options = {"desc": self.prompt.name, "unit": "sentence", "disable": not show, "leave": False}
        with tqdm(total=count * len(position), **options) as bar:
            for template in self.templates:
                states = [self._stored_or_computed(template, part, wanted, batch_size, bar) for part in parts]
                for n in wanted:
                    total[n] += np.concatenate([part[n] for part in states]) / np.float32(count)
        rows, finish = [position[text] for text in texts], self.postprocess or np.asarray
        return {layer: finish(total[n][rows]) for layer, n in index.items()}

    def describe(self) -> dict:
        """The encoder as plain data, for the provenance of a result."""
        prompt, method, finish = self.prompt, self.method, self.postprocess
        return self.backbone.describe() | {
            "prompt": prompt.name, "templates": list(prompt.templates), "cleaned": prompt.clean,
            "around": [list(prompt.before), list(prompt.after)], "method": method and method.describe(),
            "exit_layer": self.exit_layer, "max_length": self.max_length, "share_prefix": self.share_prefix,
            "batch_size": self.batch_size, **self.pooling.describe(), "postprocess": finish and finish.describe()}

    def passes(self, sentences: Sequence[str], batch_size: int | None = None) -> list[Pass]:
        """What `encode` computes, template by template and chunk by chunk, without the computation."""
        parts = chunks(map(self.prompt.prepare, sentences))
        return [self._pass(template, part, batch_size) for template in self.templates for part in parts]

    def batch(self, rows: TokenRows, indices: Sequence[int]) -> Batch:
        """Some rows of a `Pass`, on the model's device."""
        return rows.batch(indices, self.backbone.device)

    def forward(self, batch: Batch, layers: Iterable[int], prefix=None) -> dict[int, torch.Tensor]:
        """One batch through the model: layer -> (batch, hidden), on its device. A `prefix` is one of `run_prefix`."""
        with ONE_AT_A_TIME, self.method.attach(self.backbone, batch) if self.method else nullcontext():
            return self.pooling.read(self.backbone, batch, layers, prefix)

    def _pass(self, template: str, texts: list[str], batch_size: int | None) -> Pass:
        rows = self.tokenize(template, texts, span=self.pooling.needs_span)
        if not (self.share_prefix and rows.prefix and shares_prefix(self.backbone)):
            rows.prefix = 0
        lengths = [len(row) - rows.prefix for row in rows.ids]
        return Pass(rows, token_batches(lengths, self.backbone.device, batch_size or self.batch_size))

    def _stored_or_computed(self, template: str, texts: list[str], layers: list[int], batch_size, bar: tqdm) -> dict:
        """One chunk, layer -> float32 (texts, hidden): all from the store, or all computed together and stored. A key
        is of what decides embeddings before the postprocess: of all texts, because neighbours decide the rounding, and
        not of the prompt's name, so that CK finds what CoT and KE stored."""
        left_out = dict.fromkeys(("prompt", "templates", "exit_layer", "postprocess"))
        run = {"template": template, "texts": texts, "batch_size": batch_size, "code": self.code}
        about = self.describe() | left_out | run if self.store else {}
        keys = {n: fingerprint(about | {"layer": n}) for n in layers} if self.store else {}
        states = processes.from_main(lambda: {n: self.store.load(key) for n, key in keys.items()}) if keys else {}
        if not states or any(rows is None for rows in states.values()):
            states = self._compute(self._pass(template, texts, batch_size), layers, bar)
            for n, key in keys.items():
                self.store.save(key, states[n])
        return states

    def _compute(self, work: Pass, layers: list[int], bar: tqdm) -> dict[int, np.ndarray]:
        """Run the model, or of several processes each its share of the batches: layer -> float32 (texts, hidden)."""
        rows, done = work.rows, []
        ids = torch.tensor(rows.ids[0][: rows.prefix], device=self.backbone.device)
        prefix = run_prefix(self.backbone, ids, max(layers)) if rows.prefix else None
        waiting = work.batches[processes.index() :: processes.count()][::-1]
        while waiting:
            batch = waiting.pop()
            try:
                states = self.forward(self.batch(rows, batch), layers, prefix)
            except RuntimeError as error:
                no_memory = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
                if len(batch) == 1 or not no_memory:
                    raise
                warnings.warn(f"Out of memory with {len(batch)} sentences in a batch; halving batches.", stacklevel=2)
                middles = [((len(whole) + 1) // 2, whole) for whole in (*waiting, batch)]
                waiting = [half for k, whole in middles for half in (whole[k:], whole[:k]) if half]
                continue  # out of `except`, whose error keeps the failed pass's activations alive
            done.append((batch, {n: pooled.float().cpu().numpy() for n, pooled in states.items()}))
            bar.update(len(batch))
        batches, parts = zip(*processes.gather(done))
        back = np.argsort(np.concatenate(batches))
        states = {n: np.concatenate([part[n] for part in parts])[back] for n in parts[0]}
        for pooled in states.values():
            check_finite(pooled, self.backbone.name, self.backbone.dtype)
        return states


def check_texts(sentences: Sequence[str]) -> list[str]:
    """The sentences as a list; `TypeError` or `ValueError` for what cannot be embedded, with the place of the first."""
    if isinstance(sentences, (str, Mapping)) or hasattr(sentences, "columns"):
        raise TypeError(f"Expected a list of strings, got a {type(sentences).__name__}; give one column or its values.")
    if not (texts := list(sentences)):
        raise ValueError("There is nothing to encode: the list of sentences is empty.")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"Sentence {i} is {type(text).__name__}, not a string: {text!r:.60}")
        if text.encode(errors="ignore").decode() != text:
            raise ValueError(f"Sentence {i} holds half a character, which no tokenizer takes: {text!r:.60}")
    return texts


def chunks(texts: Iterable[str]) -> list[list[str]]:
    """The distinct texts, longest first, in the lists that are computed together: only the texts decide them."""
    order = sorted(set(texts), key=lambda text: (-len(text), text))
    return [order[begin : begin + CHUNK] for begin in range(0, len(order), CHUNK)]
