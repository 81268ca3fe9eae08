"""`python -m lib.embed`: files in, one array out, whatever interrupts it."""

import io
import json

import numpy as np
import pandas as pd
import pytest
from tiny_models import SENTENCES, save_tiny, tiny_backbone

from lib import embed
from lib.core.encoder import SentenceEncoder

TEXTS = [f"{sentence} {i}" for i in range(3) for sentence in SENTENCES]


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.setattr(embed, "CHUNK", 4)
    return ["--model", str(save_tiny(tmp_path / "model")), "--dtype", "float32", "--prompt", "ke"]


def write(folder, kind: str):
    path = folder / f"texts{kind}"
    if kind == ".txt":
        path.write_text("".join(f"{text}\n" for text in TEXTS))
    elif kind == ".jsonl":
        path.write_text("".join(json.dumps({"id": 1, "body": text}) + "\n" for text in TEXTS))
    else:
        pd.DataFrame({"body": TEXTS}).to_parquet(path)
    return path


@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".parquet", "-"])
def test_rows_are_in_the_order_of_the_texts(kind, model, tmp_path, monkeypatch, capsys):
    path = "-" if kind == "-" else str(write(tmp_path, kind))
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(TEXTS)))
    assert embed.main([path, "-o", str(tmp_path / "out.npy"), "--column", "body", *model]) == 0
    expected = SentenceEncoder(tiny_backbone(), "ke").encode(TEXTS)
    np.testing.assert_allclose(np.load(tmp_path / "out.npy", mmap_mode="r"), expected, atol=1e-5)
    output = capsys.readouterr()
    assert f"{len(TEXTS)} embeddings" in output.out and '"prompt": "ke"' in output.err
    assert {path.name for path in tmp_path.glob("out*")} == {"out.npy"}


@pytest.mark.parametrize("kind", [".txt", ".parquet"])
def test_it_goes_on_where_it_was_interrupted(kind, model, tmp_path, monkeypatch):
    command = [str(write(tmp_path, kind)), "-o", str(tmp_path / "out.npy"), "--column", "body", *model]
    compute, done = SentenceEncoder._compute, []

    def interrupted(self, *arguments):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(arguments)
        return compute(self, *arguments)

    monkeypatch.setattr(SentenceEncoder, "_compute", interrupted)
    with pytest.raises(KeyboardInterrupt):
        embed.main(command)
    assert not (tmp_path / "out.npy").exists()
    monkeypatch.setattr(SentenceEncoder, "_compute", lambda self, *given: done.append(given) or compute(self, *given))
    assert embed.main(command) == 0
    assert len(done) == -(-len(TEXTS) // 4), "no chunk is computed twice"
    expected = SentenceEncoder(tiny_backbone(), "ke").encode(TEXTS)
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected, atol=1e-5)
    assert not (tmp_path / "out.parts").exists()


@pytest.mark.parametrize("kind, options, said", [
    (".txt", ["--method", "tp"], "is not there. Make it with"), (".txt", ["--exit-layer", "9"], "Layer 9 does not"),
    (".txt", ["--pooling", "best"], "Unknown pooling"), (".txt", ["--model", "/nowhere"], "Cannot load"),
    (".jsonl", [], "'text' is not there"), ("empty", [], "no text")])
def test_a_wrong_call_is_one_line(kind, options, said, model, tmp_path, capsys):
    (tmp_path / "empty").touch()
    path = tmp_path / "empty" if kind == "empty" else write(tmp_path, kind)
    with pytest.raises(SystemExit) as end:
        embed.main([str(path), "-o", str(tmp_path / "out.npy"), *model, *options])
    assert end.value.code == 2 and said in capsys.readouterr().err
