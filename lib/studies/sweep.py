"""Many TP settings for less work: runs that share their first blocks share them.

The states of TP(start, end) up to block `end` are those of TP(start, any later end). So one pass with the latest end, the
trunk, serves every shorter one: each branches off at its own end and runs only the blocks that are left.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import pandas as pd
import torch
from datasets import Dataset
from tqdm import tqdm

from lib.core import processes
from lib.core.encoder import SentenceEncoder, pool
from lib.core.forward import read_states
from lib.core.backbone import Backbone
from lib.evaluation.sts import ALL, sts_pairs, sts_scores
from lib.core.token_prepending import TokenPrepending


class MemoryStore(dict):
    """Embeddings kept in memory, with the methods of `lib.core.store.EmbeddingStore`."""

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
                if processes.from_main(lambda keys=keys: all(store.load(k) is not None for k in keys.values())):
                    continue
                with tqdm(disable=True) as bar:
                    for place, rows in self._compute(template, chunk, layers, None, bar).items():
                        store.save(keys[place], rows)

    @torch.inference_mode()
    def _run(self, rows, batch, layers, prefix) -> dict[tuple[int, int], torch.Tensor]:
        """One batch: (end, layer) -> (batch, hidden)."""
        ids, placeholders, first, last = self._positions(rows, batch)
        blocks, outputs = list(self.backbone.layers), {}

        def read(wanted):
            return read_states(self.backbone, ids, wanted, lambda s: pool(s, self.pooling, first, last), prefix)

        with ExitStack() as hooks:
            for end in self.ends[:-1]:
                def keep_output(_, __, output, end=end):
                    outputs[end] = output
                hooks.callback(blocks[end - 1].register_forward_hook(keep_output).remove)
            with self.tp.attach(self.backbone, placeholders, last):
                trunk = read(layers)
        found = {(end, n): state for end in self.ends for n, state in trunk.items()}
        for end, output in outputs.items():
            later = [n for n in layers if n > end]
            if later:
                with _returning(output, blocks[:end]):
                    found |= {(end, n): state for n, state in read(later).items()}
        return found


@contextmanager
def _returning(output, blocks: list[torch.nn.Module]):
    """While active, these blocks compute nothing and return `output`."""
    own = [vars(block).get("forward") for block in blocks]  # set on the object and not the class, as accelerate does
    for block in blocks:
        block.forward = lambda *_, **__: output
    try:
        yield
    finally:
        for block, forward in zip(blocks, own):
            del block.forward
            if forward is not None:
                block.forward = forward


def shared_blocks(starts_and_ends: Iterable[tuple[int, int]], stop: int) -> tuple[int, int]:
    """Blocks that run per sentence up to state `stop`: with the sharing of `SweepEncoder`, and in independent runs."""
    settings = sorted(starts_and_ends)
    latest = dict(settings)  # start -> its last end
    branches = sum(max(stop - end, 0) for start, end in settings if end != latest[start])
    return stop * len(latest) + branches, stop * len(settings)


def score_settings(
    backbone: Backbone, prompt: str, settings: Sequence[TokenPrepending | None], data: Dataset, layers: Iterable[int],
    store=None,
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
    for start in {tp.start for tp in settings if tp}:
        group = [tp for tp in settings if tp and tp.start == start]
        SweepEncoder(backbone, prompt, group[0], [tp.end for tp in group]).fill(sentences, layers, store)
    for tp in settings:
        scores = sts_scores(sts_pairs(SentenceEncoder(backbone, prompt, tp, store=store), {"dev": data}, layers))
        scores = scores[(scores["task"] == "dev") & (scores["subset"] == ALL)].rename(columns={"layer": "exit"})
        tables.append(scores.assign(prompt=prompt, start=tp.start if tp else -1, end=tp.end if tp else -1))
    return pd.concat(tables, ignore_index=True)[["prompt", "start", "end", "exit", "score", "pairs"]]
