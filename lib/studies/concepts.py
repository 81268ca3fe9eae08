"""Aligned tokens as a description of meaning (notebook 07), which arXiv 2406.17378 shows on examples: here counted, on
minimal pairs, pairs with gold scores, and transfer tasks' classes, asked for with instructions that fit and others."""

from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import yaml
from sklearn import linear_model, model_selection, pipeline, preprocessing

from lib.core.backbone import Backbone
from lib.core.encoder import SentenceEncoder
from lib.core.prompts import PROMPTS, Prompt
from lib.data.sources import EvaluationData
from lib.evaluation import alignment
from lib.evaluation.intervals import SPEARMAN, Statistic, area_under_roc, compare, mean_of
from lib.evaluation.sts import cosine

HIGHEST = 10  # how many of an embedding's tokens count as its highest
MEASURES = ("cosine", "overlap", "both")
_DATA = yaml.safe_load(Path(__file__).with_name("concepts.yaml").read_text(encoding="utf-8"))
QUESTIONS, WORDS, TASKS, EFFECTS = (_DATA[name] for name in ("questions", "words", "tasks", "effects"))
INSTRUCTIONS = {"no instruction": PROMPTS["prompteol"]}  # aspect asked for -> prompt
INSTRUCTIONS |= {aspect: Prompt(aspect, (template,)) for aspect, template in _DATA["instructions"].items()}
Encoders = dict[str, SentenceEncoder]


def token_overlap(decoder: Backbone, first: np.ndarray, second: np.ndarray, layer: int, k: int) -> np.ndarray:
    """Share of the k aligned tokens that both texts of a pair, embeddings (pairs, hidden), have: float64 (pairs,). Each
    token's mean logit over all these texts is subtracted first, or tokens that every text aligns to would decide."""
    texts, classes = np.concatenate([first, second]), alignment.counted(decoder)
    mean = alignment.mean_logits(alignment.logit_chunks(decoder, texts, layer, classes))
    ids, _ = alignment.top_tokens(decoder, texts, layer, k, classes, mean)
    return np.array([len(np.intersect1d(a, b)) / k for a, b in zip(*np.split(ids, 2))])


def pair_similarities(encoders: Encoders, decoder: Backbone, data: dict[str, EvaluationData], k: int) -> pd.DataFrame:
    """Similarities of pairs with gold scores, each data set (task) under each encoder (method): columns method, task,
    item, gold, cosine, overlap (of k aligned tokens) and both (the sum of their ranks)."""
    tables = []
    for (method, encoder), (task, pairs) in product(encoders.items(), data.items()):
        sides = np.split(encoder.encode([*pairs["sentence1"], *pairs["sentence2"]]), 2)
        table = pd.DataFrame({"method": method, "task": task, "item": range(len(pairs)), "gold": pairs["score"]})
        table = table.assign(cosine=cosine(*sides), overlap=token_overlap(decoder, *sides, encoder.exit_layer, k))
        tables.append(table.assign(both=table["cosine"].rank() + table["overlap"].rank()))
    return pd.concat(tables, ignore_index=True)


def similarity_scores(pairs: pd.DataFrame, draws: int = 1000, statistic: Statistic = SPEARMAN) -> pd.DataFrame:
    """The statistic of each of `MEASURES` that is a column: task, method, measure, and `compare`'s against cosine."""
    tables = []
    for method, of in pairs.groupby("method", sort=False):
        measures = {(method, name): of.assign(similarity=of[name]) for name in MEASURES if name in of}
        tables.append(compare(measures, statistic, (method, "cosine"), draws=draws))
    return _split_run(pd.concat(tables), ["method", "measure"], pairs["task"].unique())


def similarity_gaps(pairs: pd.DataFrame, draws: int = 1000) -> pd.DataFrame:
    """As `similarity_scores`, of the score on the first task (similarity) minus that on each other task (`gap to`)."""
    def gap(tables: Sequence[pd.DataFrame], weights: np.ndarray) -> np.ndarray:
        similar = tables[0]["similar"].to_numpy(bool)
        scores = [SPEARMAN.function([of[rows] for of in tables], weights[:, rows]) for rows in (similar, ~similar)]
        return scores[0] - scores[1]

    first, *others = pairs["task"].unique()
    whole = pd.concat([pairs[pairs["task"].isin([first, other])].assign(task=other) for other in others])
    whole["similar"], whole["item"] = pairs["task"] == first, whole.groupby(["method", "task"]).cumcount()
    return similarity_scores(whole, draws, Statistic(gap, within="similar")).rename(columns={"task": "gap to"})


def minimal_pairs(encoders: Encoders, decoder: Backbone, pairs: pd.DataFrame, k: int) -> pd.DataFrame:
    """Every minimal pair (`lib.data.texts.load_minimal_pairs`) under each encoder: the pairs' columns, method, cosine,
    overlap (of k tokens), and changed and shared: of the tokens that only one of the two sentences has, and of those
    that both have, the share among the `HIGHEST`; missing if there are none."""
    tables, texts = [], [*pairs["sentence1"], *pairs["sentence2"]]
    for method, encoder in encoders.items():
        embeddings, layer = encoder.encode(texts), encoder.exit_layer
        ranks = alignment.embedding_ranks(decoder, embeddings, layer, texts, deepest=HIGHEST)
        ranks = ranks.assign(pair=ranks["text"] % len(pairs), found=ranks["rank"] <= HIGHEST)
        ranks["both"] = ranks.duplicated(["pair", "token"], keep=False)
        shares = ranks.pivot_table("found", "pair", "both").reindex(range(len(pairs))).set_axis(pairs.index)
        sides = np.split(embeddings, 2)
        table = pairs.assign(method=method, cosine=cosine(*sides), overlap=token_overlap(decoder, *sides, layer, k))
        tables.append(table.assign(changed=shares.get(False, np.nan), shared=shares.get(True, np.nan)))
    return pd.concat(tables, ignore_index=True)


