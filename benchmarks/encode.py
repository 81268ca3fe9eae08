"""How much faster is the encoder than the reference path? Same model, sentences and embeddings, one interleaved run.

The reference path is what the official code does: batches of 16 in the given order, padding on the left, the whole
prompt for every sentence, all blocks with all hidden states kept, the LM head over all positions. Run from the project
folder:

    python -m benchmarks.encode --sentences 512 --rounds 3
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext

import numpy as np
import pandas as pd
import torch

from lib.core.backbone import Backbone, load_backbone
from lib.core.encoder import SentenceEncoder
from lib.core.token_prepending import Placement, TokenPrepending
from lib.data.sources import find_source
from lib.data.sts import load_sts
from lib.studies.cost import count_flops, count_tokens, matmul_peak, measure, peak_memory, ratio_quartiles

REFERENCE_BATCH = 16
TP = TokenPrepending(1, 7)


class ReferencePath:
    """The official code's way to an embedding, written with the package's own hooks for the TP step."""

    def __init__(self, encoder: SentenceEncoder):
        self.encoder = encoder

    @torch.inference_mode()
    def encode(self, sentences: list[str]) -> np.ndarray:
        """Embeddings of the sentences in their order, float32 (sentences, hidden)."""
        backbone, prompt, method = self.encoder.backbone, self.encoder.prompt, self.encoder.method
        rows = self.encoder.tokenize(self.encoder.templates[0], [prompt.prepare(s) for s in sentences])
        embeddings = []
        for begin in range(0, len(sentences), REFERENCE_BATCH):
            batch = rows.ids[begin : begin + REFERENCE_BATCH]
            width = max(map(len, batch))
            ids = torch.tensor([[0] * (width - len(row)) + row for row in batch], device=backbone.device)
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch], device=backbone.device)
            applied = nullcontext()
            if method:
                places = rows.placeholders[begin : begin + REFERENCE_BATCH]
                places = [[p + width - len(row) for p in own] for own, row in zip(places, batch)]
                placement = Placement(torch.tensor(places), torch.full((len(batch),), width - 1))
                applied = method.attach(backbone, placement)
            with applied:
                output = backbone.model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
            embeddings.append(output.hidden_states[self.encoder.exit_layer][:, -1].float().cpu().numpy())
        return np.concatenate(embeddings)


def compare(backbone: Backbone, reference: Backbone, prompt: str, sentences: list[str], rounds: int) -> pd.DataFrame:
    """One row per path: the reference on `reference`, then ours on `backbone`, timed in turn."""
    slow = ReferencePath(SentenceEncoder(reference, prompt, TP, exit_layer=28))
    ours = SentenceEncoder(backbone, prompt, TP, exit_layer=28)
    paths = {"reference": (slow, reference), "ours": (ours, backbone)}
    calls = {name: lambda path=path: path.encode(sentences) for name, (path, _) in paths.items()}
    a, b = (call() for call in calls.values())  # also the warm-up
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    seconds = measure(calls, rounds)
    rows = []
    for name, (_, model) in paths.items():
        with count_tokens(model) as tokens:
            flops = count_flops(calls[name])
        with peak_memory(model.device) as memory:
            calls[name]()
        speed = flops / min(seconds[name])
        rows.append({
            "prompt": f"{prompt} + TP", "path": name, "dtype": str(model.dtype).removeprefix("torch."),
            "speed-up": ratio_quartiles(seconds["reference"], seconds[name])[0],
            "sentences/s": len(sentences) / min(seconds[name]),
            "tokens": tokens["tokens"], "TFLOP": flops / 1e12,
            "share of matmul peak": speed / matmul_peak(model.dtype, model.device),
            "peak MB": memory["bytes"] / 1e6, "lowest cosine": f"1 - {max(0.0, 1 - cosine.min()):.0e}",
        })
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--sentences", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32", help="of our path; the reference path always runs in float32")
    arguments = parser.parse_args()
    source = find_source()
    pairs = load_sts("sample" if source.is_sample else "STS-B")
    sentences = list(pairs["sentence1"])[: arguments.sentences]
    reference = load_backbone(arguments.model, dtype="float32")
    backbone = reference if arguments.dtype == "float32" else load_backbone(arguments.model, dtype=arguments.dtype)
    tables = [compare(backbone, reference, prompt, sentences, arguments.rounds) for prompt in ("ke", "prompteol")]
    print(f"{reference.describe()['device']}, {len(sentences)} sentences of STS-B test ({source.label}), "
          f"TP {TP.start} -> {TP.end}, read at layer 28, {arguments.rounds} rounds")
    print(pd.concat(tables).to_markdown(index=False, floatfmt=".2f"))


if __name__ == "__main__":
    main()
