"""From sentences to rows of token ids, with the positions that matter: placeholders, pooled span, shared prefix."""

import copy
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from tokenizers import AddedToken
from torch.nn.utils.rnn import pad_sequence

from lib.core.prompts import PLACEHOLDER, SENTENCE

MIN_PREFIX = 4  # a shorter prefix is not worth a pass of its own
# Special tokens that a text spells are text, and long texts are no reason for a warning: they are cut here.
OPTIONS = {"split_special_tokens": True, "return_attention_mask": False, "verbose": False}


@dataclass(frozen=True)
class Batch:
    """Rows that go through the model together: `ids`, int64 (batch, tokens), padded on the right, without the shared
    prefix; in them the positions of every placeholder, int64 (batch, count) or None, of the first token that a mean
    counts and of the last real token, both int64 (batch,); and the prepared sentences, cut where they were too long."""

    ids: torch.Tensor
    placeholders: torch.Tensor | None
    first: torch.Tensor
    last: torch.Tensor
    texts: list[str]


@dataclass
class TokenRows:
    """The token ids of many prompts made from one template, special tokens included, and the positions of a `Batch` in
    the whole rows, one item a row; `prefix` leading tokens are the same in all rows, whatever the sentences."""

    texts: list[str]
    ids: list[list[int]]
    placeholders: list[list[int]] | None
    first: list[int]
    prefix: int

    def batch(self, indices: Sequence[int], device: torch.device) -> Batch:
        """Some rows after the shared prefix, padded on the right with token 0."""
        rows = [torch.tensor(self.ids[i][self.prefix :]) for i in indices]
        ends = [self.first[i] - self.prefix for i in indices], [len(row) - 1 for row in rows]
        places = self.placeholders and [[place - self.prefix for place in self.placeholders[i]] for i in indices]
        first, last, places = (side and torch.tensor(side, device=device) for side in (*ends, places))
        ids = pad_sequence(rows, batch_first=True).to(device)
        return Batch(ids, places, first, last, [self.texts[i] for i in indices])


class PromptTokenizer:
    """Tokenises prompts as a fast tokenizer of Transformers would to which the placeholder was added as one token, on
    copies of it. What in a sentence spells a special token or the placeholder stays plain text. A prompt has at most
    `max_length` tokens, with those put around it, `before` and `after`: `ValueError` if the vocabulary lacks one."""

    def __init__(self, tokenizer, max_length: int, before: Sequence[str] = (), after: Sequence[str] = ()):
        self.tokenizer = tokenizer
        self.before, self.after = (tokenizer.convert_tokens_to_ids(list(side)) for side in (before, after))
        if {None, tokenizer.unk_token_id} & {*self.before, *self.after}:
            raise ValueError(f"This tokenizer has no single tokens for {[*before, *after]}.")
        if self.after and tokenizer("")["input_ids"][-len(self.after) :] == self.after:
            self.after = []  # this tokenizer closes every text with them by itself
        self.max_length = max_length - len(self.before) - len(self.after)
        self._copy_with = cache(self._copy_with)

    def __call__(self, template: str, sentences: list[str], span: bool = False) -> TokenRows:
        """Tokenise `template`, which may hold `<PST>`, with each prepared sentence in it. Sentences that make it too
        long are cut, with a warning, and never the prompt. Without `span`, which costs a little, `first` is 0."""
        marker = PLACEHOLDER
        while any(marker in sentence for sentence in sentences):
            marker = f"<{marker}>"
        tokenizer, marker_id = self._copy_with(marker)
        template = template.replace(PLACEHOLDER, marker)
        cut = self._cut(tokenizer, template, sentences)
        texts = [template.replace(SENTENCE, sentence) for sentence in cut]
        spanned, shift = span and template != SENTENCE, len(self.before)
        encoded = tokenizer(texts, return_offsets_mapping=spanned, **OPTIONS)
        head = tokenizer(template.partition(SENTENCE)[0], **OPTIONS)["input_ids"]
        # An empty sentence without a prompt has no token at all; one neutral token stands for it.
        neutral = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, 0)
        neutral = [token for token in neutral if token is not None][:1]
        ids = [[*self.before, *(row or neutral), *self.after] for row in encoded["input_ids"]]
        placeholders, first = None, [0] * len(ids)
        if marker in template:
            placeholders = [[i for i, token in enumerate(row) if token == marker_id] for row in ids]
            ids = [[0 if token == marker_id else token for token in row] for row in ids]
        if spanned:
            tail = len(template) - template.rfind(SENTENCE) - len(SENTENCE)
            for k, (text, sentence, offsets) in enumerate(zip(texts, cut, encoded["offset_mapping"])):
                begin = len(text) - tail - len(sentence)
                # The first token that reaches beyond the begin; the last one if none does (an empty sentence).
                place = next((i for i, (_, end) in enumerate(offsets) if end > begin), len(offsets) - 1)
                first[k] = place and place + shift
        limits = [shift + len(head), *(row[0] for row in placeholders or ()), *(first if span else ())]
        limits += [len(row) - 1 - len(self.after) for row in ids]
        shared = min(len(os.path.commonprefix(ids)), *limits)
        return TokenRows(cut, ids, placeholders, first, shared if shared >= MIN_PREFIX else 0)

    def _copy_with(self, marker: str) -> tuple:
        """A copy of the tokenizer with one more token, and the token's id."""
        tokenizer = copy.deepcopy(self.tokenizer)
        # Not a *special* token: those are switched off, so that sentences cannot contain one.
        tokenizer.add_tokens([AddedToken(marker, normalized=False, special=False)])
        return tokenizer, tokenizer.convert_tokens_to_ids(marker)

    def _cut(self, tokenizer, template: str, sentences: list[str]) -> list[str]:
        """The sentences, where they do not fit shortened at a token boundary."""
        copies = template.count(SENTENCE)
        around = len(tokenizer(template.replace(SENTENCE, ""), **OPTIONS)["input_ids"])
        room = (self.max_length - around - 4 * copies) // copies  # 4: tokens may split anew where they meet the prompt
        if room < 1:
            raise ValueError(f"max_length={self.max_length} leaves no room: the prompt alone has {around} tokens.")
        long = [i for i, sentence in enumerate(sentences) if len(sentence.encode()) > room]  # a token is a byte or more
        options = OPTIONS | {"add_special_tokens": False, "return_offsets_mapping": True}
        found = tokenizer([sentences[i] for i in long], **options)["offset_mapping"] if long else ()
        if ends := {i: offsets[room][0] for i, offsets in zip(long, found) if len(offsets) > room}:
            warnings.warn(f"{len(ends)} of {len(sentences)} sentences were cut to {room} tokens.", stacklevel=3)
        return [sentence[: ends.get(i)] for i, sentence in enumerate(sentences)]
