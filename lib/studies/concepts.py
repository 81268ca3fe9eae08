"""Aligned tokens as a description of meaning (notebook 07): of similarity and relatedness, and of an asked aspect.

Both claims are from arXiv 2406.17378, which shows them on examples. Here they are counted: on minimal pairs, on pairs
with gold scores, and on the classes of transfer tasks, which are asked for with instructions that fit and with others.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import yaml
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import KFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from lib.core.backbone import Backbone
from lib.core.encoder import SentenceEncoder
from lib.core.prompts import PROMPTS, Prompt
from lib.data.sources import EvaluationData
from lib.evaluation import alignment
from lib.evaluation.intervals import SPEARMAN, Statistic, area_under_roc, compare, mean_of
from lib.evaluation.sts import cosine
from lib.evaluation.vocabulary import DEFAULT_RULE, token_classes

# How the sentences of a minimal pair relate. All but the last are about the same thing; only the first mean the same.
KINDS = ("paraphrase", "negation", "antonym", "role swap", "topic shift")
# Question -> the kinds of pairs that should be above, and those that should be below.
QUESTIONS = {
    "similar: paraphrase above negation, antonym, role swap": (KINDS[:1], KINDS[1:4]),
    "related: all of them above topic shift": (KINDS[:4], KINDS[4:]),
}
# How many of an embedding's tokens count as its highest.
HIGHEST = 10

_DATA = yaml.safe_load(Path(__file__).with_name("instructions.yaml").read_text(encoding="utf-8"))
# Class -> words that stand for it; task -> aspect and classes; aspect asked for -> prompt. PromptEOL asks for none.
WORDS, TASKS, INSTRUCTIONS = _DATA["words"], _DATA["tasks"], {"no instruction": PROMPTS["prompteol"]}
for _aspect, _ending in _DATA["endings"].items():
    INSTRUCTIONS[_aspect] = Prompt(_aspect, (_DATA["template"].replace("ENDING", _ending),))
# Name -> two (instruction, variant), of which the second is subtracted from the first.
EFFECTS = {
    "fitting - no instruction": (("fitting", "baseline"), ("no instruction", "baseline")),
    "fitting - wrong": (("fitting", "baseline"), ("wrong", "baseline")),
    "TP, with the fitting instruction": (("fitting", "TP"), ("fitting", "baseline")),
    "TP, with no instruction": (("no instruction", "TP"), ("no instruction", "baseline")),
}


def token_overlap(decoder: Backbone, first: np.ndarray, second: np.ndarray, layer: int, k: int) -> np.ndarray:
    """Share of the k aligned tokens that the two texts of a pair have in common, float64 (pairs,), 0 to 1.

    `first` and `second` are embeddings (pairs, hidden). Each token's mean logit over all these texts is subtracted
    before its highest tokens are taken; or the tokens that every text aligns to decide.
    """
    classes = token_classes(decoder.tokenizer, len(alignment.output_matrix(decoder)), DEFAULT_RULE)
    texts = np.concatenate([first, second])
    mean = alignment.mean_logits(alignment.logit_chunks(decoder, texts, layer, classes))
    ids, _ = alignment.top_tokens(decoder, texts, layer, k, classes, mean)
    return np.array([len(np.intersect1d(a, b)) / k for a, b in zip(*np.split(ids, 2))])


def pair_similarities(
    encoders: dict[str, SentenceEncoder], decoder: Backbone, data: dict[str, EvaluationData], k: int
) -> pd.DataFrame:
    """Similarities of pairs with gold scores, each data set under each encoder.

    Returns columns method, task, item, gold, cosine, overlap (of k aligned tokens) and both (the sum of their ranks).
    """
    tables = []
    for (method, encoder), (task, pairs) in product(encoders.items(), data.items()):
        sides = np.split(encoder.encode([*pairs["sentence1"], *pairs["sentence2"]]), 2)
        table = pd.DataFrame({"method": method, "task": task, "item": range(len(pairs)), "gold": pairs["score"]})
        table = table.assign(cosine=cosine(*sides), overlap=token_overlap(decoder, *sides, encoder.exit_layer, k))
        tables.append(table.assign(both=table["cosine"].rank() + table["overlap"].rank()))
    return pd.concat(tables, ignore_index=True)


def similarity_scores(pairs: pd.DataFrame, draws: int = 1000, statistic: Statistic = SPEARMAN) -> pd.DataFrame:
    """Spearman x 100 of each measure of `pair_similarities` with the gold scores, beside that of cosine.

    Returns columns task, method, measure and those of `lib.evaluation.intervals.compare` against cosine.
    """
    tables = []
    for method, of in pairs.groupby("method", sort=False):
        measures = {(method, name): of.assign(similarity=of[name]) for name in ("cosine", "overlap", "both")}
        tables.append(compare(measures, statistic, (method, "cosine"), draws=draws))
    return _split_run(pd.concat(tables), ["method", "measure"], pairs["task"].unique())


def similarity_gaps(pairs: pd.DataFrame, draws: int = 1000) -> pd.DataFrame:
    """As `similarity_scores`, of the score on the first task (similarity) minus that on each other task (`gap to`)."""
    first, *others = pairs["task"].unique()
    whole = pd.concat([pairs[pairs["task"].isin([first, other])].assign(task=other) for other in others])
    whole["similar"] = pairs["task"] == first
    whole["item"] = whole.groupby(["method", "task"]).cumcount()
    return similarity_scores(whole, draws, Statistic(_gap, within="similar")).rename(columns={"task": "gap to"})


def _gap(tables: Sequence[pd.DataFrame], weights: np.ndarray) -> np.ndarray:
    """The statistic of `similarity_gaps`: Spearman x 100 of the rows marked as similar minus that of the others."""
    similar = tables[0]["similar"].to_numpy(bool)
    scores = [SPEARMAN([table[rows] for table in tables], weights[:, rows]) for rows in (similar, ~similar)]
    return scores[0] - scores[1]


def minimal_pairs(
    encoders: dict[str, SentenceEncoder], decoder: Backbone, pairs: pd.DataFrame, k: int
) -> pd.DataFrame:
    """Every minimal pair (`lib.data.texts.load_minimal_pairs`) under each encoder.

    Returns:
        The pairs' columns, and method, cosine, overlap (of k tokens); changed: of the tokens that only one of the two
        sentences has, the share among its `HIGHEST`; shared: the same of the tokens that both have. A share of no
        tokens (as of changed ones after a role swap) is missing.
    """
    tables, texts = [], [*pairs["sentence1"], *pairs["sentence2"]]
    for method, encoder in encoders.items():
        embeddings, layer = encoder.encode(texts), encoder.exit_layer
        ranks = alignment.embedding_ranks(decoder, embeddings, layer, texts, deepest=HIGHEST)
        ranks = ranks.assign(pair=ranks["text"] % len(pairs), found=ranks["rank"] <= HIGHEST)
        ranks["both"] = ranks.duplicated(["pair", "token"], keep=False)
        share = ranks.pivot_table("found", "pair", "both").reindex(range(len(pairs)), columns=[False, True])
        changed, shared = share.to_numpy(float).T
        sides = np.split(embeddings, 2)
        table = pairs.assign(method=method, cosine=cosine(*sides), overlap=token_overlap(decoder, *sides, layer, k))
        tables.append(table.assign(changed=changed, shared=shared))
    return pd.concat(tables, ignore_index=True)


def separation(found: pd.DataFrame, draws: int = 1000) -> pd.DataFrame:
    """How often the pair of `minimal_pairs` that should be higher is: the area under the ROC curve, 0.5 is chance.

    Returns columns task (of `QUESTIONS`), method, measure, value, low, high.
    """
    asked = pd.concat([
        found[found["kind"].isin([*above, *below])].assign(task=question, positive=found["kind"].isin(above))
        for question, (above, below) in QUESTIONS.items()
    ])
    asked["item"] = asked.groupby(["method", "task"]).cumcount()
    runs = {(method, measure): of.assign(similarity=of[measure])
            for method, of in asked.groupby("method", sort=False) for measure in ("cosine", "overlap")}
    return _split_run(compare(runs, area_under_roc, draws=draws), ["method", "measure"], list(QUESTIONS))


def _split_run(table: pd.DataFrame, names: Sequence[str], tasks: Sequence[str]) -> pd.DataFrame:
    """A table of `compare` whose runs are tuples with a column for each of their parts, and its rows of these tasks."""
    parts = pd.DataFrame(table["run"].tolist(), table.index, names)
    table = pd.concat([table[["task"]], parts, table.drop(columns=["run", "task"])], axis=1)
    return pd.concat([table[table["task"] == task] for task in tasks], ignore_index=True)


def class_scores(
    decoder: Backbone, embeddings: np.ndarray, layer: int, classes: Sequence[str], words: dict[str, list[str]] = WORDS
) -> np.ndarray:
    """The mean logit of each class's words for embeddings (texts, hidden): float32 (texts, classes).

    Words count with and without a leading space, and only where they are one token. Raises `ValueError` if a class has
    no such word.
    """
    logits, scores = alignment.decode_logits(decoder, embeddings, layer), []
    for name in classes:
        forms = [decoder.tokenizer(space + word, add_special_tokens=False)["input_ids"]
                 for word, space in product(words[name], ("", " "))]
        ids = sorted({form[0] for form in forms if len(form) == 1})
        if not ids:
            raise ValueError(f"None of the words of {name!r} is one token of this vocabulary.")
        scores.append(logits[:, ids].mean(axis=1))
    return np.stack(scores, axis=1)


def instruction_answers(
    encoders: dict[str, SentenceEncoder], data: dict[str, EvaluationData], words: dict[str, list[str]] = WORDS,
    tasks: dict[str, dict] = TASKS,
) -> pd.DataFrame:
    """Whether each text's class is found under the instruction that fits its task, under the others, and under none.

    `zero-shot` takes the class with the highest of `class_scores`. `calibrated` subtracts each class's mean score over
    the texts before: it uses no label, but it does use that other texts are there. `linear` is a logistic regression
    (L2, C = 1, standardised features) on the embeddings, trained on the four other fifths.

    Args:
        encoders: aspect of `INSTRUCTIONS` -> encoder with its prompt. data: task of `TASKS` -> its texts and labels.

    Returns:
        Columns measure, instruction (fitting, wrong, no instruction), task, item, and found: 100 or 0, for wrong the
        mean over the instructions that do not fit.
    """
    tables, folds = [], KFold(5, shuffle=True, random_state=0)
    for (task, texts), (aspect, encoder) in product(data.items(), encoders.items()):
        states, labels = encoder.encode(texts["sentence1"]), np.array(texts["label"])
        scores = class_scores(encoder.backbone, states, encoder.exit_layer, tasks[task]["classes"], words)
        linear = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        answers = {"zero-shot": scores.argmax(axis=1), "calibrated": (scores - scores.mean(axis=0)).argmax(axis=1),
                   "linear": cross_val_predict(linear, states, labels, cv=folds)}
        table = pd.DataFrame({measure: 100.0 * (answer == labels) for measure, answer in answers.items()})
        kind = {"no instruction": aspect, tasks[task]["aspect"]: "fitting"}.get(aspect, "wrong")
        tables.append(table.assign(task=task, item=range(len(labels)), instruction=kind))
    long = pd.concat(tables).melt(["task", "item", "instruction"], var_name="measure", value_name="found")
    return long.groupby(["measure", "instruction", "task", "item"], sort=False)["found"].mean().reset_index()


def instruction_accuracy(answers: pd.DataFrame, draws: int = 1000) -> pd.DataFrame:
    """Accuracy x 100 with its interval; the last task, Avg, is the tasks' mean.

    Args:
        answers: from `instruction_answers`, with a column variant: baseline or TP.

    Returns columns task, measure, instruction, variant, value, low, high.
    """
    names = ["measure", "instruction", "variant"]
    table = compare(dict(list(answers.groupby(names, sort=False))), mean_of("found"), draws=draws)
    return _split_run(table, names, table["task"].unique())


def instruction_effects(answers: pd.DataFrame, draws: int = 1000) -> pd.DataFrame:
    """The differences of accuracy x 100 named in `EFFECTS`, paired by text; `answers` as of `instruction_accuracy`.

    Returns columns measure, effect, task (the last is Avg), difference, difference_low, difference_high.
    """
    tables = []
    for measure, of in answers.groupby("measure", sort=False):
        runs = dict(list(of.groupby(["instruction", "variant"], sort=False)))
        for effect, (this, other) in EFFECTS.items():
            table = compare({key: runs[key] for key in (other, this)}, mean_of("found"), other, draws=draws)
            tables.append(table[table["run"] == this].assign(measure=measure, effect=effect))
    return pd.concat(tables)[["measure", "effect", "task", "difference", "difference_low", "difference_high"]]
