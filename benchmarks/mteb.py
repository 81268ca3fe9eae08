"""The paper's MTEB tables (7 to 12): baseline and Token Prepending on the 32 tasks that they list, run by mteb.

The baseline is read at the last layer, as in the paper, TP at its exit layer. mteb keeps the result of every task and
setting in --folder: an interrupted command, given again, goes on, and all that is there counts. At the paper's setting
the table is written to figures/<profile>/. The exit status is 2 if a task that was asked for could not be run.

examples:
  python -m benchmarks.mteb
  python -m benchmarks.mteb --tasks BIOSSES SummEval
  python -m benchmarks.mteb --model smollm2 --start 1 --end 2 --exit-layer 28 --tasks BIOSSES"""

import argparse
import json
import math
import re
import sys
from importlib.metadata import version
from itertools import chain, product
from pathlib import Path

import mteb
import pandas as pd
import yaml
from huggingface_hub import HfApi, constants
from mteb.models import ModelMeta
from mteb.models.sentence_transformer_wrapper import SentenceTransformerEncoderWrapper
from sentence_transformers import SentenceTransformer

from lib.core.backbone import load_backbone
from lib.core.bundled import ModelNotFoundError
from lib.core.encoder import CHUNK, SentenceEncoder
from lib.core.prompts import PROMPTS
from lib.core.sentence_transformer import TrainingFree
from lib.core.store import CACHE, fingerprint, write_atomically
from lib.core.token_prepending import TokenPrepending
from lib.data.sources import HubUnreachableError, ask_hub
from lib.report.paper import FIGURES, KEYS, PAPER_MODELS, beside_paper
from lib.report.results import environment

CATEGORIES = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
SETTING = ("prompteol", 1, 7, 27)  # the paper's for Llama-2-7B: prompt, TP's start and end, and its exit layer

PARSER = argparse.ArgumentParser("python -m benchmarks.mteb", formatter_class=argparse.RawDescriptionHelpFormatter)
PARSER.description, _, PARSER.epilog = __doc__.partition("\n\n")
option = PARSER.add_argument
option("--model", default="meta-llama/Llama-2-7b-hf", help="hub id, folder or bundled model (default: %(default)s)")
option("--dtype", default="auto", help="auto, float32, bfloat16 or float16 (default: %(default)s)")
option("--prompt", default=SETTING[0], choices=PROMPTS, help="default: %(default)s")
option("--start", type=int, default=SETTING[1], help="first block before which TP writes (default: %(default)s)")
option("--end", type=int, default=SETTING[2], help="first one before which it does not (default: %(default)s)")
option("--exit-layer", type=int, default=SETTING[3], help="state that is read with TP (default: %(default)s)")
option("--tasks", nargs="+", metavar="NAME", help="only these are run (default: all of the tables)")
option("--folder", type=Path, default=CACHE / "mteb", help="where mteb keeps results (default: data/cache/mteb)")


def mteb_model(encoder: SentenceEncoder) -> SentenceTransformerEncoderWrapper:
    """The encoder for `mteb.evaluate` (mteb 2), its own prompt for every task and none of mteb's instructions.

    mteb files results by name and revision (`mteb_identity`) and by `experiment_kwargs`: the main settings as plain
    values and a fingerprint of all settings and of the code, so that other settings are another result."""
    backbone, about = encoder.backbone, encoder.describe()
    name, revision = mteb_identity(backbone.name, backbone.revision, backbone.fingerprint)
    method = about["method"] or {"method": "baseline"}
    experiment = {key: about[key] for key in ("prompt", "exit_layer", "pooling", "dtype")}
    experiment |= {f"method_{key}": method[key] for key in ("start", "end") if key in method}
    experiment |= {"method": method["method"], "setting": fingerprint(about | {"code": encoder.code})}
    model = SentenceTransformerEncoderWrapper(SentenceTransformer(modules=[TrainingFree(encoder)]))
    overwrites = {"name": name, "revision": revision, "experiment_kwargs": experiment}
    model.mteb_model_meta = ModelMeta.create_empty(overwrites=overwrites)
    return model


def mteb_identity(name: str, revision: str, weights: str) -> tuple[str, str]:
    """Name and revision for mteb, which wants `organisation/name`: of a model from the hub its id and commit, of any
    other (a folder, a bundled model) `local/` with the last part of its name, and its `weights`' fingerprint."""
    from_hub = "/" in name and re.fullmatch("[0-9a-f]{40}", revision)
    return (name, revision) if from_hub else (f"local/{Path(name).resolve().name}", weights)


def one_line(error: Exception) -> str:
    """The error's message without its line breaks."""
    return " ".join(str(error).split())


def stored_score(task, model, cache: mteb.ResultCache) -> float:
    """The main score x 100 that mteb has stored, or NaN if there is none for all of the task's splits and languages."""
    result = cache.load_task_result(task.metadata.name, model.mteb_model_meta)
    if result is None or result.get_missing_evaluations(task):
        return math.nan
    return 100 * result.validate_and_filter_scores(task).get_score()