def separation(found: pd.DataFrame, draws: int = 1000) -> pd.DataFrame:
    """How often the pair of `minimal_pairs` that should be higher is: the area under the ROC curve, 0.5 is chance.
    Columns task (of `QUESTIONS`), method, measure, value, low, high."""
    asked = [found.assign(task=asks, positive=found["kind"].map(kinds)) for asks, kinds in QUESTIONS.items()]
    asked = pd.concat(asked).dropna(subset="positive").astype({"positive": bool})
    asked["item"] = asked.groupby(["method", "task"]).cumcount()
    return similarity_scores(asked, draws, area_under_roc)[["task", "method", "measure", "value", "low", "high"]]


def _split_run(table: pd.DataFrame, names: Sequence[str], tasks: Sequence[str]) -> pd.DataFrame:
    """A table of `compare` whose runs are tuples with a column for each of their parts, and its rows of these tasks."""
    parts = pd.DataFrame(table["run"].tolist(), table["task"], names)
    return pd.concat([parts, table.set_index("task").drop(columns="run")], axis=1).loc[tasks].reset_index()


def class_scores(decoder: Backbone, states: np.ndarray, layer: int, classes: Sequence[str], words=WORDS) -> np.ndarray:
    """The mean logit of each class's words for embeddings (texts, hidden): float32 (texts, classes). Words count with
    and without a leading space where they are one token. `ValueError` if a class has no such word."""
    logits, scores = alignment.decode_logits(decoder, states, layer), []
    for name in classes:
        texts = [space + word for word in words[name] for space in ("", " ")]
        forms = [decoder.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        ids = sorted({form[0] for form in forms if len(form) == 1})
        if not ids:
            raise ValueError(f"None of the words of {name!r} is one token of this vocabulary.")
        scores.append(logits[:, ids].mean(axis=1))
    return np.stack(scores, axis=1)


def instruction_answers(encoders: Encoders, data: dict[str, EvaluationData], words=WORDS, tasks=TASKS) -> pd.DataFrame:
    """Whether each text's class is found under the instruction that fits its task, under the others, and under none.
    `encoders` have the prompt of each aspect of `INSTRUCTIONS`; `data` are tasks of `TASKS` with texts and labels.
    Returns columns measure, instruction (fitting, wrong, no instruction), task, item, and found: 100 or 0, for wrong
    the mean over the instructions that do not fit. `zero-shot` takes the class with the highest of `class_scores`,
    `calibrated` after subtracting each class's mean over the texts, and `linear` is a logistic regression (L2, C = 1,
    standardised features) on the embeddings, trained on the four other fifths."""
    tables, folds = [], model_selection.KFold(5, shuffle=True, random_state=0)
    linear = pipeline.make_pipeline(preprocessing.StandardScaler(), linear_model.LogisticRegression(max_iter=1000))
    for (task, texts), (aspect, encoder) in product(data.items(), encoders.items()):
        states, labels = encoder.encode(texts["sentence1"]), np.array(texts["label"])
        scores = class_scores(encoder.backbone, states, encoder.exit_layer, tasks[task]["classes"], words)
        answers = {"zero-shot": scores.argmax(axis=1), "calibrated": (scores - scores.mean(axis=0)).argmax(axis=1),
                   "linear": model_selection.cross_val_predict(linear, states, labels, cv=folds)}
        table = pd.DataFrame({measure: 100.0 * (answer == labels) for measure, answer in answers.items()})
        kind = {"no instruction": aspect, tasks[task]["aspect"]: "fitting"}.get(aspect, "wrong")
        tables.append(table.assign(task=task, item=table.index, instruction=kind))
    long = pd.concat(tables).melt(["task", "item", "instruction"], var_name="measure", value_name="found")
    return long.groupby(["measure", "instruction", "task", "item"], sort=False)["found"].mean().reset_index()


def instruction_accuracy(answers: pd.DataFrame, draws: int = 1000) -> pd.DataFrame:
    """Accuracy x 100 of `instruction_answers` with a column variant (baseline, TP) added: task (the last is Avg),
    measure, instruction, variant, value, low, high."""
    names = ["measure", "instruction", "variant"]
    table = compare(dict(list(answers.groupby(names, sort=False))), mean_of("found"), draws=draws)
    return _split_run(table, names, table["task"].unique())


def instruction_effects(answers: pd.DataFrame, draws: int = 1000) -> pd.DataFrame:
    """The differences of accuracy x 100 of `EFFECTS`, paired by text; `answers` as of `instruction_accuracy`. Columns
    measure, effect, task (the last is Avg), difference, difference_low, difference_high."""
    runs, tables = dict(list(answers.groupby(["measure", "instruction", "variant"], sort=False))), {}
    for measure, (effect, (this, other)) in product(answers["measure"].unique(), EFFECTS.items()):
        pair = {"this": runs[measure, *this], "other": runs[measure, *other]}
        tables[measure, effect] = compare(pair, mean_of("found"), "other", draws=draws).query("run == 'this'")
    table = pd.concat(tables, names=["measure", "effect"]).reset_index(["measure", "effect"])
    return table.drop(columns=["run", "value", "low", "high"])
