"""Instructions: the same text asked for different aspects, and what its aligned tokens then say about the asked one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import pandas as pd
from datasets import Dataset
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import KFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from lib.evaluation.alignment import decode_logits
from lib.data.sts import provenance
from lib.core.encoder import SentenceEncoder
from lib.core.backbone import Backbone
from lib.core.prompts import PROMPTS, Prompt
from lib.report.results import Result, run_or_load


def _instruct(name: str, ending: str) -> Prompt:
    return Prompt(name, (f'This sentence : "{{sentence}}" {ending}:"',), source="own wording")


# Aspect asked for -> its prompt; PromptEOL asks for none.
INSTRUCTIONS = {
    "none": PROMPTS["prompteol"],
    "topic": _instruct("topic", "is about this topic , in one word"),
    "sentiment": _instruct("sentiment", "expresses this sentiment , in one word"),
    "question type": _instruct("question_type", "asks for this kind of thing , in one word"),
    "subjectivity": _instruct("subjectivity", "tells either a fact or an opinion , in one word"),
}

# Class -> words that stand for it. Fixed before anything was measured.
LABEL_WORDS = {
    "positive": ("positive", "good", "great", "happy", "satisfied", "excellent"),
    "negative": ("negative", "bad", "terrible", "sad", "disappointed", "poor"),
    "fact": ("fact", "objective", "factual", "story", "event", "information"),
    "opinion": ("opinion", "subjective", "personal", "review", "judgment", "feeling"),
    "abbreviation": ("abbreviation", "acronym", "letters"),
    "description": ("definition", "description", "reason", "explanation", "meaning", "cause"),
    "entity": ("thing", "object", "animal", "product", "food", "color"),
    "human": ("person", "name", "people", "man", "woman", "who"),
    "location": ("place", "location", "country", "city", "state", "where"),
    "number": ("number", "date", "year", "amount", "time", "distance"),
}

_SENTIMENT = ("sentiment", ("negative", "positive"))
_QUESTIONS = ("question type", ("abbreviation", "description", "entity", "human", "location", "number"))

# Task -> the aspect that it asks for, and its classes in the order of their labels. The last three are the sample's.
TASKS = {
    "CR": _SENTIMENT, "SST2": _SENTIMENT, "SUBJ": ("subjectivity", ("opinion", "fact")), "TREC": _QUESTIONS,
    "sentiment": _SENTIMENT, "subjectivity": ("subjectivity", ("fact", "opinion")), "question_type": _QUESTIONS,
}


def label_ids(tokenizer, classes: Sequence[str]) -> list[list[int]]:
    """The vocabulary entries of each class's words, with and without a leading space; words of several tokens are left out.

    Raises `ValueError` if a class has no word that is one token.
    """
    found = []
    for name in classes:
        texts = [space + word for word in LABEL_WORDS[name] for space in ("", " ")]
        forms = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        found.append(sorted({form[0] for form in forms if len(form) == 1}))
        if not found[-1]:
            raise ValueError(f"None of the words of {name!r} is one token of this vocabulary.")
    return found


def zero_shot(decoder: Backbone, embeddings: np.ndarray, layer: int, classes: Sequence[str], calibrate: bool) -> np.ndarray:
    """The class whose words have the highest mean logit, int64 (texts,). Embeddings are (texts, hidden).

    `calibrate` subtracts from each word its mean logit over all these texts first. It uses no label, but it does use that
    other texts are there, and takes away the advantage of words that always rank high.
    """
    logits = decode_logits(decoder, embeddings, layer)
    if calibrate:
        logits = logits - logits.mean(axis=0)
    scores = [logits[:, ids].mean(axis=1) for ids in label_ids(decoder.tokenizer, classes)]
    return np.argmax(scores, axis=0)


def linear_predictions(embeddings: np.ndarray, labels: Sequence[int]) -> np.ndarray:
    """Each text's class by a logistic regression (L2, C = 1, standardised features) trained on four other fifths, int64."""
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    return cross_val_predict(model, embeddings, labels, cv=KFold(5, shuffle=True, random_state=0))


def stored_answers(encoder: SentenceEncoder, task: str, data: Dataset) -> Result:
    """Whether each text's class is found, through the result store: columns zero-shot, calibrated, linear (100 or 0)."""
    def compute() -> pd.DataFrame:
        states, labels = encoder.encode(list(data["sentence1"])), np.array(data["label"])
        ask = partial(zero_shot, encoder.backbone, states, encoder.exit_layer, TASKS[task][1])
        answers = {"zero-shot": ask(False), "calibrated": ask(True), "linear": linear_predictions(states, labels)}
        return pd.DataFrame({name: 100.0 * (answer == labels) for name, answer in answers.items()})

    settings = encoder.describe() | {"exit_layer": encoder.exit_layer, "task": task, "data": provenance(data)}
    return run_or_load(f"instructions-{encoder.prompt.name}-{task}", settings, compute, ("instructions", "alignment"))
