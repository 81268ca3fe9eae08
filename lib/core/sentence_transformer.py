"""Any encoder as a sentence-transformers model, `SentenceTransformer(modules=[TrainingFree(encoder)])`."""

from dataclasses import asdict
from pathlib import Path
from pkgutil import resolve_name

from sentence_transformers.sentence_transformer.modules import InputModule

from lib.core.backbone import load_backbone
from lib.core.encoder import SentenceEncoder
from lib.core.postprocess import Postprocess, load_postprocess

POSTPROCESS, OWN = "postprocess.npz", "lib."
OPTIONS = ("exit_layer", "max_length", "batch_size", "share_prefix")


class TrainingFree(InputModule):
    """The one module of a `SentenceTransformer`, which does all that the encoder does, method and postprocess included.
    `save_pretrained` writes settings and postprocess; the weights are loaded again by the model's name and revision."""

    config_file_name = "training_free.json"

    def __init__(self, encoder: SentenceEncoder):
        super().__init__()
        self.encoder, self.model = encoder, encoder.backbone.model  # as a submodule, so that `to` moves it
        self.tokenizer, self.max_seq_length = encoder.backbone.tokenizer, encoder.max_length

    def preprocess(self, inputs, prompt: str | None = None, **_) -> dict:
        """Texts stay texts, after a prompt of sentence-transformers: the encoder puts both inside its own prompt."""
        return {"texts": [f"{prompt or ''}{text}" for text in inputs]}

    def forward(self, features: dict, **_) -> dict:
        """Adds `sentence_embedding`, float32 (texts, hidden), on the model's device."""
        states = self.encoder.encode(features["texts"], show_progress_bar=False, convert_to_numpy=False)
        return features | {"sentence_embedding": states.to(self.encoder.backbone.device)}

    def get_embedding_dimension(self) -> int:
        """How long an embedding is; EmbedFilter makes it shorter than the hidden size."""
        return len(self.encoder.encode("A text."))

    def __reduce__(self):  # to another process, which loads the model itself
        return from_settings, (self.get_config_dict(), self.encoder.postprocess)

    def get_config_dict(self) -> dict:
        """All but the postprocess, as plain data. `ValueError` for a method or pooling of one's own."""
        encoder, backbone = self.encoder, self.encoder.backbone
        parts = {"prompt": encoder.prompt, "method": encoder.method, "pooling": encoder.pooling}
        kinds = {name: f"{type(part).__module__}:{type(part).__name__}" for name, part in parts.items() if part}
        if own := [kind for kind in kinds.values() if not kind.startswith(OWN)]:
            raise ValueError(f"{own[0]} is not of this package, so that it cannot be saved.")
        settings = {"model": backbone.name, "revision": backbone.revision, "dtype": str(backbone.dtype).split(".")[1]}
        settings |= {name: getattr(encoder, name) for name in OPTIONS}
        return settings | {"parts": {name: [kind, asdict(parts[name])] for name, kind in kinds.items()}}

    def save(self, output_path: str, *_, **__) -> None:
        """Write what `load` needs to a folder."""
        self.save_config(output_path)
        if self.encoder.postprocess:
            self.encoder.postprocess.save(Path(output_path) / POSTPROCESS)

    @classmethod
    def load(cls, model_name_or_path: str, **options) -> "TrainingFree":
        """What `save` wrote, in a folder or on the hub."""
        where = {key: options[key] for key in ("token", "cache_folder", "revision", "local_files_only")}
        fitted = cls.load_file_path(model_name_or_path, POSTPROCESS, **where)
        return from_settings(cls.load_config(model_name_or_path, **where), fitted and load_postprocess(fitted))


def from_settings(settings: dict, postprocess: Postprocess | None) -> TrainingFree:
    """Made anew, on the model that the settings name. `ValueError` for another revision of it and for foreign code."""
    model, dtype, revision, parts = (settings[key] for key in ("model", "dtype", "revision", "parts"))
    backbone, choices = load_backbone(model, dtype), {key: settings[key] for key in OPTIONS}
    if backbone.revision != revision:
        raise ValueError(f"{model} is {backbone.revision} here; this was saved with {revision}.")
    for name, (kind, fields) in parts.items():
        if not kind.startswith(OWN):
            raise ValueError(f"The settings ask for {kind}, which is not of this package.")
        fields = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
        choices[name] = resolve_name(kind)(**fields)
    return TrainingFree(SentenceEncoder(backbone, postprocess=postprocess, **choices))
