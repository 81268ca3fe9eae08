"""The tables of the READMEs, from the result files: `python -m benchmarks.claims` writes them between their markers.

`claims.yaml` says what they hold, and from which profiles. A block goes from `<!-- name argument -->` to
`<!-- end -->`; its name is that of a function here.
"""

import csv
import json
import os
import re
from pathlib import Path

import pandas as pd
import yaml

from benchmarks.transformers_matrix import TABLE, table_text
from lib.core.store import ROOT
from lib.report import paper

PLAN = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
PROFILES, FIGURES = PLAN["profiles"], ROOT / "figures"
PAGES = [ROOT / name / "README.md" for name in ("", "figures", "lib", "notebooks", "benchmarks")]
NOTEBOOKS = {path.name[:2]: path for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
NOT_IN_GIT = ("data/cache/", "data/downloads/")
BLOCK = re.compile(r"(<!-- (\w+)(?: (\S+))? -->\n).*?<!-- end -->", re.S)


def markdown(number: str) -> str:
    cells = json.loads(NOTEBOOKS[number].read_text(encoding="utf-8"))["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def sections(model: str) -> dict:
    """Notebook -> its section in the provenance of the first of the model's profiles that has run it."""
    found = {}
    for profile in reversed(PROFILES[model]):
        path = FIGURES / profile / "provenance.json"
        ran = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        found |= {name: {"profile": profile} | section for name, section in ran.items() if name != "about"}
    return found


def place(model: str, name: str) -> Path:
    """Where an artefact of the model lies; where nothing is, if no profile has made it."""
    owners = [section["profile"] for section in sections(model).values() if name in section["artefacts"]]
    return FIGURES / (owners or ["nothing"])[0] / name


def table(head: str, rows) -> str:
    lines = [head.split(" | "), ["---"] * (head.count(" | ") + 1), *rows]
    return "".join(f"| {' | '.join(str(cell).replace('|', '/') for cell in line)} |\n" for line in lines)


def link(label: str, path: Path, folder: Path) -> str:
    assert path.exists(), path
    return f"[{label}]({os.path.relpath(path, folder)})"


def see(place: str, folder: Path) -> str:
    number, _, section = place.partition(": ")
    if not section:
        return link(f"`{place}`", ROOT / place, folder)
    assert f"## {section}\n" in markdown(number), place
    return f"{link(number, NOTEBOOKS[number], folder)}, {section}"


def published(row: dict) -> str:
    """What a paper says, in its numbers: without TP before with it, the main setting before its variants."""
    if not row.get("published"):
        return row.get("paper", "no number")
    name, query = row["published"]
    order = ["task", "model", "method", "variant", "tp"]
    values = paper.read_paper(name).query(query, engine="python").sort_values(order)["value"].tolist()
    pairs = list(zip(values[::2], values[1::2])) or [(0, 0)]
    gains = [after - before for before, after in pairs]
    ratios = " and ".join(f"{100 * after / before:.0f}" for before, after in pairs if before)
    more = {"d": gains[0], "dmin": min(gains), "dmax": max(gains), "up": sum(gain > 0 for gain in gains)}
    return row["paper"].format(*values, **more, pairs=len(pairs), ratios=ratios)


def measured(row: dict, model: str) -> tuple[str, str]:
    """A claim's cell for a model, and its verdict, which is empty where nothing was measured."""
    path, form = place(model, row.get("file", "nothing")), row.get("format", "{:+.1f}")
    blocks = max((section["about"]["blocks"] for section in sections(model).values()), default=0)

    def rows(query: str) -> pd.DataFrame:
        file = pd.read_csv(path) if path.is_file() else pd.DataFrame()
        return file if file.empty else file.query(query, engine="python", local_dict={"model_name": model})

    def numbers(query: str) -> list[float]:
        columns = row.get("columns", ["difference", "difference_low", "difference_high"])
        [*values] = rows(query)[columns].astype(float).dropna().to_numpy() * row.get("times", 1)
        assert len(values) == 1, f"{row['claim']}: {len(values)} rows in {path}"
        return [values[0][0], *sorted(values[0][1:])]

    def say(value: float, *bounds: float) -> str:
        ends = " to ".join(form.replace("+", "").format(bound + 0.0, blocks=blocks) for bound in bounds)
        return form.format(value + 0.0, blocks=blocks) + f" ({row.get('range', '')}{ends})" * bool(bounds)

    there = rows(row.get("query", ""))
    if there.empty or there[row.get("columns", [])].isna().any(axis=None):
        return row.get("missing", "not run"), ""
    if "count" in row:
        share = len(there.query(row["count"], engine="python")) / len(there)
        return f"{share * len(there):.0f} of {len(there)}", "shown" if share >= row.get("least", 1) else "not shown"
    value, (word, limit, *_) = numbers(row["query"]), [*(row.get("rule") or "").split(), "0", "0"]
    if "minus" in row:
        value = [value[0] - numbers(row["minus"])[0]]
    if "same" in row and not any(value):
        return row["same"], ""
    text, low, high, bottom, top = say(*value), value[-2:][0], value[-1], float(limit), float(limit)
    if "against" in row:
        other = numbers(row["against"])
        text, bottom, top = f"{text} against {say(*other)}", *other[1:]
    if len(value) < 3 or not row.get("rule"):
        return text, "measured" if len(value) == 3 else "no interval"
    side = int(low > top) - int(high < bottom)
    if word == "same":
        return text, "differs" if side else "no difference shown"
    return text, ("not shown", "shown", "the opposite")[side * (1 if word == "above" else -1)]


def verdict(found: dict[str, str]) -> str:
    said = {model: word for model, word in found.items() if word}
    if len({*said.values()}) > 1:
        return "; ".join(f"{model}: {word}" for model, word in said.items())
    return next(iter(said.values()), "not tested")


def claims(name: str, folder: Path) -> str:
    papers, gpu, lines = name in ("tp", "tokens"), name == "gpu", []
    models = [*PROFILES][: 1 if gpu else None]
    for row in PLAN["tables"][name]:
        cells = {model: measured(row, model) for model in models}
        words = verdict({model: word for model, (_, word) in cells.items()})
        said = [published(row)] if papers else []
        lines.append([row["claim"], *said, *(text for text, _ in cells.values()), *[words] * (not gpu)])
        lines[-1].append(see(row["see"], folder))
    heads = ["here"] if gpu else [*models, "verdict"]
    return table(" | ".join(["what" if gpu else "claim", *["paper"] * papers, *heads, "notebook, section"]), lines)


def coverage(_, folder: Path) -> str:
    """Each published number counts once: as `python -m lib.report.paper` has it or, beside that, as another model's."""
    made = [(model, name) for model in PROFILES for of in sections(model).values() for name in of["artefacts"]]
    files = [place(*one) for one in made if one[1].endswith("_beside_paper.csv")]
    files = [file for file in files if "metric" in pd.read_csv(file, nrows=0)]
    ours = pd.concat(pd.read_csv(file).dropna(subset="ours").assign(profile=file.parent.name) for file in files)
    explained = pd.read_csv(ROOT / "configs" / "explanations.csv", dtype=str, keep_default_na=False)
    rows = paper.comparison(ours, explained)
    names = sorted(path.stem for path in paper.PAPER.glob("*.csv"))
    origin = pd.concat(paper.read_paper(name).assign(table=name) for name in names)
    rows = rows.merge(origin[["table", *paper.KEYS, "variant", "source"]], on=["table", *paper.KEYS, "variant"])
    other = pd.MultiIndex.from_frame(ours.loc[ours["status"] == "other model", paper.KEYS])
    here = pd.MultiIndex.from_frame(rows[paper.KEYS]).isin(other) & (rows["variant"] == "")
    status = rows["status"].str.partition(":")[0]
    rows["status"] = status.mask((status == "not run") & here, "other model")
    lines, left = [], pd.Series(True, rows.index)
    for row in PLAN["coverage"]:
        files, _, pattern = (row["numbers"] or "^$:").partition(":")
        mine = rows["table"].str.fullmatch(files) & rows["source"].str.contains(pattern, regex=True)
        assert left[mine].all(), f"{row['what']}: a number of it is in another row"
        left &= ~mine
        counts = rows.loc[mine, "status"].value_counts()
        numbers = ", ".join(f"{count} {name}" for name, count in counts.sort_index().items()) or "none"
        lines.append([row["what"], see(row["where"], folder), f"**{row['state']}**: {row['why']}", numbers])
    assert not left.any(), rows[left]
    total = ", ".join(f"{count} {name}" for name, count in rows["status"].value_counts().sort_index().items())
    lines.append([f"All {len(rows)} published numbers", "", "", total])
    return table("table or figure | here | state | published numbers", lines)


def runs(*_) -> str:
    """Which profile each model's notebooks are shown from."""
    lines = []
    for model in PROFILES:
        of = {}
        for name, section in sorted(sections(model).items()):
            of.setdefault(section["profile"], []).append(name[:2])
        lines.append(f"{model}: " + ", ".join(f"`{profile}` ({', '.join(names)})" for profile, names in of.items()))
    return f"- Profiles that were run (notebooks): {'; '.join(lines)}."


def figure(name: str, folder: Path) -> str:
    model = next(iter(PROFILES))
    made = [s["artefacts"][name]["caption"] for s in sections(model).values() if name in s["artefacts"]]
    return f"!{link(made[0], place(model, name), folder)}\n\n{made[0]}.\n" if made else "Not run.\n"


def index(_, folder: Path) -> str:
    """All artefacts, a notebook at a time; where profiles differ in the caption, in a row each."""
    text = ""
    for number, path in NOTEBOOKS.items():
        lines = {}
        for model in PROFILES:
            for name, artefact in sections(model).get(path.stem, {"artefacts": {}})["artefacts"].items():
                file = place(model, name).with_suffix(".md" if name.endswith(".csv") else ".png")
                caption, _, where = artefact["caption"].rpartition(". ")
                gpu = name.startswith("cost_gpu")  # measured elsewhere
                row = lines.setdefault((name, f"{caption}. {where}" if gpu else caption), [])
                row.append(link("GPU" if gpu else model, file, folder))
        rows = ([f"`{name}`", f"{caption}.", ", ".join(links)] for (name, caption), links in lines.items())
        title = markdown(number).partition("\n")[0].lstrip("# ")
        text += f"### {link(title, path, folder)}\n\n{table('file | what it is | see', rows)}\n" * bool(lines)
    return text


def notebooks(_, folder: Path) -> str:
    pattern, lines = r"Run shown:\*\* profile `(\w+)`.*?([\d.]+) minutes and ([\d.]+) GB.*?(\d+) CPU core", []
    for number, question in PLAN["questions"].items():
        run, minutes, memory, cores = re.search(pattern, markdown(number)).groups()
        path = NOTEBOOKS[number]
        took = f"`{run}`: {minutes} minutes, {memory} GB, {cores} core{'s' * (cores != '1')}"
        lines.append([link(path.stem, path, folder), question, took])
    return table("notebook | question | run that is shown", lines)


def artefact(name: str, _) -> str:
    path = place(next(iter(PROFILES)), name.replace(".md", ".csv")).with_name(name)
    return path.read_text(encoding="utf-8") if path.exists() else "Not run."


def releases(*_) -> str:
    with open(TABLE, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return table_text({version: {row["family"]: row[version] for row in rows} for version in list(rows[0])[1:]})


def rendered(page: Path) -> str:
    """A page with its blocks written anew."""
    text = page.read_text(encoding="utf-8")
    parts = (claims, runs, coverage, figure, index, notebooks, artefact, releases)
    write = {part.__name__: part for part in parts}
    return BLOCK.sub(lambda block: f"{block[1]}{write[block[2]](block[3], page.parent).strip()}\n<!-- end -->", text)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(rendered(page), encoding="utf-8")
