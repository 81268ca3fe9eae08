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
def model(tmp_path):
    return ["--model", str(save_tiny(tmp_path / "model")), "--dtype", "float32", "--prompt", "ke", "--chunk", "4"]


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
    assert not list(tmp_path.glob("out.*part*"))


def test_it_goes_on_where_it_was_interrupted_and_only_with_the_same(model, tmp_path, monkeypatch, capsys):
    path, output = write(tmp_path, ".txt"), tmp_path / "out.npy"
    encode, done = SentenceEncoder.encode, []

    def interrupted(self, texts, **options):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(texts)
        return encode(self, texts, **options)

    monkeypatch.setattr(SentenceEncoder, "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        embed.main([str(path), "-o", str(output), *model])
    with open(tmp_path / "out.part", "ab") as file:
        file.write(b"half a chunk")

    def noted(self, texts, **options):
        done.append(texts)
        return encode(self, texts, **options)

    monkeypatch.setattr(SentenceEncoder, "encode", noted)
    for change in (["--prompt", "cot"], ["--chunk", "3"]):
        with pytest.raises(SystemExit):
            embed.main([str(path), "-o", str(output), *model, *change])
        assert "delete it to begin anew" in capsys.readouterr().err
    done.clear()
    assert embed.main([str(path), "-o", str(output), *model]) == 0
    assert done[0][0] == TEXTS[8]  # two chunks of four were there
    np.testing.assert_allclose(np.load(output), encode(SentenceEncoder(tiny_backbone(), "ke"), TEXTS), atol=1e-5)


@pytest.mark.parametrize("options, said", [
    (["--method", "tp"], "is not there. Make it with"), (["--exit-layer", "9"], "Layer 9 does not exist"),
    (["--pooling", "best"], "Unknown pooling"), (["--model", "/nowhere"], "Cannot load"),
])
def test_a_wrong_call_is_one_line(options, said, model, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        embed.main([str(write(tmp_path, ".txt")), "-o", str(tmp_path / "out.npy"), *model, *options])
    assert end.value.code == 2 and said in capsys.readouterr().err


def test_no_text_and_no_column_are_named(model, tmp_path, capsys):
    (tmp_path / "empty.txt").touch()
    for path, said in ((tmp_path / "empty.txt", "No text"), (write(tmp_path, ".jsonl"), "'text' is not there")):
        with pytest.raises(SystemExit):
            embed.main([str(path), "-o", str(tmp_path / "out.npy"), *model])
        assert said in capsys.readouterr().err
