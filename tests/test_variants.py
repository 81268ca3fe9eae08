"""Every variant of TP against a loop over the blocks without hooks."""

import itertools

import numpy as np
import pytest
import torch
from tiny_models import LAYERS, SPARE_TOKEN, assert_same, loop_states, prompt_ids, tiny_backbone

from lib.core.encoder import SentenceEncoder
from lib.core.prompts import PROMPTS
from lib.core.variants import Variant, closing_tokens

SENTENCES = ["The plane takes off.", "Three children, who are cold, run across the snowy field.", "No."]
PROMPT = PROMPTS["prompteol"]
CLOSING = 6  # tokens after the sentence

# Name -> the variant, the blocks before which a plain loop writes, the blocks in which it uses a mask of its own.
VARIANTS = {
    "tp": (Variant(1, 3), (1, 2), ()),
    "nothing": (Variant(1, 3, write="nothing"), (), ()),
    **{write: (Variant(1, 3, write=write), (1, 2), ()) for write in ("mean", "older", "same")},
    "resumed": (Variant(0, 2, resume=3), (0, 1, 3), ()),
    "hidden before": (Variant(1, 3, hide="before"), (1, 2), (0,)),
    "hidden after": (Variant(1, 3, hide="after"), (1, 2), (3,)),
    "last token open": (Variant(1, 3, write="nothing", open="last_token"), (), (1, 2)),
    "sentence open": (Variant(1, 3, write="nothing", open="sentence", closing=CLOSING), (), (1, 2)),
}


def reference_change(name: str, place: int, last: int):
    """What `loop_states` does before each block for a variant whose placeholder is at `place`."""
    _, blocks_written, blocks_masked = VARIANTS[name]
    end = last - CLOSING

    def visible(q, k):
        if "open" in name:
            inside = place < k <= end and place < q <= end
            return k <= q or (inside if name == "sentence open" else k == last and q > place)
        return k <= q and (k != place or q == k)

    def written(i, h, block, args, kwargs, states):
        if name == "same":
            output = block(h, *args, **kwargs)
            return (output[0] if isinstance(output, tuple) else output)[:, -1]
        means = {"mean": h[:, place + 1 :].mean(dim=1), "older": states[i - 1][None, -1] if i else None}
        return means.get(name, h[:, -1])

    def change(i, h, block, args, kwargs, states):
        if i in blocks_written:
            h[:, place] = written(i, h, block, args, kwargs, states)
        if i in blocks_masked:
            tokens, hidden = range(last + 1), torch.finfo(torch.float32).min
            rows = [[0.0 if visible(q, k) else hidden for k in tokens] for q in tokens]
            kwargs["attention_mask"] = torch.tensor(rows)[None, None]
        return h, kwargs

    return change


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("share_prefix", [True, False])
def test_variants_equal_a_plain_loop(backbone, name, share_prefix):
    (variant, *_), layers = VARIANTS[name], range(1, LAYERS + 1)
    assert closing_tokens(backbone, PROMPT) == CLOSING
    states = SentenceEncoder(backbone, PROMPT, variant, share_prefix=share_prefix).encode_layers(SENTENCES, layers)
    for row, sentence in enumerate(SENTENCES):
        ids = prompt_ids(backbone, sentence, variant, PROMPT)
        change = reference_change(name, ids.index(SPARE_TOKEN), len(ids) - 1)
        expected = loop_states(backbone, ids, vector=variant.initial_vector(backbone), change=change)
        for layer in layers:
            assert_same(states[layer][row], expected[layer][-1], f"state {layer}, {sentence!r}")


def test_variants_differ_from_each_other():
    found = {v: SentenceEncoder(tiny_backbone(), PROMPT, v).encode(SENTENCES) for v, *_ in VARIANTS.values()}
    assert len({str(variant.describe()) for variant in found}) == len(VARIANTS)
    for a, b in itertools.combinations(found, 2):
        assert not np.allclose(found[a], found[b], rtol=1e-4, atol=1e-5), (a, b)


@pytest.mark.parametrize("options", [
    {"write": "first"}, {"hide": "always"}, {"open": "all"}, {"write": "older", "start": 0}], ids=str)
def test_bad_variants_are_refused(options):
    with pytest.raises(ValueError):
        Variant(**options)
