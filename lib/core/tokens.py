"""Sentences -> rows of token ids, with the positions that matter: placeholder, pooled span, shared prefix."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass

import numpy as np
from tokenizers import AddedToken

from lib.core.prompts import PLACEHOLDER, SENTENCE

# A prefix shorter than this is not worth a pass of its own.
MIN_PREFIX = 4


@dataclass
class TokenRows:
    """The token ids of many prompts made from one template.

    Attributes:
        ids: one list of token ids per sentence, special tokens included.
        placeholders: per row the position of the first placeholder; None without TP.
        first: per row the position of the first token that a mean pooling counts.
        prefix: how many leading tokens all rows share and nothing sentence-specific can reach.
    """

    ids: list[list[int]]
    placeholders: list[int] | None
    first: list[int]
    prefix: int


class PromptTokenizer:
    """Tokenises prompts as a tokenizer would to which the placeholder was added as one token.

    It works on copies of the tokenizer, so the backbone's own stays as it is. Text inside a sentence that spells a
    special token or the placeholder stays plain text.
    """

    def __init__(self, tokenizer, max_length: int):
        self.tokenizer = tokenizer
        self.max_length = max_length
        self._copies: dict[str, tuple] = {}

    def __call__(self, template: str, sentences: list[str], mean_span: bool = False) -> TokenRows:
        """Tokenise `template` with each sentence in it.

        Args:
            template: holds `{sentence}`, and `<PST>` where it has placeholders.
            sentences: already cleaned.
            mean_span: whether `first` is needed (it costs a little); without it, `first` is 0.

        Warns with the number of sentences that were cut to `max_length` tokens; the prompt around them is never cut.
        """
        marker = PLACEHOLDER
        while any(marker in sentence for sentence in sentences):
            marker = f"<{marker}>"
        tokenizer, marker_id = self._copy_with(marker)
        template = template.replace(PLACEHOLDER, marker)
        sentences = self._cut(tokenizer, template, sentences)
        texts = [template.replace(SENTENCE, sentence) for sentence in sentences]
        spans = mean_span and template != SENTENCE
        encoded = _encode(tokenizer, texts, return_offsets_mapping=spans)
        ids = encoded["input_ids"]
        placeholders = [row.index(marker_id) for row in ids] if marker in template else None
        first = [0] * len(ids)
        if spans:
            tail = len(template) - template.rfind(SENTENCE) - len(SENTENCE)
            starts = [len(text) - tail - len(sentence) for text, sentence in zip(texts, sentences)]
            first = [_token_at(offsets, start) for offsets, start in zip(encoded["offset_mapping"], starts)]
        if placeholders is not None:
            ids = [[0 if token == marker_id else token for token in row] for row in ids]
        # An empty sentence without a prompt has no token at all; one neutral token stands for it.
        ids = [row or [_neutral_token(tokenizer)] for row in ids]
        head = len(_encode(tokenizer, [template.partition(SENTENCE)[0]])["input_ids"][0])
        limits = [head, *(placeholders or []), *(first if mean_span else []), *(len(row) - 1 for row in ids)]
        return TokenRows(ids, placeholders, first, shared_prefix(ids, min(limits)))

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
        texts,
        add_special_tokens=special,
        split_special_tokens=True,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        verbose=False,
        **options,
    )


def _token_at(offsets: list[tuple[int, int]], character: int) -> int:
    """The first token that reaches beyond `character`; the last token if none does (an empty sentence)."""
    return next((i for i, (_, end) in enumerate(offsets) if end > character), len(offsets) - 1)


def _neutral_token(tokenizer) -> int:
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, 0)
    return next(i for i in ids if i is not None)