def run_task(task, models: list, cache: mteb.ResultCache) -> str:
    """Evaluate the models that have no stored result. The answer is empty, or says why the data could not be had."""
    models = [model for model in models if math.isnan(stored_score(task, model, cache))]
    if not models:
        return ""
    try:
        task.load_data()
    except Exception as error:  # the hub's, datasets' or the task's own; every one is reported and sets the exit status
        return f"{type(error).__name__}: {one_line(error)}"
    for model in models:  # the encoder makes its own batches by tokens from a chunk of texts
        mteb.evaluate(model, task, cache=cache, encode_kwargs={"batch_size": CHUNK})
    task.unload_data()
    return ""


def averages(tasks: dict, models: dict, cache: mteb.ResultCache, prompt: str) -> pd.DataFrame:
    """A row per category, without and with TP: the mean over its tasks, NaN if one is missing, and what is missing."""
    rows = []
    for (tp, model), (category, names) in product(models.items(), CATEGORIES.items()):
        scores = pd.Series({name: stored_score(tasks[name], model, cache) for name in names})
        missing = scores.index[scores.isna()]
        lacks = f"not run: lacks {len(missing)} of {len(names)} tasks, first {missing[0]}" if len(missing) else ""
        rows.append((prompt, tp, category, "mteb_score", scores.mean(skipna=False), lacks))
    return pd.DataFrame(rows, columns=["method", "tp", "task", "metric", "value", "lacks"])


def beside_published(found: pd.DataFrame, model: str) -> pd.DataFrame:
    """`beside_paper` for `averages`. The status of one that is missing says which tasks it lacks."""
    table = beside_paper(found, "a5_ablations", model, sample=False).merge(found, on=KEYS[1:])
    table["status"] = table["lacks"].where(table["lacks"] != "", table["status"])
    return table.drop(columns=["value", "lacks"])


def write(table: pd.DataFrame, model: str, metas: list[ModelMeta]) -> None:
    """Write the table to the profile's folder, and how it came about into a section of the profile's provenance."""
    folder = FIGURES / PAPER_MODELS.get(model, Path(model).resolve().name)
    write_atomically(folder / "mteb_beside_paper.csv", table.to_csv(index=False, float_format="%.6f").encode())
    encoders = [{"model": meta.name, "revision": meta.revision} | meta.experiment_kwargs for meta in metas]
    about = {"encoders": encoders, "mteb": version("mteb"), "environment": environment()}
    others = json.loads(path.read_text()) if (path := folder / "provenance.json").exists() else {}
    lines = (f"{json.dumps(name)}: {json.dumps(part)}" for name, part in (others | {"benchmarks.mteb": about}).items())
    write_atomically(path, "{{\n{}\n}}\n".format(",\n".join(lines)).encode())


def main(arguments: list[str] | None = None) -> int:
    """The command; 2 if something that was asked for is missing, else 0."""
    given, listed = PARSER.parse_args(arguments), list(chain(*CATEGORIES.values()))
    wanted = [name for name in listed if name in (given.tasks or listed)]
    if unknown := set(given.tasks or ()) - set(wanted):
        PARSER.error(f"--tasks: {', '.join(sorted(unknown))} not among {', '.join(listed)}")
    tasks = {task.metadata.name: task for task in mteb.get_benchmark("MTEB(eng, v1)").tasks}
    try:
        if not constants.HF_HUB_OFFLINE:
            ask_hub(HfApi(token=False), tasks[wanted[0]].metadata.dataset["path"])
        backbone = load_backbone(given.model, given.dtype)
        tp = SentenceEncoder(backbone, given.prompt, TokenPrepending(given.start, given.end), given.exit_layer)
    except (HubUnreachableError, ModelNotFoundError) as error:
        print(f"Not run: {one_line(error).rstrip('.')}. This needs {given.model} and the data of {len(wanted)} tasks: "
              "go online and start again, or set HF_HUB_OFFLINE=1 to use what is on disk.", file=sys.stderr)
        return 2
    except ValueError as error:  # such as a layer that the model does not have
        PARSER.error(str(error))
    models = {False: mteb_model(SentenceEncoder(backbone, given.prompt)), True: mteb_model(tp)}
    cache = mteb.ResultCache(given.folder)
    reasons = {name: run_task(tasks[name], [*models.values()], cache) for name in wanted}
    found = averages(tasks, models, cache, given.prompt)
    table = beside_published(found, given.model) if given.prompt == SETTING[0] else found
    if (given.prompt, given.start, given.end, given.exit_layer) == SETTING:
        write(table, given.model, [model.mteb_model_meta for model in models.values()])
    else:
        print("Not the setting of the paper's tables, so no file is written.")
    print(table.drop(columns=["source", "grade"], errors="ignore").to_markdown(index=False, floatfmt=".2f"))
    if failed := [f"{name} ({reason})" for name, reason in reasons.items() if reason]:
        print(f"Missing: {', '.join(failed)}. Go online and give the command again: it goes on.", file=sys.stderr)
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
