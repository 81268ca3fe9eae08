"""Key tokens: the vocabulary entries that an embedding aligns to, and how many of them stand in the text itself.

Definitions from arXiv 2406.17378 and its official code. T is the list of a text's tokens; the ranking is all tokens by
their logit under the backbone's own unembedding:

    Hit@K   1 if a token of the text is among the K highest, else 0; mean over texts
    LAR     share of the text's distinct tokens among the len(T) highest (repeats count in len); mean over texts
    GAR     of all distinct tokens of all texts, the share that LAR finds in at least one text
    LAR@K, GAR@K   the same among the min(len(T), K) highest, as in the official code

All are shares from 0 to 1. A `TokenRule` says which vocabulary entries are the same token and which count."""

from collections.abc import Hashable, Iterable, Iterator, Sequence

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from lib.core.backbone import Backbone
from lib.core.forward import check_finite
from lib.evaluation.intervals import Runs, compare, distinct_share, mean_of
from lib.evaluation.vocabulary import DEFAULT_RULE, TokenRule, text_tokens, token_classes, token_texts, visible

KS = (1, 5, 10, 50)
LOGIT_BYTES = 64 * 2**20  # memory for the logits held at once
ROWS = 16384  # of the unembedding turned to float32 at once


def output_matrix(backbone: Backbone) -> torch.Tensor:
    """The matrix (vocabulary, width) that gives the logits: the unembedding, or the last step of a masked model."""
    head = backbone.unembedding
    return (head if hasattr(head, "weight") else backbone.model.get_output_embeddings()).weight


def counted(backbone: Backbone, rule: TokenRule = DEFAULT_RULE) -> np.ndarray:
    """`token_classes` of all entries of the backbone's vocabulary that have a logit."""
    return token_classes(backbone.tokenizer, len(output_matrix(backbone)), rule)


@torch.inference_mode()
def final_states(backbone: Backbone, embeddings: np.ndarray, layer: int = -1) -> np.ndarray:
    """Embeddings (texts, hidden) as the unembedding reads them, float32 (texts, width). States before the last go
    through the final norm, in float32 with copies of its weights, as float16 cannot hold all of them. `ValueError` for
    another shape, or another width because a projection stands between (OPT-350m)."""
    matrix, index, norm = output_matrix(backbone), backbone.layer_index(layer), backbone.final_norm
    states, read = np.asarray(embeddings, np.float32), matrix.shape[1]
    if states.shape[1:] != (read,):
        raise ValueError(f"The unembedding of {backbone.name} reads (texts, {read}), state {index} is {states.shape}.")
    if index == backbone.num_layers or norm is None:
        return states
    weights = {name: weight.to(matrix.device, torch.float32) for name, weight in norm.named_parameters()}
    return torch.func.functional_call(norm, weights, torch.tensor(states, device=matrix.device)).cpu().numpy()


