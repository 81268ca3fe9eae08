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
from collections.abc import Iterator
from hashlib import sha256
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from lib.core.attention_values import AttentionValues
from lib.core.backbone import ModelNotFoundError, UnsupportedModelError, load_backbone
from lib.core.encoder import SentenceEncoder
from lib.core.postprocess import load_postprocess
from lib.core.prompts import PROMPTS
from lib.core.store import fingerprint, write_atomically
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
option("--chunk", type=int, default=4096, help="texts between two writes (default: 4096)")


def read_chunks(path: str, column: str, size: int) -> Iterator[list[str]]:
    """The texts, `size` at a time, without holding more. `ValueError` for a row without the column."""
    if path.endswith(".parquet"):
        from pyarrow.parquet import ParquetFile

        yield from (part.column(column).to_pylist() for part in ParquetFile(path).iter_batches(size, columns=[column]))
        return
    with sys.stdin if path == "-" else open(path, encoding="utf-8") as file:
        texts = (line.rstrip("\n") for line in file)
        if path.endswith(".jsonl"):
            texts = (json.loads(line)[column] for line in texts)
        yield from iter(lambda: list(islice(texts, size)), [])


def embed(encoder: SentenceEncoder, chunks: Iterator[list[str]], output: Path) -> int:
    """Write the embeddings of all chunks to `output`, and return how many. What is done lies beside it meanwhile, in
    `.part` files. `ValueError` if these were begun with other settings or other texts, or if there is no text."""
    rows, state = output.with_suffix(".part"), output.with_suffix(".part.json")
    begun = json.loads(state.read_text()) if state.exists() else {"rows": 0, "bytes": 0, "texts": ""}
    settings, digest, count = fingerprint(encoder.describe() | {"code": encoder.code}), sha256(), 0
    with open(rows, "r+b" if begun["rows"] else "wb") as file, tqdm(unit="text", initial=begun["rows"]) as bar:
        file.truncate(begun["bytes"])  # without the chunk that an interrupt cut
        file.seek(begun["bytes"])
        for chunk in chunks:
            digest.update("\n".join(map(str, chunk)).encode(errors="replace"))
            count += len(chunk)
            if count <= begun["rows"]:
                if count == begun["rows"] and (settings, digest.hexdigest()) != (begun["settings"], begun["texts"]):
                    raise ValueError(f"{state} was begun with other settings or texts; delete it to begin anew.")
                continue
            if count - len(chunk) < begun["rows"]:
                raise ValueError(f"{state} was begun with another --chunk or fewer texts; delete it to begin anew.")
            embeddings = encoder.encode(chunk, show_progress_bar=False)
            file.write(embeddings.tobytes())
            file.flush()
            os.fsync(file.fileno())
            done = {"rows": count, "bytes": file.tell(), "width": embeddings.shape[1]}
            write_atomically(state, json.dumps(done | {"settings": settings, "texts": digest.hexdigest()}).encode())
            bar.update(len(chunk))
    if count < max(begun["rows"], 1):
        raise ValueError(f"There are {count} texts, but {begun['rows']} were embedded before." if count else "No text.")
    width = json.loads(state.read_text())["width"]
    whole = output.with_suffix(".whole")
    with open(rows, "rb") as source, open(whole, "wb") as target:
        about = {"descr": "<f4", "fortran_order": False, "shape": (count, width)}
        np.lib.format.write_array_header_1_0(target, about)
        shutil.copyfileobj(source, target)
    os.replace(whole, output)
    rows.unlink(), state.unlink()
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
        count = embed(encoder, read_chunks(given.texts, given.column, given.chunk), given.output)
    except KeyError as error:
        PARSER.error(f"{error} is not there: a column of the texts, or a prompt with settings for {given.model}")
    except (ModelNotFoundError, UnsupportedModelError, OSError, ValueError, TypeError) as error:
        PARSER.error(str(error))
    print(f"{given.output}: {count} embeddings")
    return 0


if __name__ == "__main__":
    sys.exit(main())
