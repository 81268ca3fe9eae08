"""Many TP settings for less work: runs that share their first blocks share them.

The states of TP(start, end) up to block `end` are those of TP(start, any later end). So one pass with the latest end, the
trunk, serves every shorter one: each branches off at its own end and runs only the blocks that are left.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import groupby

import pandas as pd
import torch
from datasets import Dataset
from tqdm import tqdm

from lib.encoder import SentenceEncoder, pool
from lib.forward import block_input, read_states, replace_input
from lib.models import Backbone
from lib.sts import ALL, sts_pairs, sts_scores
from lib.token_prepending import TokenPrepending


class MemoryStore(dict):
    """Embeddings kept in memory, with the methods of `lib.store.EmbeddingStore`."""

    load, save = dict.get, dict.__setitem__


class SweepEncoder(SentenceEncoder):
    """Encodes under TP(start, end) for several ends at once; the arguments are those of `SentenceEncoder`.

    Args:
        tp: gives all but the ends. ends: 0-based blocks, each above `tp.start`.
    """

    def __init__(self, backbone: Backbone, prompt, tp: TokenPrepending, ends: Iterable[int], **options):
        self.ends = sorted(set(ends))
        super().__init__(backbone, prompt, replace(tp, end=self.ends[-1]), **options)
        self.encoders = {end: SentenceEncoder(backbone, prompt, replace(tp, end=end), **options) for end in self.ends}

    def fill(self, sentences: Sequence[str], layers: Iterable[int], store) -> None:
        """Compute the embeddings at `layers` for every end and put them into `store`, where a `SentenceEncoder` with that
        setting finds them. They are what it would have computed itself: the same batches, the same operations.
        """
        texts = list(dict.fromkeys(self.prompt.prepare(sentence) for sentence in sentences))
        layers = sorted({self.backbone.layer_index(layer) for layer in layers})
        for template in self._templates:
            for chunk in self.chunks(texts):
                keys = {(e, n): self.encoders[e].key(template, n, chunk) for e in self.ends for n in layers}
                if all(store.load(key) is not None for key in keys.values()):
                    continue
                with tqdm(disable=True) as bar:
                    for place, rows in self._compute(template, chunk, layers, None, bar).items():
                        store.save(keys[place], rows)

    @torch.inference_mode()
    def _run(self, rows, batch, layers, prefix) -> dict[tuple[int, int], torch.Tensor]:
        """One batch: (end, layer) -> (batch, hidden)."""
        ids, placeholders, first, last = self._positions(rows, batch)

        def run(wanted, tp=None, at=0, states=None, inputs=None):
            with ExitStack() as hooks:
                hooks.enter_context(_resumed(self.backbone, at, states))
                hooks.enter_context(_captured(self.backbone, inputs))
                if tp:
                    hooks.enter_context(tp.attach(self.backbone, placeholders, last))
                return read_states(self.backbone, ids, wanted, lambda s: pool(s, self.pooling, first, last), prefix)

        inputs = dict.fromkeys(self.ends[:-1])
        trunk = run(layers, self.tp, inputs=inputs)
        kept = {}
        for end in self.ends:
            left = [n for n in layers if n > end]
            branch = run(left, at=end, states=inputs[end]) if left and end in inputs else {}
            kept |= {(end, n): branch.get(n, trunk[n]) for n in layers}
        return kept


@contextmanager
def _captured(backbone: Backbone, inputs: dict | None):
    """Puts the states that enter block i into `inputs[i]`, for each key i. Its hooks must come before those of TP."""
    with ExitStack() as hooks:
        for index in inputs or ():
            def before_block(_, args, kwargs, index=index):
                inputs[index] = block_input(args, kwargs)
            hooks.callback(backbone.layers[index].register_forward_pre_hook(before_block, with_kwargs=True).remove)
        yield


@contextmanager
def _resumed(backbone: Backbone, at: int, states: torch.Tensor | None):
    """While active, a forward pass begins at block `at` with `states` (batch, tokens, hidden): the blocks before it do nothing."""
    if states is None:
        yield
        return
    as_tuple = _returns_tuple(backbone)

    def skip(hidden_states, *_, **__):
        return (hidden_states, None, None) if as_tuple else hidden_states

    def enter(_, args, kwargs):
        return replace_input(states, args, kwargs)

    with ExitStack() as undo:
        for block in backbone.layers[:at]:
            # An own `forward` of the block object (accelerate sets one) comes back; else the class's does.
            undo.callback(_restore, block, vars(block).get("forward"))
            block.forward = skip
        undo.callback(backbone.layers[at].register_forward_pre_hook(enter, with_kwargs=True).remove)
        yield


def _restore(block, forward) -> None:
    del block.forward
    if forward is not None:
        block.forward = forward


def _returns_tuple(backbone: Backbone) -> bool:
    """Whether this architecture's blocks return a tuple whose first item is the states, or the states alone."""
    if "returns_tuple" not in vars(backbone):
        seen = []
        handle = backbone.layers[0].register_forward_hook(lambda _, __, output: seen.append(isinstance(output, tuple)))
        try:
            read_states(backbone, torch.zeros(1, 1, dtype=torch.long, device=backbone.device), [1])
        finally:
            handle.remove()
        backbone.returns_tuple = seen[0]
    return backbone.returns_tuple


def shared_blocks(starts_and_ends: Iterable[tuple[int, int]], stop: int) -> tuple[int, int]:
    """Blocks that run per sentence up to state `stop`: with the sharing of `SweepEncoder`, and in independent runs."""
    settings = list(starts_and_ends)
    latest: dict[int, int] = {}
    for start, end in settings:
        latest[start] = max(latest.get(start, 0), end)
    branches = sum(max(stop - end, 0) for start, end in settings if end != latest[start])
    return stop * len(latest) + branches, stop * len(settings)


def score_settings(
    backbone: Backbone, prompt: str, settings: Sequence[TokenPrepending | None], data: Dataset, layers: Iterable[int], store=None
) -> pd.DataFrame:
    """Spearman x 100 at each layer for TP settings and, for None, the plain model.

    Settings of one start share their first blocks; all settings must have the same place, count, init and seed.

    Args:
        store: where embeddings are put and looked for; by default in memory, for this call only.

    Returns:
        Columns prompt, start, end, exit, score, pairs; start and end are -1 for the plain model.
    """
    store, layers, tables = MemoryStore() if store is None else store, list(layers), []
    sentences = [*data["sentence1"], *data["sentence2"]]
    for start, group in groupby(sorted(filter(None, settings), key=lambda tp: tp.start), key=lambda tp: tp.start):
        group = list(group)
        SweepEncoder(backbone, prompt, group[0], [tp.end for tp in group]).fill(sentences, layers, store)
    for tp in settings:
        scores = sts_scores(sts_pairs(SentenceEncoder(backbone, prompt, tp, store=store), {"dev": data}, layers))
        scores = scores[(scores["task"] == "dev") & (scores["subset"] == ALL)]
        named = {"prompt": prompt, "start": tp.start if tp else -1, "end": tp.end if tp else -1, "exit": scores["layer"]}
        tables.append(pd.DataFrame(named | {"score": scores["score"], "pairs": scores["pairs"]}))
    return pd.concat(tables, ignore_index=True)
