"""Load a causal language model and find its parts by structure, not by class name. A short forward pass checks that
they behave as the package assumes; what does not is refused."""

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from numbers import Integral
from pathlib import Path

import torch
import transformers
from torch import nn

from lib.core.bundled import BUNDLED, DEFAULT_MODEL, ModelNotFoundError, load_bundled
from lib.core.forward import UnsupportedModelError, check_finite, read_states, returned_tensor
from lib.core.hardware import choose, device_name

# Without attention, and their `hidden_states` begin after the first block: a layer would be another than elsewhere.
COUNTED_OTHERWISE = ("mamba", "mamba2", "falcon_mamba", "rwkv")
# What the families of causal language models call the unembedding, and the norm between it and the last block.
HEADS = ("lm_head.", "embed_out.")
FINAL_NORM_NAMES = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "norm_f", "layer_norm", "embedding_norm")


@dataclass
class Backbone:
    """A causal language model and its parts. Build one with `load_backbone` or `Backbone.from_model`.

    Layer numbering is Hugging Face's: state 0 is the embedding output, state n the output of block n - 1 (0-based),
    and state `num_layers` is the last block's output *after the final norm*. All other states are before it.

    Attributes:
        base: the model without its unembedding. embeddings: its token embedding module.
        embed_scale: by which some families (Gemma) multiply the rows of their embedding matrix.
        layers: its `num_layers` decoder blocks. final_norm: what follows them, or None. hidden_size, dtype: of states.
        max_length: tokens that it was trained for (4096 where it does not say), with LongRoPE at first: beyond it, one
            long row changes the positions of its whole batch.
        title: the name for captions, with the quantisation of bundled weights. notes: for people, such as why this
            dtype was chosen; they decide no embedding."""

    model: transformers.PreTrainedModel
    tokenizer: object
    unembedding: nn.Module
    name: str
    revision: str
    notes: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        self.layers, parent = find_blocks(self.model.eval().requires_grad_(False))
        self.base, self.embeddings = self.model.base_model, self.model.get_input_embeddings()
        self.final_norm = next(filter(None, (getattr(parent, name, None) for name in FINAL_NORM_NAMES)), None)
        if self.model.dtype == torch.float16:  # LayerNorms norm a float32 sum, see `safe_float16`
            for norm in filter(lambda module: isinstance(module, nn.LayerNorm), self.base.modules()):
                norm.float()
        self.num_layers, self.hidden_size = len(self.layers), self.embeddings.weight.shape[1]
        self.dtype, self.embed_scale = self.embeddings.weight.dtype, float(getattr(self.embeddings, "embed_scale", 1.0))
        config, keys = self.model.config.get_text_config(), ("max_position_embeddings", "n_positions", "seq_length")
        rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
        keys = ("original_max_position_embeddings", *keys) if "longrope" in rope.values() else keys
        limits = (getattr(config, key, None) or rope.get(key) for key in keys)
        self.max_length = next(filter(None, limits), 4096)
        self.title = BUNDLED[self.name].title if self.name in BUNDLED else self.name

    @classmethod
    def from_model(cls, model, tokenizer, name: str = "in-memory", revision: str = "unknown", notes=None) -> "Backbone":
        """Wrap a loaded `AutoModelForCausalLM` model. Raises `UnsupportedModelError` if its structure is not usable."""
        _refuse(model.config, name)
        if not hasattr(model, "base_model") or model.get_output_embeddings() is None:
            raise UnsupportedModelError(f"{name} has no language-model head; load it with AutoModelForCausalLM.")
        backbone = cls(model, tokenizer, model.get_output_embeddings(), name, revision, notes or {})
        check_backbone(backbone)
        return backbone

    @property
    def device(self) -> torch.device:
        """Where token ids go. Weights that accelerate keeps elsewhere (on `meta`) come to their hook's device."""
        device = self.embeddings.weight.device
        return torch.device(self.embeddings._hf_hook.execution_device) if device.type == "meta" else device

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (first 16 hex digits) of name, revision, dtype, a probe text's ids and a sample of all weights."""
        probe = self.tokenizer("A probe: \"caf\u00e9\", 12 o'clock.")["input_ids"]
        digest = hashlib.sha256(repr((self.name, self.revision, str(self.dtype), probe)).encode())
        for key, tensor in self.model.state_dict().items():
            digest.update(f"{key}{tuple(tensor.shape)}".encode())
            if tensor.device.type != "meta":
                sample = tensor.detach().reshape(-1)[:: max(1, tensor.numel() // 64)][:64]
                digest.update(sample.float().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def layer_index(self, layer: int) -> int:
        """Turn `layer` (-1 means the last) into 0..num_layers. Raises `ValueError` if there is no such state."""
        if not isinstance(layer, Integral):
            raise ValueError(f"A layer is a whole number, 0..{self.num_layers} or -1 for the last; got {layer!r}.")
        index = layer + self.num_layers + 1 if layer < 0 else layer
        if not 0 <= index <= self.num_layers:
            raise ValueError(f"Layer {layer} does not exist: {self.name} has states 0..{self.num_layers} (or -1).")
        return index

    def describe(self) -> dict:
        """What decides an embedding made with this model, for provenance and fingerprints."""
        spread = getattr(self.model, "hf_device_map", None)
        return {
            "model": self.name, "model_revision": self.revision, "model_fingerprint": self.fingerprint,
            "quantisation": BUNDLED[self.name].quantisation if self.name in BUNDLED else "none",
            "dtype": str(self.dtype).removeprefix("torch."), "device": device_name(self.device),
            "attention": self.model.config._attn_implementation,
        } | ({"device_map": sorted(set(map(str, spread.values())))} if spread else {})


def load_backbone(name: str = DEFAULT_MODEL, dtype: str = "auto", device: str = "auto", device_map=None, *,
                  trust_remote_code=False, head=True) -> Backbone:
    """Load a causal language model for reading its hidden states. Raises `ModelNotFoundError` for one that is neither
    here nor on the hub, and `UnsupportedModelError` for one that lacks weights or is not decoder-only and causal.

    Args:
        name: a bundled model (`"smollm2"`, see `lib.core.bundled.BUNDLED`), a hub id or a local folder (`~` is yours).
        dtype, device: names in torch, such as `"float16"` and `"cuda:1"`, or `"auto"` (`lib.core.hardware.choose`).
        device_map: handed to `from_pretrained` (`"auto"` spreads a large model); then `device` must stay `"auto"`.
        trust_remote_code: run Python code that comes with the model. If false, such a model is refused.
        head: whether the checkpoint must hold the unembedding; without one, that is random."""
    chosen, target, reason = choose(dtype, device)
    if device_map is not None and device != "auto":
        raise ValueError("Give either device or device_map, not both.")
    if name in BUNDLED:
        model, tokenizer, revision = load_bundled(name, chosen)
    else:
        name = str(Path(name).expanduser()) if name.startswith("~") else name
        model, tokenizer, revision = _load_pretrained(name, chosen, device_map, trust_remote_code, head)
    model = model.to(target) if device_map is None else model
    return Backbone.from_model(model, tokenizer, name, revision, {"dtype_reason": reason})


def _load_pretrained(name: str, dtype: torch.dtype, device_map, trust: bool, head: bool) -> tuple:
    """As `read_checkpoint`, for a causal language model, with an error that says what to do."""
    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=trust)
        _refuse(config, name)
        caps = getattr(config.get_text_config(), "attn_logit_softcapping", None)
        options = {"device_map": device_map} | ({"attn_implementation": "eager"} if caps else {})
        return read_checkpoint("AutoModelForCausalLM", name, dtype, () if head else HEADS, trust, **options)
    except UnsupportedModelError:
        raise
    except (OSError, ValueError) as error:
        raise ModelNotFoundError(
            f"Cannot load {name!r}: {error}\nOf a hub id, check the spelling and the network; a gated model (Llama, "
            "Gemma) needs its licence accepted on its page and `huggingface-cli login`. A folder holds config.json, "
            f"tokenizer and weights. Without a network use {DEFAULT_MODEL!r}.") from error


def read_checkpoint(loader: str, name: str, dtype: torch.dtype, unused: tuple = (), trust=False, **options) -> tuple:
    """Model, tokenizer and revision of a hub id or a folder, by a class of Transformers; its code runs only on `trust`.
    Raises `UnsupportedModelError` if weights are missing, but for those whose names begin with one of `unused`."""
    options |= {"dtype": dtype, "trust_remote_code": trust, "weights_only": True, "output_loading_info": True}
    model, info = getattr(transformers, loader).from_pretrained(name, **options)
    tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=trust)
    if missing := sorted(key for key in info["missing_keys"] if not key.startswith(unused)):
        kind, found = type(model).__name__, f"; it has {min(info['unexpected_keys'], default='no others')}"
        raise UnsupportedModelError(f"{name} lacks {len(missing)} weights of {kind}, such as {missing[0]}{found}.")
    return model, tokenizer, getattr(model.config, "_commit_hash", None) or "local folder"


def _refuse(config, name: str) -> None:
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{name} is an encoder-decoder model; Token Prepending needs a decoder-only one.")
    if config.model_type in COUNTED_OTHERWISE:
        raise UnsupportedModelError(f"{name}: the hidden_states of {config.model_type} begin after the first block.")


def find_blocks(model: nn.Module) -> tuple[nn.ModuleList, nn.Module]:
    """The decoder blocks and the module that holds them: the only `ModuleList` as long as the config says, but for
    lists inside a list (a block's experts). Raises `UnsupportedModelError` on none or several candidates."""
    depth = model.config.get_text_config().num_hidden_layers
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    found = [name for name in outer if len(lists[name]) == depth]
    if len(found) != 1:
        kind = type(model).__name__
        raise UnsupportedModelError(f"Expected one list of {depth} decoder blocks in {kind}, found {found or 'none'}.")
    return lists[found[0]], model.get_submodule(found[0].rpartition(".")[0])


@torch.inference_mode()
def check_backbone(backbone: Backbone) -> None:
    """Run four tokens twice; `UnsupportedModelError` unless each block is called once and in order on a (batch, tokens,
    hidden) tensor, the final norm turns the last block's output into the model's, and attention is causal."""
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9]], device=backbone.device) % backbone.embeddings.weight.shape[0]
    name, n, calls, outputs = backbone.name, backbone.num_layers, count(), []
    with backbone.layers[-1].register_forward_hook(lambda *call: outputs.append(call[-1])):
        states = read_states(backbone, ids, range(n + 1), lambda state: (next(calls), state))
    final, order = states[n][1], [(call, *state.shape[:2]) for call, state in states.values()]
    check_finite(final, name, backbone.dtype)
    if order != [(call, 2, 4) for call in range(n + 1)]:
        raise UnsupportedModelError(f"The blocks of {name} do not run once each, in order: {order[:8]}.")
    if backbone.final_norm is not None:
        normed = backbone.final_norm(returned_tensor(outputs[-1])).float().to(final.device)
        if normed.shape == final.shape and not torch.allclose(normed, final.float(), rtol=1e-2, atol=1e-2):
            raise UnsupportedModelError(f"What was found as the final norm of {name} is not its last step.")
    change = (final[0, :3] - final[1, :3]).float().norm() / final[0, :3].float().norm()
    if change > 0.05:
        raise UnsupportedModelError(f"{name} is not causal: another last token changes earlier states by {change:.0%}.")
