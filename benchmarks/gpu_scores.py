"""The bundled models on the complete STS sets, in float32: part of `gpu.sh`, where their files and data are at hand."""

from __future__ import annotations

from importlib.util import find_spec

import pandas as pd

from lib.core.attention_values import AttentionValues
from lib.core.backbone import load_backbone
from lib.core.encoder import SentenceEncoder
from lib.core.store import EmbeddingStore

PROMPTS = ("prompteol", "cot", "ke")


def scores(models: list[str], device) -> tuple[pd.DataFrame, str]:
    """Spearman x 100 of every complete set and their average, and in words what was scored, or why nothing was."""
    if not models:
        return pd.DataFrame(), "not run: no bundled model is installed"
    if not find_spec("datasets"):
        return pd.DataFrame(), "not run: the package datasets is not installed"
    from lib.data.sources import find_source
    from lib.data.sts import load_sts, sts_tasks
    from lib.evaluation.sts import spearman, sts_pairs
    from lib.report.settings import load_settings

    source, rows = find_source(), []
    data = {task: load_sts(task) for task in sts_tasks(source)}
    for name in models:
        backbone, store = load_backbone(name, dtype="float32", device=device), EmbeddingStore()
        settings = load_settings(name, source.is_sample, "gpu")
        for prompt in PROMPTS:
            setting, last, values = settings[prompt], backbone.num_layers, AttentionValues()
            at = setting.exit_layer
            readings = {
                ("last layer", last): {}, ("exit layer", at): {}, ("TP", at): {"method": setting.method},
                ("AlignedWVA", last): {"pooling": values},
                ("TP + AlignedWVA", last): {"pooling": values, "method": setting.method},
            }
            for (reading, layer), options in readings.items():
                encoder = SentenceEncoder(backbone, prompt, store=store, **options)
                pairs = sts_pairs(encoder, data, {layer, at if not options else layer})
                groups = pairs[pairs["layer"] == layer].groupby("task", sort=False)
                found = {task: spearman(of["gold"], of["similarity"]) for task, of in groups}
                found["Avg"] = sum(found.values()) / len(found)
                rows.append({"model": backbone.title, "prompt": prompt, "reading": reading, "layer": layer, **found})
    pairs = sum(map(len, data.values()))
    return pd.DataFrame(rows), f"{pairs} pairs of {len(data)} complete sets, {source.label}, float32"
