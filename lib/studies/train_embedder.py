"""The embedder `smollm2-eol-cse`, trained here: a LoRA on SmolLM2-135M-Instruct, trained contrastively on paraphrases.
As PromptEOL-CSE (arXiv 2307.16645): PromptEOL's last state, InfoNCE over cosines with the batch's other pairs as
negatives. The pairs, the LoRA's size and its place, upper blocks alone, where the backward pass can end, are ours."""

import copy
import re
import time
import warnings
from collections import namedtuple
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import yaml
from huggingface_hub.utils import WeakFileLock
from peft import LoraConfig, PeftModel, get_peft_model
from scipy.cluster.hierarchy import DisjointSet
from torch.nn.functional import cross_entropy, normalize
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from lib.core.adapters import around_peft, read_adapter, save_adapter
from lib.core.backbone import Backbone, load_backbone
from lib.core.code_version import code_version
from lib.core.hardware import choose_dtype, token_batches
from lib.core.pooling import last_state
from lib.core.prompts import get_prompt
from lib.core.store import CACHE, fingerprint
from lib.core.tokens import PromptTokenizer, TokenRows
from lib.data.sources import SampleDataWarning, find_source
from lib.data.sts import load_sts
from lib.data.transfer import TRANSFER_TASKS, load_transfer

PARTS = yaml.safe_load(Path(__file__).with_name("training_parts.yaml").read_text(encoding="utf-8"))
FATES = ("in_evaluation", "equal", "repeated", "kept")
# Positive pairs, lists of str; those of one group (int64, one a pair) are never each other's negatives.
Pairs = namedtuple("Pairs", "first second groups provenance")


def positive_pairs() -> Pairs:
    """The training pairs: the positive ones of `PARTS` without the sentences held out there, of the sample with a
    `SampleDataWarning`. Mostly MRPC's are left: STS-B's are from STS12-16, and SICK-R's are in its test part."""
    source = find_source()
    if source.is_sample:
        text = "The pairs to train on come from sample data; what is trained on them compares with nothing."
        warnings.warn(text, SampleDataWarning, stacklevel=2)
    pairs, held_out, provenance = {}, [], []
    for task, split, positive, held in PARTS["sample" if source.is_sample else "real"]:
        data = load_transfer(task, source) if task in TRANSFER_TASKS else load_sts(task, split, source)
        chosen, kept_back = (data.to_pandas().query(rows)[["sentence1", "sentence2"]] for rows in (positive, held))
        pairs |= {f"{task} {split}": chosen.to_numpy().tolist()} if positive != PARTS["none"] else {}
        held_out += kept_back.to_numpy().ravel().tolist()
        provenance.append(data.provenance)
    return make_pairs(pairs, held_out, provenance)


def make_pairs(positives: dict[str, Sequence], evaluation: Sequence[str], data: Sequence[dict] = ()) -> Pairs:
    """The pairs without those that hold a sentence of `evaluation`, two equal sentences or are repeated, by their words
    alone, in any case. Pairs that share sentences, in a chain too, are of one group. The provenance counts the pairs by
    the keys of `positives` and holds `data`. `ValueError` if no pair is left."""
    def normalised(text: str) -> str:
        return " ".join(re.findall(r"\w+", text.lower()))

    rows = [(name, *pair) for name, pairs in positives.items() for pair in pairs]
    table = pd.DataFrame(rows, columns=["origin", "first", "second"])
    words = table[["first", "second"]].map(normalised)
    reasons = [words.isin(set(map(normalised, evaluation))).any(axis=1), words["first"] == words["second"],
               words.apply(frozenset, axis=1).duplicated()]
    fate = pd.Series(np.select(reasons, FATES[:3], FATES[3]))
    counts = pd.crosstab(table["origin"], fate).reindex(index=list(positives), columns=list(FATES), fill_value=0)
    counts.insert(0, "positive", counts.sum(axis=1))
    table, words = table[fate == "kept"], words[fate == "kept"]
    if table.empty:
        raise ValueError(f"No positive pair is left to train on: {counts.to_dict('index')}.")
    linked = DisjointSet(words.to_numpy().ravel())
    for pair in words.to_numpy():
        linked.merge(*pair)
    groups, _ = pd.factorize(words["first"].map(linked.__getitem__))
    about = {"pairs": counts.to_dict("index"), "data": list(data)}
    return Pairs(table["first"].tolist(), table["second"].tolist(), groups, about)


@dataclass(frozen=True)
class Training:
    """All that decides an adapter besides backbone, data and code. `alpha`, `rank`, `targets` are those of the LoRA."""

    prompt: str = "prompteol"
    steps: int = 60
    sample_steps: int = 4  # on sample data
    pairs: int = 32  # in the batch of a step
    tokens: int = 96  # of the longest prompt, beyond which its sentence is cut
    learning_rate: float = 5e-4  # AdamW's highest, after a tenth of the steps; from there it falls to 0 on a line
    temperature: float = 0.05
    first_block: int = 20  # 0-based, from which on the blocks have a LoRA
    rank: int = 16
    alpha: int = 32
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    seed: int = 3407


