"""Prompts that make a language model summarise a sentence, from `prompts.yaml`, and how sentences are cleaned."""

from dataclasses import dataclass
from pathlib import Path

import yaml

SENTENCE = "{sentence}"
PLACEHOLDER = "<PST>"
PLACES = ("before_quote", "start", "in_quote", "after_text")  # where placeholders can stand


def clean_sentence(sentence: str) -> str:
    """The papers' cleaning (official code, `evaluate.py`): join the words by single spaces; add `.` unless one of
    `. ? " '` ends them; turn `"` into `'`; turn a final `?` into `.`. An empty sentence stays empty."""
    text = " ".join(sentence.split())
    if text and text[-1] not in ".?\"'":
        text += "."
    text = text.replace('"', "'")
    return text[:-1] + "." if text.endswith("?") else text


@dataclass(frozen=True)
class Prompt:
    """One way to put a sentence before a model. Raises `TypeError` for a string in place of a tuple, `ValueError` for a
    template without `{sentence}` or none.

    Args:
        templates: each holds `{sentence}`; the embeddings of several templates are averaged.
        pooling: how the embedding is read unless the encoder says otherwise, the name of a `lib.core.pooling.Pooling`.
        clean: whether the papers' sentence cleaning is applied first. source: where the prompt comes from.
        before, after: tokens put around every prompt as ids, so that they never melt into the text's own tokens."""

    name: str
    templates: tuple[str, ...]
    pooling: str = "last"
    clean: bool = True
    source: str = ""
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()

    def __post_init__(self):
        lists = self.templates, self.before, self.after
        if any(isinstance(given, str) or not all(isinstance(text, str) for text in given) for given in lists):
            raise TypeError(f"Prompt {self.name!r}: templates, before and after are tuples of strings; got {lists}.")
        if not self.templates or not all(SENTENCE in template for template in self.templates):
            raise ValueError(f"Prompt {self.name!r} needs a template, with {SENTENCE} in each; got {self.templates}.")

    def prepare(self, sentence: str) -> str:
        """The sentence as it enters the template."""
        return clean_sentence(sentence) if self.clean else sentence

    def with_placeholder(self, place: str, count: int = 1) -> tuple[str, ...]:
        """The templates with `count` placeholders at `place`, one of `PLACES`. One that holds `<PST>` is left alone;
        `ValueError` if a `count` above 1 is not how many it holds."""
        marks, placeholder = f'"{SENTENCE}"', PLACEHOLDER * count
        beside = {"in_quote": f"{placeholder} {SENTENCE}", "after_text": f"{SENTENCE} {placeholder}"}

        def insert(template: str) -> str:  # which may have no quotation marks around its sentence
            text = template if place == "start" else marks if marks in template else SENTENCE
            new = text.replace(SENTENCE, beside[place]) if place in beside else f"{placeholder} {text}"
            return template.replace(text, new)

        held = {template.count(PLACEHOLDER) for template in self.templates} - {0}
        if count > 1 and held - {count}:
            raise ValueError(f"Prompt {self.name!r} holds {max(held)} {PLACEHOLDER} of its own, so not count={count}.")
        return tuple(text if PLACEHOLDER in text else insert(text) for text in self.templates)


_ENTRIES = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
PROMPTS = {entry["name"]: Prompt(**entry | {"templates": tuple(entry["templates"])}) for entry in _ENTRIES}


def get_prompt(prompt: str | Prompt) -> Prompt:
    """A prompt by its name in `PROMPTS`; a `Prompt` passes through. Raises `ValueError`, listing the names."""
    if isinstance(prompt, Prompt):
        return prompt
    if prompt not in PROMPTS:
        raise ValueError(f"Unknown prompt {prompt!r}; choose from {', '.join(PROMPTS)} or pass a Prompt.")
    return PROMPTS[prompt]
