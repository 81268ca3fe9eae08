"""Key tokens: the vocabulary entries that an embedding aligns to, and how many of them stand in the text itself.

Definitions from arXiv 2406.17378 and its official code. T is the list of a text's tokens; the ranking is all tokens by
their logit under the backbone's own unembedding:

    Hit@K   1 if a token of the text is among the K highest, else 0; mean over texts
    LAR     share of the text's distinct tokens among the len(T) highest (repeats count in len); mean over texts
    GAR     of all distinct tokens of all texts, the share that LAR finds in at least one text
    LAR@K, GAR@K   the same among the min(len(T), K) highest, as in the official code

A `TokenRule` says which vocabulary entries are the same token and which count. All scores are shares from 0 to 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict

import numpy as np
import pandas as pd
import torch
from scipy.sparse import csr_array

from lib.core.encoder import SentenceEncoder
from lib.core.backbone import Backbone
from lib.report.results import Result, run_or_load
from lib.core.store import fingerprint
from lib.evaluation.vocabulary import DEFAULT_RULE, TokenRule, text_tokens, token_classes, token_texts, visible

KS = (1, 5, 10, 50)

LOGIT_BYTES = 64 * 2**20  # memory for the logits held at once
ROWS = 16384  # of the unembedding turned to float32 at once


def output_matrix(backbone: Backbone) -> torch.Tensor:
    """The matrix that gives the logits, (vocabulary, width): the unembedding, or the last step of a masked model's head."""
    head = backbone.unembedding
    return (head if hasattr(head, "weight") else backbone.model.get_output_embeddings()).weight


@torch.inference_mode()
def final_states(backbone: Backbone, embeddings: np.ndarray, layer: int = -1) -> np.ndarray:
    """Embeddings as the unembedding reads them, float32 (texts, width): states before the last go through the final norm.

    Raises `ValueError` if they are not (texts, hidden), or of another width than the unembedding reads, because a projection
    stands between (as in OPT-350m).
    """
    if np.ndim(embeddings) != 2:
        raise ValueError(f"Expected embeddings of shape (texts, hidden), got {np.shape(embeddings)}.")
    matrix, index = output_matrix(backbone), backbone.layer_index(layer)
    given, read = embeddings.shape[1], matrix.shape[1]
    if given != read:
        raise ValueError(f"State {index} of {backbone.name} has {given} dimensions, but its unembedding reads {read}.")
    if index == backbone.num_layers or backbone.final_norm is None:
        return np.asarray(embeddings, np.float32)
    return backbone.final_norm(torch.tensor(embeddings, device=matrix.device, dtype=backbone.dtype)).float().cpu().numpy()


def decode_logits(backbone: Backbone, embeddings: np.ndarray, layer: int = -1) -> np.ndarray:
    """Logits of embeddings under the backbone's unembedding, float32 (texts, vocabulary). `top_tokens` needs less memory.

    Computed in float32 whatever the model's dtype, because logits rounded to half precision tie. A model's own capping of
    its logits (Gemma 2) is left out: it does not change their order. Errors as in `final_states`.
    """
    return torch.cat([logits.cpu() for logits in _logits(backbone, embeddings, layer)]).numpy()