def info_nce(first: torch.Tensor, second: torch.Tensor, groups: torch.Tensor, temperature: float) -> torch.Tensor:
    """Mean over rows i of -log(exp(s_ii / t) / sum_j exp(s_ij / t)), s the cosines of `first`, `second` (rows, hidden).
    Of the rows j of the same group as i (int64, rows), only i itself is in the sum."""
    scores = normalize(first.float(), dim=1) @ normalize(second.float(), dim=1).T / temperature
    scores = scores.masked_fill((groups[:, None] == groups).fill_diagonal_(False), -torch.inf)
    return cross_entropy(scores, torch.arange(len(groups), device=scores.device))


def batches(count: int, size: int, steps: int, seed: int) -> list[np.ndarray]:
    """Row numbers of each batch: all rows in a new order every round, and never a row twice in a batch."""
    generator, size = np.random.default_rng(seed), min(size, count)
    order = np.concatenate([generator.permutation(count) for _ in range(-(-steps * size // count))])
    return [np.unique(order[i * size : (i + 1) * size]) for i in range(steps)]


def train(backbone: Backbone, pairs: Pairs, config: Training, folder: Path) -> dict:
    """Train a LoRA on a copy of `backbone`, save it to `folder`, and return its provenance, with each step's loss."""
    begin, device, steps, rise = time.perf_counter(), backbone.device, config.steps, max(1, config.steps // 10)
    lora = LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=list(config.targets),
                      layers_to_transform=list(range(config.first_block, backbone.num_layers)))
    with around_peft(device):
        torch.manual_seed(config.seed)
        model = get_peft_model(copy.deepcopy(backbone.model), lora)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=0.0)
    schedule = LambdaLR(optimizer, lambda k: min((k + 1) / rise, (steps - k) / max(1, steps - rise)))
    prompt, tokenize = get_prompt(config.prompt), PromptTokenizer(backbone.tokenizer, config.tokens)
    sides = [tokenize(prompt.templates[0], list(map(prompt.prepare, side))) for side in (pairs.first, pairs.second)]
    bar, losses = tqdm(batches(len(pairs.groups), config.pairs, steps, config.seed), desc="training", unit="step"), []
    for batch in bar:
        with torch.autocast(device.type, torch.bfloat16, enabled=backbone.dtype == torch.bfloat16):
            embedded = [_embed(model, replace(side, prefix=0), batch, device) for side in sides]
        loss = info_nce(*embedded, torch.from_numpy(pairs.groups[batch]).to(device), config.temperature)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(round(loss.item(), 5))
        bar.set_postfix(loss=f"{losses[-1]:.3f}")
    about = {"config": asdict(config), **pairs.provenance, "backbone": backbone.describe(), "losses": losses}
    about |= {"code": code_version(__name__), "seconds": round(time.perf_counter() - begin, 1)}
    return save_adapter(model, folder, about)


def _embed(model: PeftModel, rows: TokenRows, chosen: np.ndarray, device: torch.device) -> torch.Tensor:
    """The last tokens' states after the final norm, (chosen, hidden), computed in parts of similar length."""
    states, parts = [], token_batches([len(rows.ids[i]) for i in chosen], device)
    for batch in (rows.batch(chosen[part], device) for part in parts):
        output = model.get_base_model().base_model(input_ids=batch.ids, use_cache=False)
        states.append(last_state(output.last_hidden_state, batch.last))
    return torch.cat(states)[np.argsort(np.concatenate(parts))]


def trained_adapter(backbone: Backbone, fresh_since: float = 0.0, config: Training = Training()) -> Path:
    """The folder of the adapter that is trained on `backbone`: in `data/cache/adapters/` if one of this config, prompt,
    data, backbone and code was trained there since `fresh_since` (seconds of the epoch). Else it is trained, in this
    hardware's fastest dtype but float16, whose loss would have to be scaled; a second process waits for the first."""
    config = replace(config, steps=config.sample_steps) if find_source().is_sample else config
    pairs, dtype = positive_pairs(), str(choose_dtype(backbone.device)[0]).removeprefix("torch.")
    dtype = "float32" if dtype == "float16" else dtype
    choices = [asdict(config), asdict(get_prompt(config.prompt)), pairs.provenance, backbone.name, backbone.revision]
    folder = CACHE / "adapters" / fingerprint([*choices, PARTS, dtype, code_version(__name__)])
    folder.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(folder.with_name(f".{folder.name}.lock")):
        if read_adapter(folder, fresh_since) is None:
            train(load_backbone(backbone.name, dtype, str(backbone.device)), pairs, config, folder)
    return folder
