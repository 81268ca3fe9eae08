"""Where Token Prepending should start, end and be read, and what its effect hangs on: notebook 03.

This module also chooses the settings of a model on STS-B dev: `python -m lib.studies.layers MODEL`.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import pandas as pd

from lib.core import processes
from lib.core.backbone import Backbone, load_backbone
from lib.core.encoder import SentenceEncoder
from lib.core.prompts import PLACEHOLDER, PROMPTS, Prompt, get_prompt
from lib.core.store import ROOT, EmbeddingStore
from lib.core.token_prepending import TokenPrepending
from lib.core.variants import Variant, closing_tokens
from lib.data.sources import EvaluationData, find_source
from lib.data.sts import dev_task, load_sts
from lib.evaluation.intervals import SPEARMAN, compare
from lib.evaluation.sts import spearman, sts_pairs
from lib.report.paper import read_paper
from lib.report.settings import save_settings, settings_file

# The search. First round, on few pairs: these spans. Second round: the best few of them and the baseline, on all pairs.
# No span starts late: there the score hangs on the placeholder's random vector (notebook 03), so the choice is luck.
SPANS = ((1, 2), (1, 3), (1, 4), (1, 6), (1, 8), (0, 1), (2, 3), (2, 6))
COARSE_SPANS = ((1, 2), (1, 8))
FIRST_PAIRS, FINALISTS, FEWEST_PAIRS = 60, 2, 3
TP_PROMPTS = tuple(name for name, prompt in PROMPTS.items() if prompt.pooling == "last")


def score_spans(
    backbone: Backbone, prompt: str, spans: Iterable[tuple[int, int]], data: EvaluationData, layers: Iterable[int],
    store: EmbeddingStore | None = None,
) -> pd.DataFrame:
    """Spearman x 100 of the baseline and of TP with these spans at each layer; one pass serves all layers.

    Args:
        spans: (start, end) of TP. data: STS pairs, from `load_sts`. layers: in Hugging Face's numbering.
        store: where embeddings are looked for and put; None: all are computed.

    Returns:
        Columns prompt, start, end, exit_layer, value, difference (from the baseline at the same layer), pairs; start
        and end are -1 for the baseline.
    """
    rows, layers, baseline = [], list(layers), {}
    for start, end in [(-1, -1), *spans]:
        method = TokenPrepending(start, end) if end > 0 else None
        pairs = sts_pairs(SentenceEncoder(backbone, prompt, method, store=store), {data.name: data}, layers)
        for layer, of in pairs.groupby("layer"):
            value = spearman(of["gold"], of["similarity"])
            difference = value - baseline.setdefault(layer, value)
            rows.append((prompt, start, end, layer, value, difference, len(of)))
    return pd.DataFrame(rows, columns=["prompt", "start", "end", "exit_layer", "value", "difference", "pairs"])


def scores_by_layer(pairs: pd.DataFrame, draws: int = 10_000) -> pd.DataFrame:
    """Spearman x 100 with its 95 % interval at each layer of a table from `sts_pairs`: exit_layer, value, low, high."""
    table = compare({layer: of for layer, of in pairs.groupby("layer")}, SPEARMAN, draws=draws)
    return table.rename(columns={"run": "exit_layer"})[["exit_layer", "value", "low", "high"]]


def search(backbone: Backbone, prompt: str, data: EvaluationData, pairs: int | None, store=None) -> pd.DataFrame:
    """The scores of the search's second round for one prompt, in the columns of `score_spans`.

    The first round tries all spans on the first `FIRST_PAIRS` pairs of `data`, the second the best of them on the first
    `pairs`. Exit layers are the last third. A prompt of many templates costs as many passes, so its search is coarser:
    two spans, on the first round's pairs only.
    """
    last, coarse = backbone.num_layers, len(get_prompt(prompt).templates) > 2
    layers, few = range(last - last // 3, last + 1), data.first(min(FIRST_PAIRS, pairs or FIRST_PAIRS))
    tried = [span for span in (COARSE_SPANS if coarse else SPANS) if span[1] <= last]
    first = score_spans(backbone, prompt, tried, few, layers, store).query("end > 0")
    finalists = first.groupby(["start", "end"])["value"].max().nlargest(FINALISTS).index
    return score_spans(backbone, prompt, finalists, few if coarse else data.first(pairs), layers, store)


def best(scores: pd.DataFrame) -> pd.Series:
    """The row with the highest score; among equals the one with the fewest blocks, then the shortest span.

    Raises `ValueError` where no row has a score.
    """
    found = scores.dropna(subset="value")
    if found.empty:
        raise ValueError("No setting has a score: the similarities or the human scores are all the same.")
    return found.sort_values(["value", "exit_layer", "end", "start"], ascending=[False, True, True, True]).iloc[0]


def choose_prompt(backbone: Backbone, prompt: str, data: EvaluationData, pairs: int | None, store=None) -> dict:
    """The best setting of a prompt, with the scores that it was chosen by and those of the baseline."""
    scores = search(backbone, prompt, data, pairs, store)
    chosen, baseline = best(scores[scores["end"] > 0]), best(scores[scores["end"] < 0])
    return {"start": int(chosen["start"]), "end": int(chosen["end"]), "exit": int(chosen["exit_layer"])} | {
        "dev_tp": round(float(chosen["value"]), 2),
        "dev_baseline_same_exit": round(float(chosen["value"] - chosen["difference"]), 2),
        "dev_baseline_best": round(float(baseline["value"]), 2),
        "dev_baseline_best_exit": int(baseline["exit_layer"]),
        "dev_pairs": int(chosen["pairs"]),
        "dtype": str(backbone.dtype).removeprefix("torch."),
    }


def choose(
    backbone: Backbone, prompts: Iterable[str], pairs: int | None = 500, store=None, profile: str = "default"
) -> Path:
    """Search every prompt on the first `pairs` STS-B dev pairs, and write its setting as soon as it is found.

    Settings found on sample data go to the folder of `profile` under `runs/`. Of several processes the main one writes,
    and the others wait for it. Returns the file. Raises `ValueError` for fewer than three pairs.
    """
    if pairs is not None and pairs < FEWEST_PAIRS:
        raise ValueError(f"A correlation, by which settings are chosen, needs {FEWEST_PAIRS} pairs; got {pairs}.")
    source, data = find_source(), load_sts(dev_task(), "dev")
    about = {
        "model": backbone.name,
        "revision": backbone.revision,
        "numbering": "start, end: 0-based blocks, end not included; exit: Hugging Face's state, last after final norm",
        "chosen_by": f"highest Spearman x 100 on dev_pairs pairs of {data.name} dev ({source.label}), the first of its "
        f"permutation; tried first on {FIRST_PAIRS} of them, the best {FINALISTS} spans again on all",
    }
    path = settings_file(backbone.name, source.is_sample, profile)
    for prompt in prompts:
        chosen = {prompt: choose_prompt(backbone, prompt, data, pairs, store)}
        path = processes.from_main(partial(save_settings, backbone.name, chosen, about, source.is_sample, profile))
        if processes.is_main():
            print(prompt, chosen[prompt], flush=True)
    return path


@dataclass(frozen=True)
class Row:
    """One row of the ablation table: what is changed, and the published row that it stands beside (its variant)."""

    family: str
    label: str
    prompt: Prompt
    method: TokenPrepending | None
    paper: str | None = None


def ablations(backbone: Backbone, prompt: Prompt, tp: TokenPrepending, seeds: Iterable[int]) -> list[Row]:
    """Everything that is changed about TP with the span of `tp` on a prompt, one thing at a time.

    The first row is TP itself and the second the baseline. Rows that a prompt's wording or the model's depth does not
    allow are left out. Source: arXiv 2412.11556, section 5 and appendix A.
    """
    depth, fields, template = backbone.num_layers, asdict(tp), prompt.templates[0]
    change, variant = partial(replace, tp), partial(Variant, **fields)
    closing = closing_tokens(backbone, prompt)
    rows = [
        Row("main", "TP", prompt, tp, ""),
        Row("main", "baseline", prompt, None),
        Row("place", "start of the prompt", prompt, change(place="start"), "place=start_of_prompt"),
        Row("place", "inside the quotes, before the text", prompt, change(place="in_quote"), "place=inside_quotes"),
        Row("place", "inside the quotes, after the text", prompt, change(place="after_text"), "place=after_text"),
        *(Row("initial vector", init, prompt, change(init=init), f"init={paper}")
          for init, paper in (("zeros", "zeros"), ("ones", "ones"), ("uniform", "uniform"), ("space", "space_token"))),
        *(Row("initial vector", f"normal, seed {n}", prompt, change(seed=n)) for n in seeds if n != tp.seed),
        *(Row("number of placeholders", str(n), prompt, change(count=n), f"count={n}") for n in (2, 3, 4)),
        Row("what is written", "nothing", prompt, variant(write="nothing")),
        Row("what is written", "mean after the placeholder", prompt, variant(write="mean")),
        Row("what is written", "state one block older", prompt, variant(write="older")) if tp.start else None,
        Row("what is written", "state of the same block", prompt, variant(write="same")),
        Row("hidden", "before the span", prompt, variant(hide="before"), "hide_first_layer=true") if tp.start else None,
        Row("hidden", "after the span", prompt, variant(hide="after")),
        *(Row("resumed", f"again from block {at}", prompt, variant(resume=at))
          for at in sorted({tp.end + 1, tp.end + 3, depth // 2, depth - 6}) if tp.end < at < depth),
    ]
    family = "attention both ways, no TP"
    for span in ("last_token", "sentence"):
        label, opened = span.replace("_", " "), variant(write="nothing", open=span, closing=closing)
        everywhere = replace(opened, start=0, end=depth)
        rows.append(Row(family, f"{label}, all blocks", prompt, everywhere, f"attention=bidirectional;span={span}"))
        rows.append(Row(family, f"{label}, blocks {tp.start} to {tp.end - 1}", prompt, opened))
    for family, label, name, words, other, paper in _REWORDINGS:
        if words in template:
            reworded = replace(prompt, name=f"{prompt.name}-{name}", templates=(template.replace(words, other),))
            rows.append(Row(family, label, reworded, tp, paper))
    return [row for row in rows if row]


# Family, label, ending of the prompt's name, words of the template, what stands in their place, published row. The
# roles are worded by us: those of the paper's prompts A to D are not known to us. Pretended CoT and KE have words
# before "this sentence". PromptEOL begins with "This sentence", where that place is the start of the prompt.
_REWORDINGS = (
    ("textual role", "sentence , in short _ :", "role",
     'sentence : "', f'sentence , in short {PLACEHOLDER} : "', None),
    ("textual role", "sentence , whose meaning is _ :", "role",
     'sentence : "', f'sentence , whose meaning is {PLACEHOLDER} : "', None),
    ("place", 'before "this sentence"', "moved",
     "this sentence", f"{PLACEHOLDER} this sentence", "place=before_this_sentence"),
)


def published_changes(prompt: str, rows: Sequence[Row]) -> list[float]:
    """What the paper reports for these changes: their score minus that of TP, NaN where it has no such row."""
    table = read_paper("a5_ablations").query("method == @prompt and metric == 'spearman_x100' and task == 'Avg'")
    table = table[table["tp"] | (table["variant"] != "")]
    scores = table.set_index("variant")["value"].to_dict()
    return [scores.get(row.paper, math.nan) - scores.get("", math.nan) for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description="Choose TP settings (start, end, exit) for a model on STS-B dev.")
    parser.add_argument("model")
    parser.add_argument("--prompts", nargs="+", default=TP_PROMPTS, choices=TP_PROMPTS)
    parser.add_argument("--pairs", type=int, default=500)
    given = parser.parse_args()
    path = choose(load_backbone(given.model), given.prompts, given.pairs, EmbeddingStore())
    print("written:", path.relative_to(ROOT))


if __name__ == "__main__":
    main()
