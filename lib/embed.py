"""Embed a file of texts, a chunk at a time: an interrupted command, given again, goes on where it stopped.

examples:
  python -m lib.embed sentences.txt -o embeddings.npy
  python -m lib.embed reviews.jsonl --column text --prompt ke --method tp -o reviews.npy
  python -m lib.embed papers.parquet --column abstract --model Qwen/Qwen2-0.5B --pooling values -o papers.npy
  cat sentences.txt | python -m lib.embed - -o embeddings.npy"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from lib.core.attention_values import AttentionValues
from lib.core.backbone import ModelNotFoundError, UnsupportedModelError, load_backbone
from lib.core.encoder import CHUNK, SentenceEncoder
from lib.core.postprocess import load_postprocess
from lib.core.prompts import PROMPTS
from lib.core.store import EmbeddingStore
from lib.report.settings import load_settings

PARSER = argparse.ArgumentParser("python -m lib.embed", formatter_class=argparse.RawDescriptionHelpFormatter)
PARSER.description, _, PARSER.epilog = __doc__.partition("\n\n")
option = PARSER.add_argument
option("texts", help=".txt (a text a line), .jsonl or .parquet (with --column); - reads lines from standard input")
option("-o", "--output", type=Path, required=True, help=".npy, float32 (texts, hidden), rows in the order of the texts")
option("--column", default="text", help="of .jsonl and .parquet (default: text)")
option("--model", default="smollm2", help="a bundled model, a hub id or a folder (default: smollm2)")
option("--dtype", default="auto", help="auto, float32, bfloat16 or float16 (default: auto)")
option("--prompt", default="prompteol", choices=PROMPTS, help="default: prompteol")
option("--method", choices=("none", "tp", "cp"), default="none", help="tp and cp: as chosen for the model")
option("--exit-layer", type=int, help="state that is read (default: the method's, without a method the last)")
option("--pooling", help="last, mean, weighted_mean or values (AlignedWVA); default: the prompt's")
option("--postprocess", type=Path, help="a file that a fitted postprocess was saved to")


def read_chunks(path: str, column: str) -> Iterator[list[str]]:
    """The texts, so many at a time as are encoded together. `KeyError` for a row without the column."""
    if path.endswith(".parquet"):
        from pyarrow.parquet import ParquetFile

        yield from (part.column(column).to_pylist() for part in ParquetFile(path).iter_batches(CHUNK, columns=[column]))
        return
    with sys.stdin if path == "-" else open(path, encoding="utf-8") as file:
        texts = (line.rstrip("\n") for line in file)
        if path.endswith(".jsonl"):
            texts = (json.loads(line)[column] for line in texts)
        yield from iter(lambda: list(islice(texts, CHUNK)), [])


def embed(encoder: SentenceEncoder, chunks: Iterable[list[str]], output: Path) -> int:
    """Write the embeddings of all chunks to `output`, and return how many. Meanwhile they lie in a folder beside it, a
    file a chunk, named by texts and settings: an interrupted call finds them there. `ValueError` for no text."""
    parts, count = output.with_suffix(".parts"), 0
    encoder = encoder.changed(store=EmbeddingStore(parts))
    parts.mkdir(parents=True, exist_ok=True)
    with open(parts / "whole", "wb") as file, tqdm(unit="text") as bar:
        for chunk in chunks:
            embeddings = encoder.encode(chunk, show_progress_bar=False)
            count += len(embeddings)
            shape = {"descr": "<f4", "fortran_order": False, "shape": (count, embeddings.shape[1])}
            file.seek(0)
            np.lib.format.write_array_header_1_0(file, shape)  # numpy leaves room in it for a growing count
            file.seek(0, os.SEEK_END)
            file.write(embeddings.tobytes())
            bar.update(len(chunk))
    if not count:
        raise ValueError("There is no text.")
    os.replace(parts / "whole", output)
    shutil.rmtree(parts)
    return count


def main(arguments: list[str] | None = None) -> int:
    """The command; 0 if all is well, 2 (`SystemExit`) for a wrong call."""
    given = PARSER.parse_args(arguments)
    try:
        backbone, method = load_backbone(given.model, given.dtype), None
        setting = load_settings(given.model)[given.prompt] if given.method != "none" else None
        if setting:
            method = setting.method if given.method == "tp" else setting.contrastive
        layer = given.exit_layer if given.exit_layer is not None else setting.exit_layer if setting else -1
        pooling = AttentionValues() if given.pooling == "values" else given.pooling
        after = load_postprocess(given.postprocess) if given.postprocess else None
        encoder = SentenceEncoder(backbone, given.prompt, method, layer, pooling, after)
        print(json.dumps(encoder.describe(), indent=1), file=sys.stderr)
        count = embed(encoder, read_chunks(given.texts, given.column), given.output)
    except KeyError as error:
        PARSER.error(f"{error} is not there: a column of the texts, or a prompt with settings for {given.model}")
    except (ModelNotFoundError, UnsupportedModelError, OSError, ValueError, TypeError) as error:
        PARSER.error(str(error))
    print(f"{given.output}: {count} embeddings")
    return 0


if __name__ == "__main__":
    sys.exit(main())
