"""Notebook 03: where Token Prepending should start, end and be read, what its effect hangs on, and what a sentence's
tokens know of what comes after them. `python -m lib.studies.layers MODEL` chooses a model's settings on STS-B dev."""

import argparse
from collections import namedtuple
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from math import nan
from pathlib import Path
from statistics import mean

import pandas as pd
import torch
import yaml

from lib.core import processes
from lib.core.backbone import Backbone, load_backbone
from lib.core.contrastive import ContrastivePrompting
from lib.core.encoder import SentenceEncoder
from lib.core.forward import check_finite, read_states, safe_float16
from lib.core.prompts import PROMPTS, Prompt, get_prompt
from lib.core.store import ROOT, EmbeddingStore
from lib.core.token_prepending import TokenPrepending
from lib.core.variants import Variant, closing_tokens
from lib.data.sources import EvaluationData, find_source
from lib.data.sts import dev_task, load_sts
from lib.evaluation.sts import spearman, sts_pairs
from lib.report.paper import read_paper
from lib.report.settings import save_settings, settings_file

SEARCH = yaml.safe_load(Path(__file__).with_name("search.yaml").read_text(encoding="utf-8"))
SEEDS, FIRST_PAIRS, FINALISTS, CP_PAIRS = (SEARCH[key] for key in ("seeds", "first_pairs", "finalists", "cp_pairs"))
TP_PROMPTS = tuple(name for name, prompt in PROMPTS.items() if prompt.pooling == "last")


def score_spans(backbone: Backbone, prompt: str, spans: Iterable[tuple], data: EvaluationData, layers: Sequence[int],
                store=None, seeds: Sequence[int] = SEEDS[:1]) -> pd.DataFrame:
    """Spearman x 100 of the baseline and of TP with these spans (start, end) on STS pairs, at layers in Hugging Face's
    numbering, all from one pass; from start 2 on the mean over `seeds`. Columns prompt, start, end (both -1 for the
    baseline), exit_layer, value, difference (from the baseline at the same layer) and pairs (how many)."""
    rows, baseline = [], {}
    for start, end in [(-1, -1), *spans]:
        drawn = seeds if start > 1 else seeds[:1]
        methods = [TokenPrepending(start, end, seed=seed) for seed in drawn] if end > 0 else [None]
        for layer, value in _scores(backbone, prompt, methods, data, layers, store).items():
            rows.append((prompt, start, end, layer, value, value - baseline.setdefault(layer, value), len(data)))
    return pd.DataFrame(rows, columns=["prompt", "start", "end", "exit_layer", "value", "difference", "pairs"])


def _scores(backbone: Backbone, prompt: str, methods: Sequence, data, layers: Sequence[int], store) -> dict[int, float]:
    """Layer -> Spearman x 100 on STS pairs, mean over the methods, which differ by their seed."""
    encoders = (SentenceEncoder(backbone, prompt, method, store=store) for method in methods)
    tables = (sts_pairs(encoder, {data.name: data}, layers).groupby("layer") for encoder in encoders)
    found = [{layer: spearman(of["gold"], of["similarity"]) for layer, of in table} for table in tables]
    return {layer: mean(scores[layer] for scores in found) for layer in found[0]}