@torch.inference_mode()
def logit_chunks(backbone: Backbone, embeddings: np.ndarray, layer: int = -1, classes=None) -> Iterator[torch.Tensor]:
    """Logits under the backbone's unembedding of embeddings (texts, hidden), the states `layer` in Hugging Face's
    numbering, so many texts at a time that they fill `LOGIT_BYTES`: float32 (some texts, vocabulary), on its device.
    With `classes`, from `token_classes`, a token's column holds the logit of its best entry, and every other column
    -inf. Logits are computed in float32, as in half precision they tie, and without a model's own capping (Gemma 2),
    which does not change their order. `ValueError` as `final_states`; `FloatingPointError` for logits not finite."""
    states, head, matrix = final_states(backbone, embeddings, layer), backbone.unembedding, output_matrix(backbone)
    if classes is not None:
        entries = np.flatnonzero(classes >= 0)
        target = torch.tensor(classes[entries], device=matrix.device)
    chunks = torch.tensor(states).split(max(1, LOGIT_BYTES // (4 * len(matrix))))
    for chunk in tqdm(chunks, "logits", unit="chunk", leave=False, disable=len(chunks) < 5):
        chunk = chunk.to(matrix.device)
        if hasattr(head, "weight"):
            logits = torch.cat([chunk @ rows.float().T for rows in matrix.split(ROWS)], dim=1)
            logits += 0 if getattr(head, "bias", None) is None else head.bias.float()
        else:
            logits = head(chunk.to(matrix.dtype)).float()
        check_finite(logits, backbone.name, backbone.dtype)
        if classes is not None:
            merged = torch.full_like(logits, -torch.inf)
            logits = merged.scatter_reduce_(1, target.expand(len(logits), -1), logits[:, entries], "amax")
        yield logits


def decode_logits(backbone: Backbone, embeddings: np.ndarray, layer: int = -1) -> np.ndarray:
    """All logits of `logit_chunks` at once, float32 (texts, vocabulary). `top_tokens` needs less memory."""
    return torch.cat([logits.cpu() for logits in logit_chunks(backbone, embeddings, layer)]).numpy()


def mean_logits(chunks: Iterable[torch.Tensor]) -> torch.Tensor:
    """Each token's mean logit over all texts of some `logit_chunks`, float32 (vocabulary,), summed in float64."""
    total, count = 0.0, 0
    for chunk in chunks:
        total, count = total + chunk.sum(dim=0, dtype=torch.float64), count + len(chunk)
    return (total / count).float()


def top_tokens(backbone: Backbone, embeddings: np.ndarray, layer: int = -1, k: int = 10,
               classes: np.ndarray | None = None, mean: torch.Tensor | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The k tokens with the highest logits: ids int64 (texts, k), best first, and logits float32 (texts, k). `mean`,
    from `mean_logits`, is taken off first. Raises as `logit_chunks`, and `ValueError` if too few tokens count."""
    size = len(output_matrix(backbone)) if classes is None else len(np.unique(classes[classes >= 0]))
    if not 1 <= k <= size:
        raise ValueError(f"k must be from 1 to the number of tokens, {size}; got {k}.")
    chunks = logit_chunks(backbone, embeddings, layer, classes)
    if mean is not None:
        chunks = (torch.where(logits.isneginf(), logits, logits - mean) for logits in chunks)
    values, ids = (torch.cat(parts).cpu().numpy() for parts in zip(*(logits.topk(k) for logits in chunks)))
    return ids, values


def aligned_tokens(backbone: Backbone, embeddings: np.ndarray, layer=-1, k=10, texts=None) -> pd.DataFrame:
    """The k vocabulary entries that each embedding aligns to, best first: a row per text and entry, with the columns
    text (its place), id, token (see `visible`), logit; with `texts` in_text (bool), by `DEFAULT_RULE`."""
    ids, logits = top_tokens(backbone, embeddings, layer, k)
    tokens = map(visible, token_texts(backbone.tokenizer, ids.ravel()))
    table = pd.DataFrame({"text": np.repeat(np.arange(len(ids)), k), "id": ids.ravel(), "token": list(tokens)})
    table["logit"] = logits.ravel()
    if texts is not None:
        own = text_tokens(backbone.tokenizer, texts, classes := counted(backbone))
        table["in_text"] = np.concatenate([np.isin(classes[row], tokens) for row, tokens in zip(ids, own, strict=True)])
    return table


def token_lines(backbone: Backbone, embeddings: np.ndarray, layer: int, k: int, texts: Sequence[str]) -> list[str]:
    """The k highest tokens of each text as one line of markdown, those of the text itself in bold."""
    table = aligned_tokens(backbone, embeddings, layer, k, texts)
    shown = table["token"].where(~table["in_text"], "**" + table["token"] + "**")
    return shown.groupby(table["text"]).agg(" ".join).tolist()


def token_ranks(top: np.ndarray, texts: Sequence[Sequence[int]]) -> pd.DataFrame:
    """Where each text's tokens T stand in its ranking, whose beginning is a row of `top`, int (texts, depth): a row per
    text and distinct token of T, with text (its place), token, length (of T), depth, rank (from 1; missing if deeper).
    A text without tokens has no row, as in the official code. `ValueError` if a ranking is shorter than T."""
    (count, depth), sizes = top.shape, [len(row) for row in texts]
    if len(sizes) != count or max(sizes) > depth:
        raise ValueError(f"{len(sizes)} texts of at most {max(sizes)} tokens, {count} rankings that end after {depth}.")
    own = pd.DataFrame({"text": np.repeat(np.arange(count), sizes), "token": np.concatenate(texts).astype(np.int64)})
    own = own.assign(length=np.repeat(sizes, sizes), depth=depth).drop_duplicates()
    text, place = np.indices(top.shape).reshape(2, -1)
    ranking = pd.DataFrame({"text": text, "token": top.ravel(), "rank": place + 1.0})
    return own.merge(ranking, on=["text", "token"], how="left")


def embedding_ranks(backbone: Backbone, embeddings: np.ndarray, layer: int, texts: Sequence[str],
                    rule: TokenRule = DEFAULT_RULE, deepest: int = max(KS)) -> pd.DataFrame:
    """`token_ranks` of the embeddings (texts, hidden) of `texts`, at least as deep as `deepest` and the longest T."""
    own = text_tokens(backbone.tokenizer, texts, classes := counted(backbone, rule))
    top, _ = top_tokens(backbone, embeddings, layer, max(deepest, *map(len, own)), classes)
    return token_ranks(top, own)


def alignment_metrics(ranks: pd.DataFrame, ks: Sequence[int] = KS) -> pd.DataFrame:
    """Hit@K, LAR@K and LAR (columns) of each text with tokens, float64. `ValueError` if a ranking ends before K."""
    if max(ks) > ranks["depth"].min():
        raise ValueError(f"Hit@{max(ks)} needs deeper rankings than {ranks['depth'].min()} (`deepest`).")
    hits = pd.DataFrame({f"Hit@{k}": ranks["rank"] <= k for k in ks}).groupby(ranks["text"]).max()
    return hits.join(_found(ranks, ks).add_prefix("LAR").groupby(ranks["text"]).mean()).astype(float)


def _found(ranks: pd.DataFrame, ks: Sequence[int]) -> pd.DataFrame:
    """Which tokens are among the len(T) highest, cut at each K (columns `"@K"`) and uncut (column `""`)."""
    limits = {f"@{k}": ranks["length"].clip(upper=k) for k in ks} | {"": ranks["length"]}
    return pd.DataFrame({cut: ranks["rank"] <= limit for cut, limit in limits.items()})


def alignment_scores(runs: Runs, ks: Sequence[int] = KS, reference: Hashable = None, draws: int = 1000) -> pd.DataFrame:
    """All metrics of each run (a table from `token_ranks`) over the same texts, with 95 % intervals over texts: columns
    run, metric, and `compare`'s after task; so are `reference` and `draws`. `ValueError` for other texts or rules."""
    texts, tokens, found = {}, {}, {}
    for run, ranks in runs.items():
        texts[run] = alignment_metrics(ranks, ks).rename_axis("item").reset_index().assign(task="")
        tokens[run] = pd.concat([ranks.rename(columns={"text": "item"}).assign(task=""), _found(ranks, ks)], axis=1)
    for metric in texts[run].columns.drop(["task", "item"]):
        found[metric] = compare(texts, mean_of(metric), reference, draws=draws)
    for cut in (*(f"@{k}" for k in ks), ""):
        tables = {run: table.rename(columns={cut: "found"}) for run, table in tokens.items()}
        found[f"GAR{cut}"] = compare(tables, distinct_share, reference, draws=draws)
    table = pd.concat(found, names=["metric"]).reset_index("metric").drop(columns="task")
    table = table.sort_values("run", key=lambda column: column.map(list(runs).index), kind="stable", ignore_index=True)
    return table[["run", *table.columns.drop("run")]]
