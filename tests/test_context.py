"""What a sentence's tokens know of what comes after them: against a plain loop, in float32 and in float16."""

import numpy as np
import pytest
from scipy.stats import spearmanr
from test_hardware import in_float16, with_large_activations
from tiny_models import LAYERS, SPARE_TOKEN, hook_ids, loop_states, official_ids, tiny_backbone

from lib.core.encoder import SentenceEncoder
from lib.core.prompts import PROMPTS, SENTENCE
from lib.core.token_prepending import TokenPrepending
from lib.core.variants import closing_tokens
from lib.evaluation.intervals import compare, mean_of
from lib.studies.context import attention_to_placeholder, by_sentence, context_dependency

pytestmark = pytest.mark.usefixtures("one_thread")

SENTENCES = ["The plane takes off.", "Three children, who are cold, run across the snowy field.", "No."]
PROMPT = PROMPTS["prompteol"]


@pytest.mark.parametrize("method", [None, TokenPrepending(1, 3)])
def test_context_dependency_is_a_rank_correlation_with_the_last_state(method):
    backbone, sentence = tiny_backbone(), "The plane takes off ."
    table = context_dependency(SentenceEncoder(backbone, "prompteol", method, exit_layer=3), [sentence])
    template = method.templates(PROMPT)[0] if method else PROMPT.templates[0]
    ids = official_ids(backbone.tokenizer, template.replace(SENTENCE, PROMPT.prepare(sentence)))
    writes = [(1, 3, [ids.index(SPARE_TOKEN)])] if method else []
    states = loop_states(backbone, ids, writes, TokenPrepending().initial_vector(backbone))[3].numpy()
    end = len(ids) - closing_tokens(backbone, PROMPT)
    expected = [100 * spearmanr(states[i], states[-1]).statistic for i in range(end - len(table), end)]
    np.testing.assert_allclose(table["correlation"], expected, atol=1e-3)
    text = backbone.tokenizer.decode(ids[end - len(table) : end])
    assert "plane takes off" in text and "sentence" not in text and "means" not in text


def test_attention_to_the_placeholder_is_that_of_the_model():
    backbone, encoder = tiny_backbone(), SentenceEncoder(tiny_backbone(), "prompteol", TokenPrepending(1, 3))
    attention_to_placeholder(encoder, SENTENCES[:1])  # the first time, Transformers puts hooks of its own on the model
    before, hooks = backbone.model.config._attn_implementation, hook_ids(backbone.model)
    table = attention_to_placeholder(encoder, SENTENCES)
    assert backbone.model.config._attn_implementation == before and hook_ids(backbone.model) == hooks
    assert set(table["block"]) == set(range(LAYERS)) and set(table["sentence"]) == {0, 1, 2}
    assert table["share"].between(0, 1).all() and table["share"].std() > 0
    # A block before the first write sees the placeholder's own vector, whatever is written later.
    later = attention_to_placeholder(encoder.changed(method=TokenPrepending(2, 3)), SENTENCES)
    same = np.isclose(table["share"], later["share"], rtol=1e-4)
    assert same[table["block"] == 0].all() and not same[table["block"] == 2].all()


def test_sums_beyond_float16_give_what_float32_gives():
    """A pass outside `safe_float16` overflows in this model: its attention and its states are not numbers."""
    large, method = with_large_activations("llama"), TokenPrepending(1, 3)
    exact, half = (SentenceEncoder(b, "prompteol", method, exit_layer=LAYERS) for b in (large, in_float16(large)))
    expected, actual = (context_dependency(encoder, SENTENCES)["correlation"] for encoder in (exact, half))
    np.testing.assert_allclose(actual, expected, atol=2)
    expected, actual = (attention_to_placeholder(encoder, SENTENCES)["share"] for encoder in (exact, half))
    np.testing.assert_allclose(actual, expected, atol=0.02)


def test_overflow_is_refused():
    backbone = tiny_backbone()
    encoder = SentenceEncoder(backbone, "prompteol", TokenPrepending(1, 3, init=(float("inf"),) * backbone.hidden_size))
    for study in (context_dependency, attention_to_placeholder):
        with pytest.raises(FloatingPointError):
            study(encoder, SENTENCES)


def test_means_over_sentences_can_be_compared():
    backbone = tiny_backbone()
    encoders = {"baseline": SentenceEncoder(backbone), "TP": SentenceEncoder(backbone, method=TokenPrepending(1, 3))}
    tables = {name: context_dependency(encoder, SENTENCES) for name, encoder in encoders.items()}
    runs = {name: by_sentence(table, "correlation", "context") for name, table in tables.items()}
    compared = compare(runs, mean_of("correlation"), "baseline", draws=100).set_index("run")
    means = {name: table.groupby("sentence")["correlation"].mean().mean() for name, table in tables.items()}
    assert compared.loc["TP", "difference"] == pytest.approx(means["TP"] - means["baseline"])
    by_block = by_sentence(attention_to_placeholder(encoders["TP"], SENTENCES), "share", "block")
    assert by_block["task"].tolist() == [str(block) for block in range(LAYERS) for _ in SENTENCES]