def search(backbone: Backbone, prompt: str, data: EvaluationData, pairs: int | None, store=None) -> pd.DataFrame:
    """`score_spans` of the search's second round: on the first `pairs` of `data`, at the last third of the layers. A
    prompt of many templates costs as many passes: two spans are tried, on the first round's pairs only."""
    last, coarse = backbone.num_layers, len(get_prompt(prompt).templates) > 2
    layers, few = range(last - last // 3, last + 1), data.first(min(FIRST_PAIRS, pairs or FIRST_PAIRS))
    tried = [span for span in SEARCH["coarse_spans" if coarse else "spans"] if span[1] <= last]
    first = score_spans(backbone, prompt, tried, few, layers, store, SEEDS).query("end > 0")
    finalists = first.groupby(["start", "end"])["value"].max().nlargest(FINALISTS).index
    return score_spans(backbone, prompt, finalists, few if coarse else data.first(pairs), layers, store, SEEDS)


def best(scores: pd.DataFrame) -> pd.Series:
    """The row with the highest score, of equals the one with the fewest blocks. `ValueError` if no row has a score."""
    if (found := scores.dropna(subset="value")).empty:
        raise ValueError("No setting has a score: the similarities or the human scores are all the same.")
    return found.sort_values(["value", "exit_layer", "end", "start"], ascending=[False, True, True, True]).iloc[0]


def choose_prompt(backbone: Backbone, prompt: str, data: EvaluationData, pairs: int | None, store=None) -> dict:
    """The best setting of a prompt, with the scores that it was chosen by and those of the baseline, and of a prompt
    of one or two templates also that of Contrastive Prompting at the same layer, on `CP_PAIRS` pairs."""
    scores = search(backbone, prompt, data, pairs, store)
    chosen, baseline = (best(scores[rows]).to_dict() for rows in (scores["end"] > 0, scores["end"] < 0))
    found = {
        "start": chosen["start"], "end": chosen["end"], "exit": chosen["exit_layer"],
        "dev_tp": round(chosen["value"], 2), "dev_baseline_same_exit": round(chosen["value"] - chosen["difference"], 2),
        "dev_baseline_best": round(baseline["value"], 2), "dev_baseline_best_exit": baseline["exit_layer"],
        "dev_pairs": chosen["pairs"], "dtype": str(backbone.dtype).removeprefix("torch.")}
    grid = [of for values in SEARCH["cp_grid"] for of in product(*values) if of[0] < backbone.num_layers]
    if len(get_prompt(prompt).templates) > 2 or not grid:
        return found
    few, layer = data.first(min(CP_PAIRS, pairs or CP_PAIRS)), chosen["exit_layer"]
    rows = [(*of, _scores(backbone, prompt, [ContrastivePrompting(*of)], few, [layer], store)[layer]) for of in grid]
    tried = pd.DataFrame(rows, columns=["block", "strength", "rule", "value"])
    [cp] = tried.nlargest(1, "value").to_dict("records")
    return found | {"dev_cp": round(cp.pop("value"), 2), "cp": cp}


def choose(backbone: Backbone, prompts: Iterable[str], pairs: int | None = 500, store=None, profile="default") -> Path:
    """Search every prompt on the first `pairs` STS-B dev pairs, write its setting as soon as it is found (of several
    processes the main one writes, and the others wait), and return the file. `ValueError` for fewer than 3 pairs."""
    if pairs is not None and pairs < 3:
        raise ValueError(f"A correlation, by which settings are chosen, needs 3 pairs; got {pairs}.")
    source, data = find_source(), load_sts(dev_task(), "dev")
    about = {"model": backbone.name, "revision": backbone.revision, "numbering": SEARCH["numbering"]}
    about["chosen_by"] = SEARCH["chosen_by"].format(data=data.name, source=source.label, **SEARCH)
    path = settings_file(backbone.name, source.is_sample, profile)
    for prompt in prompts:
        chosen = {prompt: choose_prompt(backbone, prompt, data, pairs, store)}
        path = processes.from_main(partial(save_settings, backbone.name, chosen, about, source.is_sample, profile))
        if processes.is_main():
            print(prompt, chosen[prompt], flush=True)
    return path


# A row of the ablation table. paper: the published score minus that of TP, NaN where the paper has no such row.
Row = namedtuple("Row", "family label prompt method paper")


def ablations(backbone: Backbone, prompt: Prompt, tp: TokenPrepending, seeds: Iterable[int]) -> list[Row]:
    """TP itself, the baseline, and TP with one thing changed, as `ablations.yaml` has it, with the span of `tp`. Rows
    that the prompt's wording or the model's depth forbids are left out (arXiv 2412.11556, section 5 and appendix A)."""
    name, template, depth, fields = prompt.name, prompt.templates[0], backbone.num_layers, asdict(tp)
    asked = "method == @name and metric == 'spearman_x100' and task == 'Avg' and (tp or variant != '')"
    published = read_paper("a5_ablations").query(asked).set_index("variant")["value"].to_dict()
    families = yaml.safe_load(Path(__file__).with_name("ablations.yaml").read_text(encoding="utf-8"))
    families["initial vector"] |= {f"normal, seed {n}": {"seed": n} for n in seeds if n != tp.seed}
    again = sorted({tp.end + 1, tp.end + 3, depth // 2, depth - 6})
    families["resumed"] |= {f"again from block {at}": {"resume": at} for at in again if tp.end < at < depth}
    inside = f"blocks {tp.start} to {tp.end - 1}" if tp.end - tp.start > 1 else f"block {tp.start} alone"
    for span, label in (("last_token", "last token"), ("sentence", "sentence")):
        opened = {"write": "nothing", "open": span, "closing": closing_tokens(backbone, prompt)}
        everywhere = opened | {"start": 0, "end": depth, "paper": f"attention=bidirectional;span={span}"}
        families["attention both ways, no TP"] |= {
            f"{label}, all blocks": everywhere, f"{label}, {inside}": opened}
    if tp.start == 0:  # no block stands before the span
        del families["what is written"]["state one block older"], families["hidden"]["before the span"]
    rows = [Row("main", "TP", prompt, tp, ""), Row("main", "baseline", prompt, None, None)]
    for family, label, change in [(family, *row) for family, changes in families.items() for row in changes.items()]:
        paper, (words, others) = change.pop("paper", None), change.pop("words", ("", ""))
        method = replace(tp, **change) if change.keys() <= fields.keys() else Variant(**fields | change)
        if words in template:
            reworded = replace(prompt, name=f"{name}-reworded", templates=(template.replace(words, others),))
            rows.append(Row(family, label, reworded if words else prompt, method, paper))
    return [row._replace(paper=published.get(row.paper, nan) - published.get("", nan)) for row in rows]


def context_dependency(encoder: SentenceEncoder, sentences: Sequence[str]) -> pd.DataFrame:
    """Spearman x 100, over the hidden dimensions, of each sentence token's state with the last token's at the exit
    layer; arXiv 2412.11556, section 5.9, reads a rise under TP as a stronger dependency on later context. Columns
    sentence and token (their places) and correlation. `FloatingPointError` if a state is not finite."""
    backbone, layer, rows = encoder.backbone, encoder.exit_layer, []
    for number, (batch, span, attached) in enumerate(_one_by_one(encoder, sentences)):
        with attached:
            states = read_states(backbone, batch.ids, [layer])[layer][0].float().cpu().numpy()
        check_finite(states, backbone.name, backbone.dtype)
        rows += [(number, token, spearman(states[-1], state)) for token, state in enumerate(states[span])]
    return pd.DataFrame(rows, columns=["sentence", "token", "correlation"])


def attention_to_placeholder(encoder: SentenceEncoder, sentences: Sequence[str]) -> pd.DataFrame:
    """The share of its attention that each sentence token gives to the placeholder in each block, mean over the heads.
    Needs an encoder whose method has one placeholder. Returns columns sentence, block (0-based), token (its place in
    the sentence), text and share (0 to 1). `FloatingPointError` if a share is not finite: the pass overflowed."""
    backbone, rows = encoder.backbone, []
    for number, (batch, span, attached) in enumerate(_one_by_one(encoder, sentences)):
        safe = safe_float16(backbone.layers[0], backbone.device, backbone.dtype)
        with torch.inference_mode(), attached, safe, ExitStack() as afterwards:
            afterwards.callback(backbone.model.set_attn_implementation, backbone.model.config._attn_implementation)
            backbone.model.set_attn_implementation("eager")  # the implementation that hands its weights out
            attentions = backbone.base(input_ids=batch.ids, use_cache=False, output_attentions=True).attentions
        texts = [backbone.tokenizer.decode(token).strip() for token in batch.ids[0, span]]
        for block, weights in enumerate(attentions):
            shares = weights[0, :, span, int(batch.placeholders)].float().mean(dim=0)
            check_finite(shares, backbone.name, backbone.dtype)
            rows += [(number, block, *row) for row in zip(range(len(texts)), texts, shares.tolist(), strict=True)]
    return pd.DataFrame(rows, columns=["sentence", "block", "token", "text", "share"])


def by_sentence(table: pd.DataFrame, column: str, task: str) -> pd.DataFrame:
    """Mean of a column over each sentence, as `compare` takes it: task, item, the column. `task` is a column, whose
    every value is then a task (`"block"`), or any other name for all rows together."""
    table = table.assign(task=table.get(task, task), item=table["sentence"])
    return table.groupby(["task", "item"], as_index=False)[column].mean().astype({"task": str})


def _one_by_one(encoder: SentenceEncoder, sentences: Sequence[str]):
    """Of each sentence in the first template: a batch of one row, the slice of its tokens, the method to be entered."""
    encoder = encoder.changed(share_prefix=False, pooling="mean")  # a mean needs to know where the sentence begins
    for sentence in sentences:
        batch = encoder.batch(encoder.passes([sentence])[0].rows, [0])
        span = slice(int(batch.first), int(batch.last) + 1 - closing_tokens(encoder.backbone, encoder.prompt))
        yield batch, span, encoder.method.attach(encoder.backbone, batch) if encoder.method else nullcontext()


def main() -> None:
    parser = argparse.ArgumentParser(description="Choose TP, the exit layer and CP for a model on STS-B dev.")
    parser.add_argument("model")
    parser.add_argument("--prompts", nargs="+", default=TP_PROMPTS, choices=TP_PROMPTS)
    parser.add_argument("--pairs", type=int, default=500)
    given = parser.parse_args()
    path = choose(load_backbone(given.model), given.prompts, given.pairs, EmbeddingStore())
    print("written:", path.relative_to(ROOT))


if __name__ == "__main__":
    main()
