"""Runs that share their blocks give what independent runs give, and the search for settings on top of them."""

import copy
import functools

import numpy as np
import pytest
import yaml
from tiny_models import FAMILIES, LAYERS, build_tokenizer, hook_ids, tiny_backbone

from lib.studies import settings
from lib.data.sts import cap_rows, find_source, load_sts
from lib.core.encoder import SentenceEncoder
from lib.core.backbone import Backbone
from lib.studies.sweep import MemoryStore, SweepEncoder, score_settings, shared_blocks
from lib.core.token_prepending import TokenPrepending

pytestmark = pytest.mark.usefixtures("one_thread")

SENTENCES = ["The plane takes off.", "It's the dog's bone; it isn't the cat's!", "No", "", "The plane takes off."]
STATES = range(1, LAYERS + 1)


def traces(backbone):
    """Hooks, and blocks whose `forward` is not their class's."""
    return hook_ids(backbone.model), ["forward" in vars(block) for block in backbone.layers]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.filterwarnings("ignore:.*cannot reuse a prompt's prefix")
def test_a_sweep_fills_the_store_with_what_independent_runs_compute(family, start):
    backbone, store, ends = tiny_backbone(family), MemoryStore(), [4, 2, 3, 2]
    before = traces(backbone)
    SweepEncoder(backbone, "ck", TokenPrepending(start, 2), ends).fill(SENTENCES, STATES, store)
    assert traces(backbone) == before
    assert len(store) == 2 * 3 * LAYERS  # templates x ends x states
    found = []
    for end in (2, 3, 4):
        tp = TokenPrepending(start, end)
        alone = SentenceEncoder(backbone, "ck", tp).encode_layers(SENTENCES, STATES)
        reader = SentenceEncoder(backbone, "ck", tp, store=store)
        reader._compute = None  # all of it must come from the store
        for layer, states in reader.encode_layers(SENTENCES, STATES).items():
            np.testing.assert_array_equal(states, alone[layer])
        found.append(alone[LAYERS])
    # The ends are really told apart at the last state.
    assert not np.allclose(found[0], found[1], rtol=1e-3) and not np.allclose(found[1], found[2], rtol=1e-3)


def test_what_is_stored_is_not_computed_again():
    store = MemoryStore()
    sweep = SweepEncoder(tiny_backbone(), "prompteol", TokenPrepending(1, 2), [2, 3])
    sweep.fill(SENTENCES, [LAYERS], store)
    sweep._compute = None
    sweep.fill(SENTENCES, [-1], store)


def test_an_error_leaves_no_trace_and_an_own_forward_comes_back():
    shared = tiny_backbone()
    backbone = Backbone.from_model(copy.deepcopy(shared.model), build_tokenizer(), name=shared.name)
    own = functools.partial(type(backbone.layers[0]).forward, backbone.layers[0])
    backbone.layers[0].forward = own
    before, calls = traces(backbone), []

    def fail_in_a_branch(_, __):
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("no memory left")

    handle = backbone.layers[-1].register_forward_pre_hook(fail_in_a_branch)
    with pytest.raises(RuntimeError, match="no memory left"):
        SweepEncoder(backbone, "none", TokenPrepending(1, 2), [2, 3], share_prefix=False).fill(["A cat."], [LAYERS], MemoryStore())
    handle.remove()
    assert len(calls) == 2 and traces(backbone) == before and backbone.layers[0].forward is own


def test_shared_blocks_are_those_that_run():
    settings_ = [(1, 2), (1, 3), (1, 4), (0, 3)]
    # From 1: the trunk runs 4 blocks, the branch at 2 two, the branch at 3 one. From 0: one run of 4.
    assert shared_blocks(settings_, LAYERS) == (4 + 2 + 1 + 4, 16)
    backbone, runs = tiny_backbone(), []
    # A block that is passed over does nothing, so none of its parts is called.
    counted = [block.mlp.register_forward_hook(lambda *_: runs.append(1)) for block in backbone.layers]
    sweep = SweepEncoder(backbone, "prompteol", TokenPrepending(1, 2), [2, 3, 4], share_prefix=False)
    sweep.fill(["A dog."], [LAYERS], MemoryStore())  # the first time, one block runs to see what it returns
    runs.clear()
    sweep.fill(["A cat."], [LAYERS], MemoryStore())
    for handle in counted:
        handle.remove()
    assert len(runs) == shared_blocks([(1, 2), (1, 3), (1, 4)], LAYERS)[0]


@pytest.mark.filterwarnings("ignore::lib.data.sts.SampleDataWarning")
def test_the_search_writes_settings_that_load_and_keeps_those_of_other_prompts(monkeypatch, tmp_path):
    monkeypatch.delenv("TP_DATA_DIR", raising=False)
    monkeypatch.setenv("TP_HUB_UNREACHABLE", "1")
    monkeypatch.setattr(settings, "FOLDER", tmp_path)
    monkeypatch.setattr(settings, "FIRST_PAIRS", 12)
    monkeypatch.setattr(settings, "STORE", MemoryStore())
    backbone = tiny_backbone()
    source = find_source()
    path = settings.choose(backbone, ["prompteol"], pairs=16)
    settings.choose(backbone, ["metaeol"], pairs=16)
    chosen = settings.load_settings(backbone.name)
    assert list(chosen) == ["prompteol", "metaeol"]
    written = yaml.safe_load(path.read_text())
    assert "sample" in written["chosen_by"] and written["prompts"]["prompteol"]["dev_pairs"] == 16
    assert written["prompts"]["metaeol"]["dev_pairs"] == 12  # eight templates: the coarse search
    # The winner has the best score of the second round, and the recorded scores are those of the encoder itself.
    data = cap_rows(load_sts("sample", "dev", source), 16, seed=0)
    scores = settings.search(backbone, "prompteol", data)
    best = scores[scores["end"] > 0].nlargest(1, "score").iloc[0]
    line = written["prompts"]["prompteol"]
    assert line["dev_tp"] == round(best["score"], 2)
    alone = score_settings(backbone, "prompteol", [chosen["prompteol"].tp, None], data, [line["exit"]])
    assert alone["score"].round(2).tolist() == [line["dev_tp"], line["dev_vanilla_same_exit"]]
