"""From sentences to rows of token ids, with the positions that matter: placeholders, pooled span, shared prefix."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import AddedToken

from lib.core.prompts import PLACEHOLDER, SENTENCE

# A prefix shorter than this is not worth a pass of its own.
MIN_PREFIX = 4


@dataclass
class TokenRows:
    """The token ids of many prompts made from one template.

    Attributes:
        texts: the prepared sentence of each row.
        ids: one list of token ids per row, special tokens included.
        placeholders: the positions of all placeholders of each row, in order; None if the template has none.
        first: per row the position of the first token that a mean pooling counts.
        prefix: how many leading tokens all rows share and nothing that depends on the sentence can reach.
    """

    texts: list[str]
    ids: list[list[int]]
    placeholders: list[list[int]] | None
    first: list[int]
    prefix: int

    def batch(self, indices: Sequence[int], device: torch.device) -> Batch:
        """Some rows after the shared prefix, padded on the right with token 0."""
        lengths = [len(self.ids[i]) - self.prefix for i in indices]
        ids = np.zeros((len(indices), max(lengths)), np.int64)
        for k, i in enumerate(indices):
            ids[k, : lengths[k]] = self.ids[i][self.prefix :]
        placeholders = None
        if self.placeholders is not None:
            placeholders = torch.tensor([self.placeholders[i] for i in indices], device=device) - self.prefix
        first = torch.tensor([self.first[i] - self.prefix for i in indices], device=device)
        last = torch.tensor(lengths, device=device) - 1
        return Batch(torch.from_numpy(ids).to(device), placeholders, first, last, [self.texts[i] for i in indices])


@dataclass(frozen=True)
class Batch:
    """Rows that go through the model together; positions are counted in the tokens of `ids`.

    Attributes:
        ids: int64 (batch, tokens), padded on the right, without the shared prefix.
        placeholders: int64 (batch, count), the position of every placeholder; None without one.
        first, last: int64 (batch,), the first token that a mean counts and the last real token.
        texts: the prepared sentence of each row.
    """

    ids: torch.Tensor
    placeholders: torch.Tensor | None
    first: torch.Tensor
    last: torch.Tensor
    texts: list[str]


class PromptTokenizer:
    """Tokenises prompts as a tokenizer would to which the placeholder was added as one token.

    It works on copies of the tokenizer, so the backbone's own stays as it is. Text inside a sentence that spells a
    special token or the placeholder stays plain text.

    Args:
        tokenizer: of Transformers, with a fast implementation.
        max_length: in tokens; longer sentences are cut.
        before, after: tokens put around every prompt as ids. Raises `ValueError` if the vocabulary does not have them.
    """

    def __init__(self, tokenizer, max_length: int, before: Sequence[str] = (), after: Sequence[str] = ()):
        self.tokenizer = tokenizer
        self.before, self.after = (tokenizer.convert_tokens_to_ids(list(side)) for side in (before, after))
        if {None, tokenizer.unk_token_id} & {*self.before, *self.after}:
            raise ValueError(f"This tokenizer has no single tokens for {[*before, *after]}.")
        if self.after and tokenizer("")["input_ids"][-len(self.after) :] == self.after:
            self.after = []  # this tokenizer closes every text with them by itself
        self.max_length = max_length - len(self.before) - len(self.after)
        self._copies: dict[str, tuple] = {}

    def __call__(self, template: str, sentences: list[str], span: bool = False) -> TokenRows:
        """Tokenise `template` with each sentence in it.

        Args:
            template: holds `{sentence}`, and `<PST>` wherever it has placeholders.
            sentences: prepared already (`Prompt.prepare`).
            span: whether `first` is needed, which costs a little; without it, `first` is 0.

        Warns with the number of sentences that were cut to `max_length` tokens; the prompt around them is never cut.
        """
        marker = PLACEHOLDER
        while any(marker in sentence for sentence in sentences):
            marker = f"<{marker}>"
        tokenizer, marker_id = self._copy_with(marker)
        template = template.replace(PLACEHOLDER, marker)
        sentences, given = self._cut(tokenizer, template, sentences), sentences
        texts = [template.replace(SENTENCE, sentence) for sentence in sentences]
        offsets_needed = span and template != SENTENCE
        encoded = _encode(tokenizer, texts, return_offsets_mapping=offsets_needed)
        ids, first = encoded["input_ids"], [0] * len(texts)
        placeholders = None
        if marker in template:
            placeholders = [[i for i, token in enumerate(row) if token == marker_id] for row in ids]
            ids = [[0 if token == marker_id else token for token in row] for row in ids]
        if offsets_needed:
            tail = len(template) - template.rfind(SENTENCE) - len(SENTENCE)
            starts = [len(text) - tail - len(sentence) for text, sentence in zip(texts, sentences)]
            first = [_token_at(offsets, start) for offsets, start in zip(encoded["offset_mapping"], starts)]
        # An empty sentence without a prompt has no token at all; one neutral token stands for it.
        ids = [row or [_neutral_token(tokenizer)] for row in ids]
        head = len(_encode(tokenizer, [template.partition(SENTENCE)[0]])["input_ids"][0])
        limits = [head, *(first if span else ()), *(row[0] for row in placeholders or ()), *(len(row) - 1 for row in ids)]
        return self._framed(TokenRows(given, ids, placeholders, first, shared_prefix(ids, min(limits))))

    def _framed(self, rows: TokenRows) -> TokenRows:
        """The rows with the tokens `before` and `after` around them."""
        shift = len(self.before)
        if shift or self.after:
            rows.ids = [[*self.before, *row, *self.after] for row in rows.ids]
            rows.first = [first and first + shift for first in rows.first]
            rows.prefix = rows.prefix and rows.prefix + shift
            if rows.placeholders is not None:
                rows.placeholders = [[place + shift for place in row] for row in rows.placeholders]
        return rows

    def _copy_with(self, marker: str):
        if marker not in self._copies:
            tokenizer = copy.deepcopy(self.tokenizer)
            # Not a *special* token: those are switched off below, so that sentences cannot contain one.
            tokenizer.add_tokens([AddedToken(marker, normalized=False, special=False)])
            self._copies[marker] = tokenizer, tokenizer.convert_tokens_to_ids(marker)
        return self._copies[marker]

    def _cut(self, tokenizer, template: str, sentences: list[str]) -> list[str]:
        """Shorten the sentences that do not fit, at a token boundary."""
        copies = template.count(SENTENCE)
        around = len(_encode(tokenizer, [template.replace(SENTENCE, "")])["input_ids"][0])
        # Tokens may split differently where the cut sentence meets the prompt.
        room = (self.max_length - around - 4 * copies) // copies
        if room < 1:
            raise ValueError(f"max_length={self.max_length} leaves no room: the prompt alone has {around} tokens.")
        cut = list(sentences)
        # A token holds at least one byte, so short texts need no look.
        suspects = [i for i, sentence in enumerate(sentences) if len(sentence.encode()) > room]
        if suspects:
            encoded = _encode(tokenizer, [sentences[i] for i in suspects], special=False, return_offsets_mapping=True)
            long = [(i, offsets) for i, offsets in zip(suspects, encoded["offset_mapping"]) if len(offsets) > room]
            for i, offsets in long:
                cut[i] = sentences[i][: offsets[room][0]]
            if long:
                warnings.warn(f"{len(long)} of {len(sentences)} sentences were cut to {room} tokens.", stacklevel=3)
        return cut


def shared_prefix(ids: list[list[int]], limit: int) -> int:
    """Length of the common beginning of all rows, at most `limit`; 0 if it is too short to be worth a pass."""
    limit = max(limit, 0)
    heads = np.array([row[:limit] for row in ids])
    equal = (heads == heads[0]).all(axis=0)
    length = limit if equal.all() else int(equal.argmin())
    return length if length >= MIN_PREFIX else 0


def _encode(tokenizer, texts: list[str], special: bool = True, **options) -> dict:
    return tokenizer(
        texts, add_special_tokens=special, split_special_tokens=True, padding=False, truncation=False,
        return_attention_mask=False, verbose=False, **options,
    )


def _token_at(offsets: list[tuple[int, int]], character: int) -> int:
    """The first token that reaches beyond `character`; the last token if none does (an empty sentence)."""
    return next((i for i, (_, end) in enumerate(offsets) if end > character), len(offsets) - 1)


def _neutral_token(tokenizer) -> int:
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, 0)
    return next(i for i in ids if i is not None)
