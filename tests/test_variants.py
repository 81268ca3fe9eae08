"""Every variant of TP against a loop over the blocks without hooks."""

import numpy as np
import pytest
import torch
from tiny_models import LAYERS, SPARE_TOKEN, assert_same, hook_ids, loop_states, official_ids, tiny_backbone

from lib.core.encoder import SentenceEncoder
from lib.core.prompts import PROMPTS, SENTENCE
from lib.core.token_prepending import TokenPrepending
from lib.core.variants import Variant, closing_tokens

pytestmark = pytest.mark.usefixtures("one_thread")

SENTENCES = ["The plane takes off.", "Three children, who are cold, run across the snowy field.", "No."]
START, END = 1, 3
PROMPT = PROMPTS["prompteol"]


def mask_of(size, visible):
    """Additive mask (1, 1, size, size) from a rule `visible(query, key)`."""
    rows = [[0.0 if visible(q, k) else torch.finfo(torch.float32).min for k in range(size)] for q in range(size)]
    return torch.tensor(rows)[None, None]


def write(place, state):
    """A change that writes `state(i, h, block, args, kwargs, states)` before the blocks of the span."""
    def change(i, h, block, args, kwargs, states):
        if START <= i < END:
            h[:, place] = state(i, h, block, args, kwargs, states)
        return h, kwargs
    return change


def first_of(output):
    return output[0] if isinstance(output, tuple) else output


def masked(place, blocks, rule, writes=True):
    """A change with another mask in some blocks, and TP's own writes."""
    def change(i, h, block, args, kwargs, states):
        if writes and START <= i < END:
            h[:, place] = h[:, -1]
        if i in blocks:
            kwargs["attention_mask"] = mask_of(h.shape[1], rule)
        return h, kwargs
    return change


def references(place, last, closing):
    """Variant -> the change that a plain loop makes for it."""
    end = last - closing
    return {
        Variant(START, END): write(place, lambda i, h, *_: h[:, -1]),
        Variant(START, END, write="nothing"): lambda i, h, block, args, kwargs, states: (h, kwargs),
        Variant(START, END, write="mean"): write(place, lambda i, h, *_: h[:, place + 1 :].mean(dim=1)),
        Variant(START, END, write="older"): write(place, lambda i, h, block, args, kwargs, states: states[i - 1][None, -1]),
        Variant(START, END, write="same"): write(
            place, lambda i, h, block, args, kwargs, states: first_of(block(h, *args, **kwargs))[:, -1]),
        Variant(0, 2, resume=3): lambda i, h, block, args, kwargs, states: (
            h.index_copy(1, torch.tensor([place]), h[:, -1:]) if i in (0, 1, 3) else h, kwargs),
        Variant(START, END, hide="before"): masked(place, {0}, lambda q, k: k <= q and (k != place or q == k)),
        Variant(START, END, hide="after"): masked(place, {3}, lambda q, k: k <= q and (k != place or q == k)),
        Variant(START, END, write="nothing", open="last_token"): masked(
            place, {1, 2}, lambda q, k: k <= q or (k == last and q > place), writes=False),
        Variant(START, END, write="nothing", open="sentence", closing=closing): masked(
            place, {1, 2}, lambda q, k: k <= q or (place < k <= end and place < q <= end), writes=False),
    }


COUNT = len(references(0, 0, 0))


@pytest.mark.parametrize("case", range(COUNT))
@pytest.mark.parametrize("share_prefix", [True, False])
def test_variants_equal_a_plain_loop(case, share_prefix):
    backbone = tiny_backbone("llama")
    before, closing = hook_ids(backbone.model), closing_tokens(backbone, PROMPT)
    variant = list(references(0, 0, closing))[case]
    states = SentenceEncoder(backbone, PROMPT, variant, share_prefix=share_prefix).encode_layers(SENTENCES, range(1, LAYERS + 1))
    assert hook_ids(backbone.model) == before
    template = PROMPT.with_placeholder(variant.place)[0]
    for row, sentence in enumerate(SENTENCES):
        ids = official_ids(backbone.tokenizer, template.replace(SENTENCE, PROMPT.prepare(sentence)))
        change = list(references(ids.index(SPARE_TOKEN), len(ids) - 1, closing).values())[case]
        expected = loop_states(backbone, ids, vector=variant.initial_vector(backbone), change=change)
        for layer in range(1, LAYERS + 1):
            assert_same(states[layer][row], expected[layer][-1], f"{variant}, state {layer}, {sentence!r}")


def test_variants_differ_from_each_other():
    backbone = tiny_backbone("llama")
    variants = [TokenPrepending(START, END), *list(references(0, 0, closing_tokens(backbone, PROMPT)))[1:]]
    found = [SentenceEncoder(backbone, PROMPT, variant).encode(SENTENCES) for variant in variants]
    for i in range(len(found)):
        for k in range(i):
            assert not np.allclose(found[i], found[k], rtol=1e-4, atol=1e-5), (variants[i], variants[k])
    assert len({str(variant.describe()) for variant in variants}) == len(variants)


@pytest.mark.parametrize("options, message", [
    ({"write": "first"}, "Unknown write 'first'"), ({"hide": "always"}, "Unknown hide"), ({"open": "all"}, "Unknown open"),
    ({"write": "older", "start": 0}, "start must be at least 1"), ({"start": 3, "end": 3}, "start=3, end=3"),
])
def test_bad_variants_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Variant(**options)
