"""Training-free text embeddings from language models: Token Prepending and key tokens.

Six rooms, each importing only from those after it: run, studies, report, evaluation, data, core. For an embedding of
your own, `core` is all that is needed. The names below are imported when first used, so that `import lib` is quick.
"""

from importlib import import_module

_HOMES = {
    "lib.core.backbone": ("Backbone", "ModelNotFoundError", "UnsupportedModelError", "load_backbone"),
    "lib.core.encoder": ("SentenceEncoder",),
    "lib.core.pooling": ("LastToken", "Mean"),
    "lib.core.postprocess": ("ComponentRemoved", "ComponentShifted", "MeanRemoved", "Normalise"),
    "lib.core.prompts": ("PROMPTS", "Prompt"),
    "lib.core.store": ("EmbeddingStore",),
    "lib.core.token_prepending": ("Placement", "TokenPrepending"),
    "lib.core.variants": ("Variant",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'lib' has no attribute {name!r}; it offers {', '.join(__all__)}.")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
