"""Are embeddings on a GPU those of the CPU? Tiny random models of every family, every method, three dtypes."""

from __future__ import annotations

import copy
import tempfile

import pandas as pd
import torch

from lib.core.attention_values import AttentionValues
from lib.core.backbone import Backbone, UnsupportedModelError, load_backbone
from lib.core.contrastive import ContrastivePrompting
from lib.core.encoder import SentenceEncoder
from lib.core.token_prepending import TokenPrepending
from tests.tiny_models import FAMILIES, LAYERS, SENTENCES, cosines, tiny_backbone

READINGS = {
    "baseline": {}, "TP": {"method": TokenPrepending(1, 3)}, "AlignedWVA": {"pooling": AttentionValues()},
    "CP": {"method": ContrastivePrompting(2)},
}
# The largest 1 - cosine with the CPU's float32 embedding that is taken for rounding. These models' weights are drawn
# wide, so that mistakes show; in bfloat16 the CPU itself is up to 0.03 away.
FARTHEST = {"float32": 1e-5, "bfloat16": 5e-2, "float16": 1e-3}


def embeddings(backbone: Backbone, reading: str) -> torch.Tensor | None:
    """Embeddings of `SENTENCES`, or None for a family that the method refuses."""
    try:
        return torch.as_tensor(SentenceEncoder(backbone, "ke", **READINGS[reading]).encode(SENTENCES))
    except UnsupportedModelError:
        return None


def farthest(backbone: Backbone, expected: dict[str, torch.Tensor | None]) -> dict[str, float | None]:
    """Reading -> the largest 1 - cosine of an embedding with the expected one; None where both are refused."""
    found = {reading: embeddings(backbone, reading) for reading in READINGS}
    if [reading for reading in READINGS if (found[reading] is None) != (expected[reading] is None)]:
        raise RuntimeError(f"{backbone.name} is refused on one device only.")
    return {reading: None if found[reading] is None else float(1 - cosines(found[reading], expected[reading]).min())
            for reading in READINGS}


def parity(device: torch.device) -> pd.DataFrame:
    """A row for each family and dtype, and for a Llama with two of its blocks on the CPU: 1 - cosine, per reading."""
    rows = []
    for family in FAMILIES:
        tiny = tiny_backbone(family)
        expected = {reading: embeddings(tiny, reading) for reading in READINGS}
        for dtype in FARTHEST:
            model = copy.deepcopy(tiny.model).to(device, getattr(torch, dtype))
            moved = Backbone.from_model(model, tiny.tokenizer, f"tiny-{family}")
            rows.append({"model": family, "dtype": dtype, **farthest(moved, expected)})
    if device.type == "cuda":
        rows.append({"model": "llama, half of it on the CPU", "dtype": "float32", **farthest(*split_llama())})
    return pd.DataFrame(rows)


def split_llama() -> tuple[Backbone, dict[str, torch.Tensor | None]]:
    """A Llama whose second half lies on the CPU, loaded with a device map, and what its embeddings should be."""
    tiny = tiny_backbone("llama")
    places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 0, "lm_head": 0}
    places |= {f"model.layers.{i}": 0 if i < LAYERS // 2 else "cpu" for i in range(LAYERS)}
    with tempfile.TemporaryDirectory() as folder:
        tiny.model.save_pretrained(folder)
        tiny.tokenizer.save_pretrained(folder)
        spread = load_backbone(folder, dtype="float32", device_map=places)
    return spread, {reading: embeddings(tiny, reading) for reading in READINGS}


def too_far(table: pd.DataFrame) -> list[str]:
    """The cells that are not equal but for rounding, in words."""
    cells = table.melt(["model", "dtype"], var_name="reading").dropna(subset="value")
    cells = cells[cells["value"] > cells["dtype"].map(FARTHEST)]
    return [f"{row.model}, {row.dtype}, {row.reading}: 1 - cosine {row.value:.1e}" for row in cells.itertuples()]
