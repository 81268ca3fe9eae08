"""The embedder made here, `smollm2-eol-cse`: a LoRA on the embedded model, trained contrastively on paraphrase pairs.

As PromptEOL-CSE (arXiv 2307.16645): PromptEOL, the state of the last token after the final norm, InfoNCE over cosines with
temperature 0.05, the other pairs of the batch as negatives. Ours are the pairs (`lib.studies.training_pairs`), the LoRA's size, and
that it sits on the upper blocks only, so that the backward pass ends there.
"""

from __future__ import annotations

import copy
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from huggingface_hub.utils import WeakFileLock
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.functional import cross_entropy, normalize
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from lib.core.adapters import around_peft, merged_backbone, read_adapter, save_adapter
from lib.core.batches import token_batches, token_budget
from lib.data.sts import find_source
from lib.core.devices import choose_dtype
from lib.core.backbone import Backbone, load_backbone
from lib.core.prompts import get_prompt
from lib.core.store import ROOT, code_version, fingerprint
from lib.core.tokens import PromptTokenizer
from lib.studies.training_pairs import Pairs, positive_pairs

NAME = "smollm2-eol-cse"
ADAPTERS = ROOT / "data" / "cache" / "adapters"


@dataclass(frozen=True)
class Training:
    """All that decides an adapter besides backbone, data and code.

    Args:
        steps: how many batches. sample_steps: the same on sample data.
        pairs: in a batch. tokens: the longest prompt, beyond which its sentence is cut.
        learning_rate: AdamW's highest, reached after a tenth of the steps; from there it falls to 0 on a line.
        first_block: the 0-based block from which on the blocks have a LoRA. rank, alpha, targets: of the LoRA.
    """

    prompt: str = "prompteol"
    steps: int = 60
    sample_steps: int = 4
    pairs: int = 32
    tokens: int = 96
    learning_rate: float = 5e-4
    temperature: float = 0.05
    first_block: int = 20
    rank: int = 16
    alpha: int = 32
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    seed: int = 3407


def info_nce(first: torch.Tensor, second: torch.Tensor, groups: torch.Tensor, temperature: float) -> torch.Tensor:
    """Mean over rows i of -log(exp(s_ii / t) / sum_j exp(s_ij / t)), s the cosines of `first` and `second` (rows, hidden).

    A row j of the same group as i (int64, rows) is no negative of i and left out of the sum; j = i stays in.
    """
    scores = normalize(first.float(), dim=1) @ normalize(second.float(), dim=1).T / temperature
    own = torch.eye(len(groups), dtype=torch.bool, device=scores.device)
    scores = scores.masked_fill((groups[:, None] == groups[None]) & ~own, -torch.inf)
    return cross_entropy(scores, torch.arange(len(groups), device=scores.device))


def batches(count: int, size: int, steps: int, seed: int) -> list[np.ndarray]:
    """Row numbers of each batch: all rows in a new order every round, and never a row twice in a batch."""
    generator = np.random.default_rng(seed)
    size = min(size, count)
    order = np.concatenate([generator.permutation(count) for _ in range(-(-steps * size // count))])
    return [np.unique(order[i * size : (i + 1) * size]) for i in range(steps)]


def train(backbone: Backbone, pairs: Pairs, config: Training, folder: Path) -> dict:
    """Train a LoRA on a copy of `backbone` and save it to `folder`.

    Returns the provenance: config, pairs and data, backbone, code, seconds, the loss of each step, the adapter's SHA-256.
    """
    begin, device = time.perf_counter(), backbone.device
    lora = LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=list(config.targets),
                      layers_to_transform=list(range(config.first_block, backbone.num_layers)))
    with around_peft(device):
        torch.manual_seed(config.seed)
        model = get_peft_model(copy.deepcopy(backbone.model), lora)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=config.learning_rate, weight_decay=0.0)
    steps, rise = config.steps, max(1, config.steps // 10)
    fall = max(1, steps - rise)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: min((k + 1) / rise, (steps - k) / fall))
    prompt, tokenize = get_prompt(config.prompt), PromptTokenizer(backbone.tokenizer, config.tokens)
    rows = [tokenize(prompt.templates[0], [prompt.prepare(s) for s in side]).ids for side in (pairs.first, pairs.second)]
    losses, bar = [], tqdm(batches(len(pairs.groups), config.pairs, steps, config.seed), desc=NAME, unit="step")
    for batch in bar:
        with torch.autocast(device.type, torch.bfloat16, enabled=backbone.dtype == torch.bfloat16):
            first, second = (_embed(model, [side[i] for i in batch], device) for side in rows)
        loss = info_nce(first, second, torch.from_numpy(pairs.groups[batch]).to(device), config.temperature)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(round(loss.item(), 5))
        bar.set_postfix(loss=f"{losses[-1]:.3f}")
    about = {"config": asdict(config), **pairs.provenance, "backbone": backbone.describe()}
    about |= {"code": code_version("contrastive"), "seconds": round(time.perf_counter() - begin, 1), "losses": losses}
    return save_adapter(model, folder, about)


def _embed(model: PeftModel, ids: list[list[int]], device: torch.device) -> torch.Tensor:
    """The last tokens' states after the final norm, (rows, hidden), computed in parts of similar length."""
    states: dict[int, torch.Tensor] = {}
    for part in token_batches([len(row) for row in ids], token_budget(device)):
        padded = pad_sequence([torch.tensor(ids[i]) for i in part], batch_first=True)
        output = model.get_base_model().base_model(input_ids=padded.to(device), use_cache=False).last_hidden_state
        states |= {i: output[k, len(ids[i]) - 1] for k, i in enumerate(part)}
    return torch.stack([states[i] for i in range(len(ids))])


def smollm2_eol_cse(backbone: Backbone, config: Training = Training()) -> tuple[Backbone, dict]:
    """The trained embedder on `backbone`, and the provenance of its adapter.

    The adapter is read from `data/cache/adapters/` if one of this config, data, backbone and code is there; else it is
    trained, in this hardware's fastest dtype, whatever that of `backbone`. A second process waits for the first.
    """
    config = replace(config, steps=config.sample_steps) if find_source().is_sample else config
    pairs, dtype = positive_pairs(), choose_dtype(backbone.device)[0]
    dtype = "float32" if dtype == torch.float16 else str(dtype).removeprefix("torch.")  # float16 would need a scaled loss
    code = code_version("contrastive", "training_pairs", "prompts", "tokens")
    folder = ADAPTERS / fingerprint([asdict(config), pairs.provenance, backbone.name, backbone.revision, dtype, code])
    ADAPTERS.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(ADAPTERS / f".{folder.name}.lock"):
        about = read_adapter(folder)
        if about is None:
            about = train(load_backbone(backbone.name, dtype, str(backbone.device)), pairs, config, folder)
    return merged_backbone(backbone, folder, NAME), about
