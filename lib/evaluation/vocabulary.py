"""Vocabulary entries: what an entry stands for as text, which of them are the same token, and which do not count."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

# English words that say little on their own (closed classes), and the endings that tokenizers cut off.
FUNCTION_WORDS = frozenset("""
    a an the this that these those some any each every no not all both either neither such here there i me my mine you
    your yours he him his she her hers it its we us our ours they them their theirs who whom whose which what myself
    yourself himself herself itself ourselves themselves someone something anyone anything in on at by for with from to
    of about into onto over under between through during before after above below up down out off against among around
    behind beside near toward towards upon within without across along as than like via per and or but nor so yet if
    while because although though until unless since when where why how whether be am is are was were been being do does
    did done doing have has had having will would shall should can could may might must also just only too very then now
    again more most much many other another same own s 's 't 're 've 'll 'd 'm n't""".split())


@dataclass(frozen=True)
class TokenRule:
    """Which vocabulary entries are the same token, and which do not count: these leave text and ranking."""

    special: bool = False  # whether special tokens count, such as a text's first `<s>`
    merge_space: bool = True  # whether " dog", as in a text, is "dog", as a model expects after a quotation mark
    merge_case: bool = True  # whether "Dog" is "dog"
    function_words: bool = True  # whether `FUNCTION_WORDS` count, and entries without letter and digit


# From the official code's rule (exact ids of `tokenizer.encode`) to the strictest, one change at a time.
RULES = {
    "exact ids (official code)": TokenRule(special=True, merge_space=False, merge_case=False),
    "no special tokens": TokenRule(merge_space=False, merge_case=False),
    "spaces merged": TokenRule(merge_case=False),
    "spaces and case merged": TokenRule(),
    "content words only": TokenRule(function_words=False)}
OFFICIAL_RULE, _, _, DEFAULT_RULE, CONTENT_RULE = RULES.values()


@lru_cache(maxsize=16)
def token_classes(tokenizer, size: int, rule: TokenRule) -> np.ndarray:
    """The token of each entry, int64 (size,), read-only: the smallest id of its entries, -1 if it does not count."""
    first, classes = {}, np.arange(size)
    for i, text in enumerate(token_texts(tokenizer, range(size))):
        word = text.strip().lower()
        if not rule.function_words and (word in FUNCTION_WORDS or not any(c.isalnum() for c in word)):
            classes[i] = -1
        elif rule.merge_space or rule.merge_case:
            text = text.removeprefix(" ") if rule.merge_space and word else text
            classes[i] = first.setdefault(text.lower() if rule.merge_case else text, i)
    if not rule.special:
        added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        classes[[i for i in added.union(tokenizer.all_special_ids) if i < size]] = -1
    classes.flags.writeable = False
    return classes


def token_texts(tokenizer, ids: Sequence[int]) -> list[str]:
    """What vocabulary entries stand for, with their leading space; part of a character, or no token, is `<id 123>`."""
    ids = [int(i) for i in ids]
    texts = tokenizer.batch_decode([[i] for i in ids], clean_up_tokenization_spaces=False)
    for k, (i, name) in enumerate(zip(ids, tokenizer.convert_ids_to_tokens(ids))):
        if name is None or "\ufffd" in texts[k] and not name.startswith("▁"):
            texts[k] = f"<id {i}>"
        elif name.startswith("▁"):  # SentencePiece: decoding one token alone would drop its space
            texts[k] = name.replace("▁", " ")
    return texts


def visible(text: str) -> str:
    """A token for display: its leading spaces as `␣`, line breaks and other invisible characters as escapes."""
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return re.sub("^ +", lambda spaces: "␣" * len(spaces[0]), shown)


def text_tokens(tokenizer, texts: Sequence[str], classes: np.ndarray) -> list[np.ndarray]:
    """T of each text, int64: its ids as the tokenizer encodes it, special tokens included, as tokens that count."""
    rows = tokenizer(list(texts), return_attention_mask=False, verbose=False)["input_ids"]
    tokens = (classes[np.asarray(row, np.int64)] for row in rows)
    return [row[row >= 0] for row in tokens]