@torch.inference_mode()
def top_tokens(
    backbone: Backbone, embeddings: np.ndarray, layer: int = -1, k: int = 10, classes: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The k tokens with the highest logits: ids int64 (texts, k), best first, and logits float32 (texts, k).

    With `classes` (from `token_classes`) the tokens of a rule, each with the logit of its best entry; without, all entries.
    Raises `ValueError` if there are fewer than k.
    """
    if classes is None:
        classes = np.arange(len(output_matrix(backbone)))
    counted = np.flatnonzero(classes >= 0)
    tokens = torch.from_numpy(classes[counted])
    size = len(tokens.unique())
    if not 1 <= k <= size:
        raise ValueError(f"k must be from 1 to the number of tokens, {size}; got {k}.")
    best = []
    for logits in _logits(backbone, embeddings, layer):
        target = tokens.to(logits.device).expand(len(logits), -1)
        merged = torch.full_like(logits, -torch.inf).scatter_reduce_(1, target, logits[:, counted], "amax")
        best.append(merged.topk(k))
    values, ids = (torch.cat(parts).cpu().numpy() for parts in zip(*best))
    return ids, values


@torch.inference_mode()
def _logits(backbone: Backbone, embeddings: np.ndarray, layer: int) -> Iterator[torch.Tensor]:
    """Logits float32 (some texts, vocabulary), chunk by chunk, on the unembedding's device."""
    states, head, matrix = final_states(backbone, embeddings, layer), backbone.unembedding, output_matrix(backbone)
    size = max(1, LOGIT_BYTES // (4 * len(matrix)))
    for begin in range(0, len(states), size):
        chunk = torch.tensor(states[begin : begin + size], device=matrix.device)
        if hasattr(head, "weight"):
            logits = torch.cat([chunk @ rows.float().T for rows in matrix.split(ROWS)], dim=1)
            yield logits if getattr(head, "bias", None) is None else logits + head.bias.float()
        else:
            yield head(chunk.to(matrix.dtype)).float()


def aligned_tokens(
    backbone: Backbone, embeddings: np.ndarray, layer: int = -1, k: int = 10, texts: Sequence[str] | None = None
) -> pd.DataFrame:
    """The k tokens that each embedding aligns to, best first.

    Returns:
        One row per text and token: text (its place), id, token (see `visible`), logit; and, where the texts are given,
        in_text: whether the token is one of the text's under `DEFAULT_RULE`.
    """
    ids, logits = top_tokens(backbone, embeddings, layer, k)
    shown = [visible(text) for text in token_texts(backbone.tokenizer, ids.ravel())]
    places = np.repeat(np.arange(len(ids)), k)
    table = pd.DataFrame({"text": places, "id": ids.ravel(), "token": shown, "logit": logits.ravel()})
    if texts is not None:
        classes = token_classes(backbone.tokenizer, len(output_matrix(backbone)), DEFAULT_RULE)
        own = text_tokens(backbone.tokenizer, texts, classes)
        table["in_text"] = np.concatenate([np.isin(classes[row], tokens) for row, tokens in zip(ids, own, strict=True)])
    return table


def token_lines(backbone: Backbone, embeddings: np.ndarray, layer: int, k: int, texts: Sequence[str]) -> list[str]:
    """The k highest tokens of each text as one line of markdown, those of the text itself in bold."""
    table = aligned_tokens(backbone, embeddings, layer, k, texts)
    shown = table["token"].where(~table["in_text"], "**" + table["token"] + "**")
    return shown.groupby(table["text"]).agg(" ".join).tolist()


def token_ranks(top: np.ndarray, texts: Sequence[Sequence[int]]) -> pd.DataFrame:
    """Where in its ranking each text's own tokens stand: all that the metrics need.

    Args:
        top: int (texts, depth), the ranking's beginning, at least as deep as the longest T.
        texts: T of each text.

    Returns:
        One row per text and distinct token: text (its place), token, length (of T, repeats included), depth, rank (from 1;
        missing if deeper). A text without tokens has no row, and so no part in any mean, as in the official code.
    """
    (count, depth), sizes = top.shape, [len(row) for row in texts]
    if len(sizes) != count:
        raise ValueError(f"There are {count} rankings, but {len(sizes)} texts.")
    if max(sizes) > depth:
        raise ValueError(f"A text has {max(sizes)} tokens, but the rankings end after {depth}.")
    tokens = np.concatenate(texts).astype(np.int64)
    own = pd.DataFrame({"text": np.repeat(np.arange(count), sizes), "token": tokens, "length": np.repeat(sizes, sizes)})
    text, place = np.indices(top.shape).reshape(2, -1)
    ranking = pd.DataFrame({"text": text, "token": top.ravel(), "rank": place + 1.0})
    return own.drop_duplicates().assign(depth=depth).merge(ranking, on=["text", "token"], how="left")


def embedding_ranks(
    backbone: Backbone, embeddings: np.ndarray, layer: int, texts: Sequence[str], rule: TokenRule = DEFAULT_RULE,
    deepest: int = max(KS),
) -> pd.DataFrame:
    """`token_ranks` of the embeddings (texts, hidden) of `texts`, at least as deep as `deepest` and the longest T."""
    classes = token_classes(backbone.tokenizer, len(output_matrix(backbone)), rule)
    own = text_tokens(backbone.tokenizer, texts, classes)
    top, _ = top_tokens(backbone, embeddings, layer, max(deepest, *map(len, own)), classes)
    return token_ranks(top, own)


def stored_ranks(
    encoder: SentenceEncoder, texts: Sequence[str], data: dict, layers: Sequence[int] | None = None,
    rule: TokenRule = DEFAULT_RULE, decoder: Backbone | None = None,
) -> Result:
    """`embedding_ranks` of an encoder's embeddings at each layer (default: the exit layer), through the result store.

    Args:
        data: where the texts come from, for the provenance.
        decoder: whose unembedding (and final norm) decodes them; None takes the encoder's own backbone.

    Returns the columns of `token_ranks` and layer (0 to num_layers).
    """
    decoder = decoder or encoder.backbone
    layers = [encoder.backbone.layer_index(n) for n in (layers or [encoder.exit_layer])]

    def compute() -> pd.DataFrame:
        states = encoder.encode_layers(texts, dict.fromkeys(layers))
        return pd.concat([embedding_ranks(decoder, rows, n, texts, rule).assign(layer=n) for n, rows in states.items()])

    settings = encoder.describe() | {"decoder": decoder.describe(), "layers": layers, "rule": asdict(rule)}
    settings |= {"data": data, "texts": fingerprint(list(texts))}
    return run_or_load(f"alignment-{encoder.prompt.name}", settings, compute, code=("alignment", "vocabulary"))


def alignment_metrics(ranks: pd.DataFrame, ks: Sequence[int] = KS) -> pd.DataFrame:
    """Hit@K, LAR@K and LAR of each text, from `token_ranks`; float64. Raises `ValueError` if a ranking ends before K."""
    if max(ks) > ranks["depth"].min():
        raise ValueError(f"Hit@{max(ks)} needs deeper rankings than {ranks['depth'].min()} (`deepest`).")
    hits = pd.DataFrame({f"Hit@{k}": ranks["rank"] <= k for k in ks}).groupby(ranks["text"]).max()
    return hits.join(pd.DataFrame(_within(ranks, "LAR", ks)).groupby(ranks["text"]).mean()).astype(float)


def _within(ranks: pd.DataFrame, name: str, ks: Sequence[int]) -> dict[str, pd.Series]:
    """Which tokens are among the len(T) highest, cut at each K and uncut."""
    limits = {f"{name}@{k}": ranks["length"].clip(upper=k) for k in ks} | {name: ranks["length"]}
    return {key: ranks["rank"] <= limit for key, limit in limits.items()}


def alignment_scores(
    runs: dict[str, pd.DataFrame], ks: Sequence[int] = KS, reference: str | None = None, draws: int = 1000
) -> pd.DataFrame:
    """All metrics of each run over the same texts, with 95 % bootstrap intervals over texts.

    A resample repeats texts and so holds fewer distinct tokens, which biases its GAR. So the resampled GARs are moved to
    have their mean at the measured value before their percentiles are taken.

    Args:
        runs: label -> table from `token_ranks`. reference: label of the run that the others are compared with.

    Returns columns run, metric, value, low, high and, with a reference, difference, difference_low, difference_high.
    Raises `ValueError` if the runs are not over the same texts, or under different rules.
    """
    tables = [ranks[["text", "token", "length"]].reset_index(drop=True) for ranks in runs.values()]
    if not all(table.equals(tables[0]) for table in tables):
        raise ValueError("The runs do not hold the same tokens of the same texts.")
    count = tables[0]["text"].nunique()
    resamples = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=draws)
    weights = np.vstack([np.ones(count, int), resamples])  # the first row gives the measured values
    scores = {run: _scores(ranks, ks, weights) for run, ranks in runs.items()}
    results = {run: _interval(of_run, ("value", "low", "high")) for run, of_run in scores.items()}
    if reference is not None:
        names = ("difference", "difference_low", "difference_high")
        results = {run: table.join(_interval(scores[run] - scores[reference], names)) for run, table in results.items()}
    return pd.concat(results, names=["run", "metric"]).reset_index()


def _scores(ranks: pd.DataFrame, ks: Sequence[int], weights: np.ndarray) -> pd.DataFrame:
    """Every metric for each way to weight the texts, (draws, texts): a row per draw, a column per metric."""
    metrics = alignment_metrics(ranks, ks)
    scores = pd.DataFrame(weights @ metrics.to_numpy() / weights.sum(axis=1, keepdims=True), columns=metrics.columns)
    texts, tokens = (pd.factorize(ranks[column], sort=True)[0] for column in ("text", "token"))
    drawn = (weights > 0).T.astype(np.float32)

    def distinct(counted: np.ndarray | pd.Series) -> np.ndarray:
        """How many distinct tokens the counted rows hold in each draw."""
        return (csr_array((counted.astype(np.float32), (tokens, texts))) @ drawn > 0).sum(axis=0)

    everything = distinct(np.ones(len(ranks)))
    return scores.assign(**{name: distinct(found) / everything for name, found in _within(ranks, "GAR", ks).items()})


def _interval(scores: pd.DataFrame, names: tuple[str, str, str]) -> pd.DataFrame:
    """Value, low and high of each metric (rows), from the measured scores (first row) and the resampled ones."""
    value, resampled = scores.iloc[0], scores.iloc[1:]
    bias = (resampled.mean() - value).where(value.index.str.startswith("GAR"), 0.0)
    low, high = np.percentile(resampled - bias, [2.5, 97.5], axis=0)
    return pd.DataFrame(dict(zip(names, (value, low, high))))
