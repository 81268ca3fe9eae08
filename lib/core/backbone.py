"""Load a causal language model and find its parts by structure, not by class name.

A `Backbone` is what the rest of the package works on: the model, its tokenizer, its decoder blocks, its final norm and
its unembedding. Nothing in it is specific to one architecture. `load_backbone` checks by two short forward passes
that the parts it found behave as the package assumes (blocks in order, causal attention, final norm at the end), so
that an unsupported architecture is refused when it is loaded and not measured wrongly later.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from lib.core.bundled import BUNDLED, DEFAULT_MODEL, load_bundled
from lib.core.devices import DTYPES, choose_dtype, device_name
from lib.core.forward import block_input, check_finite, safe_float16

# What the families of causal language models call the norm between the last block and the unembedding.
FINAL_NORM_NAMES = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "norm_f", "layer_norm", "embedding_norm")


class UnsupportedModelError(ValueError):
    """The model has no structure that this package can work with; the message says what is missing."""


class ModelNotFoundError(OSError):
    """The model is in no place we can reach; the message says how to get it there."""


@dataclass
class Backbone:
    """A causal language model and its parts. Build one with `load_backbone` or `Backbone.from_model`.

    Layer numbering is Hugging Face's: state 0 is the embedding output, state n the output of block n - 1 (0-based),
    and state `num_layers` is the last block's output *after the final norm*. All other states are before it.
    `notes` holds remarks for people (why this dtype was chosen); nothing in it decides an embedding.
    """

    model: PreTrainedModel
    tokenizer: object
    layers: nn.ModuleList
    final_norm: nn.Module | None
    unembedding: nn.Module
    name: str
    revision: str
    notes: dict[str, str] = field(default_factory=dict)

    @classmethod
    def from_model(cls, model, tokenizer, name: str = "in-memory", revision: str = "unknown", notes=None) -> Backbone:
        """Wrap a loaded `AutoModelForCausalLM` model. Raises `UnsupportedModelError` if its structure is not usable."""
        if getattr(model.config, "is_encoder_decoder", False):
            raise UnsupportedModelError(f"{name} is an encoder-decoder model; Token Prepending needs a decoder-only one.")
        if not hasattr(model, "base_model") or model.get_output_embeddings() is None:
            raise UnsupportedModelError(f"{name} has no language-model head; load it with AutoModelForCausalLM.")
        model.eval().requires_grad_(False)
        for module in model.modules() if model.dtype == torch.float16 else ():
            if isinstance(module, nn.LayerNorm):
                module.float()  # it norms a float32 sum, see `safe_float16`
        layers, parent = find_blocks(model)
        norm = next((getattr(parent, n) for n in FINAL_NORM_NAMES if getattr(parent, n, None) is not None), None)
        backbone = cls(model, tokenizer, layers, norm, model.get_output_embeddings(), name, revision, notes or {})
        check_backbone(backbone)
        return backbone

    @property
    def base(self) -> nn.Module:
        """The model without its unembedding."""
        return self.model.base_model

    @property
    def embeddings(self) -> nn.Module:
        """The token embedding module."""
        return self.model.get_input_embeddings()

    @property
    def title(self) -> str:
        """The model's name for captions, with the quantisation of a bundled model's weights."""
        return BUNDLED[self.name].title if self.name in BUNDLED else self.name

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def hidden_size(self) -> int:
        return self.embeddings.weight.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.embeddings.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where token ids go. Weights that accelerate keeps elsewhere (device `meta`) come to their hook's device to run."""
        device = self.embeddings.weight.device
        return torch.device(self.embeddings._hf_hook.execution_device) if device.type == "meta" else device

    @property
    def max_length(self) -> int:
        """Longest input in tokens: the positions that the model was trained for (4096 where it does not say)."""
        text_config = self.model.config.get_text_config()
        lengths = (getattr(text_config, key, None) for key in ("max_position_embeddings", "n_positions", "seq_length"))
        return next((n for n in lengths if n), 4096)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (first 16 hex digits) of name, revision, dtype, the ids of a probe text and a sample of every parameter.

        The sample makes two models of one name with other weights (a fine-tuned folder, a random model) differ.
        """
        probe = self.tokenizer("A probe: \"caf\u00e9\", 12 o'clock.")["input_ids"]
        digest = hashlib.sha256(repr((self.name, self.revision, str(self.dtype), probe)).encode())
        for key, tensor in self.model.state_dict().items():
            flat = tensor.detach().reshape(-1)
            sample = flat[:: max(1, flat.numel() // 64)][:64]
            digest.update(f"{key}{tuple(tensor.shape)}".encode())
            if sample.device.type != "meta":
                digest.update(sample.float().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def layer_index(self, layer: int) -> int:
        """Turn `layer` (-1 means the last) into 0..num_layers. Raises `ValueError` if there is no such state."""
        index = layer + self.num_layers + 1 if layer < 0 else layer
        if not 0 <= index <= self.num_layers:
            raise ValueError(f"Layer {layer} does not exist: {self.name} has states 0..{self.num_layers} (or -1).")
        return index

    def describe(self) -> dict:
        """What decides an embedding made with this model, for provenance and fingerprints."""
        spread = getattr(self.model, "hf_device_map", None)
        return {
            "model": self.name,
            "model_revision": self.revision,
            "model_fingerprint": self.fingerprint,
            "quantisation": BUNDLED[self.name].quantisation if self.name in BUNDLED else "none",
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": device_name(self.device),
            "attention": self.model.config._attn_implementation,
            **({"device_map": sorted(set(map(str, spread.values())))} if spread else {}),
        }


def load_backbone(
    name: str = DEFAULT_MODEL, dtype: str = "auto", device: str = "auto", device_map=None, *, trust_remote_code: bool = False
) -> Backbone:
    """Load a causal language model for reading its hidden states.

    Args:
        name: a bundled model (`"smollm2"`, see `lib.core.bundled.BUNDLED`), a hub id or a local folder.
        dtype: `"auto"` (see `choose_dtype`), `"float32"`, `"bfloat16"` or `"float16"`.
        device: `"auto"` (CUDA where there is one, of several processes each its own; else CPU) or a torch device string.
        device_map: handed to `from_pretrained` (`"auto"` spreads a large model); then `device` must stay `"auto"`.
        trust_remote_code: run Python code that comes with the model. Without it, such a model is refused.

    Raises:
        ModelNotFoundError: the model is not installed, not downloaded and the hub does not answer, or it is gated.
        UnsupportedModelError: it is not a decoder-only model with causal attention.
    """
    if dtype not in ("auto", *DTYPES):
        raise ValueError(f"Unknown dtype {dtype!r}; choose from auto, {', '.join(DTYPES)}.")
    if device_map is not None and device != "auto":
        raise ValueError("Give either device or device_map, not both.")
    own = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    target = torch.device(own if device == "auto" else device)
    chosen, reason = choose_dtype(target) if dtype == "auto" else (DTYPES[dtype], "asked for")
    if name in BUNDLED:
        try:
            model, tokenizer, revision = load_bundled(name, chosen)
        except ModuleNotFoundError as error:
            raise ModelNotFoundError(
                f"The bundled model {name!r} cannot be loaded: {error}. Run ./run_all.sh once, which installs it, or:\n"
                f"    {BUNDLED[name].command}"
            ) from error
    else:
        model, tokenizer, revision = _load_pretrained(name, chosen, device_map, trust_remote_code)
    if device_map is None:
        model = model.to(target)
    return Backbone.from_model(model, tokenizer, name, revision, {"dtype_reason": reason})


def find_blocks(model: nn.Module) -> tuple[nn.ModuleList, nn.Module]:
    """The decoder blocks and the module that holds them: the only `ModuleList` as long as the config says.

    Raises `UnsupportedModelError` on none or several candidates (a vision-language model can have two).
    """
    count = model.config.get_text_config().num_hidden_layers
    modules = dict(model.named_modules())
    found = [n for n, m in modules.items() if isinstance(m, nn.ModuleList) and len(m) == count and _is_top_list(n, modules)]
    if len(found) != 1:
        raise UnsupportedModelError(
            f"Expected one list of {count} decoder blocks in {type(model).__name__}, found {found or 'none'}."
        )
    return modules[found[0]], modules[found[0].rpartition(".")[0]]


def _is_top_list(name: str, modules: dict[str, nn.Module]) -> bool:
    """False for a list inside a block (the experts of a mixture), which may happen to have the same length."""
    parts = name.split(".")
    return not any(isinstance(modules[".".join(parts[:i])], nn.ModuleList) for i in range(1, len(parts)))


@torch.inference_mode()
def check_backbone(backbone: Backbone) -> None:
    """Run four tokens twice and check what the package relies on. Raises `UnsupportedModelError`.

    Each block is called once and in order on a (batch, tokens, hidden) tensor; the final norm turns the last block's
    output into the model's; changing the last token changes no earlier state (causal attention).
    """
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9]], device=backbone.device) % backbone.embeddings.weight.shape[0]
    order, after = [], {}

    def before_block(index):
        def hook(_, args, kwargs):
            order.append((index, tuple(block_input(args, kwargs).shape[:2])))
        return hook

    def after_last_block(_, args, output):
        after["last"] = output[0] if isinstance(output, tuple) else output

    handles = [b.register_forward_pre_hook(before_block(i), with_kwargs=True) for i, b in enumerate(backbone.layers)]
    handles.append(backbone.layers[-1].register_forward_hook(after_last_block))
    try:
        with safe_float16(backbone.layers[0], backbone.device, backbone.dtype):
            output = backbone.base(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    final = getattr(output, "last_hidden_state", None)
    if final is None:
        raise UnsupportedModelError(f"{backbone.name} without its head gives {type(output).__name__}, which has no states.")
    check_finite(final, backbone.name, backbone.dtype)
    if order != [(i, (2, 4)) for i in range(backbone.num_layers)]:
        raise UnsupportedModelError(f"The blocks of {backbone.name} do not run once each, in order: {order[:8]}.")
    if backbone.final_norm is not None:
        normed = backbone.final_norm(after["last"]).float().to(final.device)
        if normed.shape == final.shape and not torch.allclose(normed, final.float(), rtol=1e-2, atol=1e-2):
            raise UnsupportedModelError(f"What was found as the final norm of {backbone.name} is not its last step.")
    change = (final[0, :3] - final[1, :3]).float().norm() / final[0, :3].float().norm()
    if change > 0.05:
        raise UnsupportedModelError(
            f"{backbone.name} is not causal: another last token changes the earlier states by {change:.0%}."
        )


def _load_pretrained(name: str, dtype: torch.dtype, device_map, trust: bool):
    """A hub id or a local folder, and the commit it was loaded from. An old `.bin` is read by torch's weights-only loader."""
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust)
        if config.is_encoder_decoder:
            raise UnsupportedModelError(f"{name} is an encoder-decoder model; Token Prepending needs a decoder-only one.")
        options = {"attn_implementation": "eager"} if getattr(config.get_text_config(), "attn_logit_softcapping", None) else {}
        options |= {"device_map": device_map, "trust_remote_code": trust, "weights_only": True}
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **options)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust)
    except UnsupportedModelError:
        raise
    except (OSError, ValueError) as error:
        raise ModelNotFoundError(
            f"Cannot load {name!r}: {error}\n"
            "If it is a hub id: check the spelling and the network; a gated model (Llama, Gemma) needs its licence accepted "
            "on its page and `huggingface-cli login`. If it is a folder: it must hold config.json, tokenizer and weights. "
            f"Without a network use {DEFAULT_MODEL!r}."
        ) from error
    return model, tokenizer, getattr(config, "_commit_hash", None) or "local folder"
