"""Prompt templates that make a language model summarise a sentence, and the sentence cleaning that goes with them.

The templates themselves are data: `prompts.yaml` beside this file, with their sources.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

SENTENCE = "{sentence}"
PLACEHOLDER = "<PST>"

# Where each place of `TokenPrepending(place=...)` puts the placeholder: the first text becomes the second, {p} stands for
# the placeholder. A template without quotation marks around the sentence takes the third in place of the bare sentence.
_INSERTIONS = {
    "before_quote": ('"{sentence}"', '{p} "{sentence}"', "{p} {sentence}"),
    "in_quote": ('"{sentence}"', '"{p} {sentence}"', "{p} {sentence}"),
    "after_text": ('"{sentence}"', '"{sentence} {p}"', "{sentence} {p}"),
}
PLACES = ("before_quote", "start", "in_quote", "after_text")


def clean_sentence(sentence: str) -> str:
    """The papers' cleaning (official code, `evaluate.py`): a full stop at the end, no double quotes, no final `?`.

    Words are joined by single spaces. An empty sentence stays empty. In this order: add `.` unless the last character
    is one of `. ? " '`; turn `"` into `'`; turn a final `?` into `.`.
    """
    text = " ".join(sentence.split())
    if text and text[-1] not in ".?\"'":
        text += "."
    text = text.replace('"', "'")
    return text[:-1] + "." if text.endswith("?") else text


@dataclass(frozen=True)
class Prompt:
    """One way to put a sentence before a model.

    Args:
        name: as in `PROMPTS`.
        templates: each holds `{sentence}`; the embeddings of several templates are averaged.
        pooling: how the embedding is read unless the encoder says otherwise, a name in `lib.core.pooling.POOLINGS`.
        clean: whether the papers' sentence cleaning is applied first.
        source: where the prompt comes from.
        before, after: tokens that are put around every prompt as ids, so that they never melt into the text's own tokens.
    """

    name: str
    templates: tuple[str, ...]
    pooling: str = "last"
    clean: bool = True
    source: str = ""
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()

    def prepare(self, sentence: str) -> str:
        """The sentence as it enters the template."""
        return clean_sentence(sentence) if self.clean else sentence

    def with_placeholder(self, place: str, count: int = 1) -> tuple[str, ...]:
        """The templates with `count` placeholders at `place`, one of `PLACES`.

        A template that holds `<PST>` itself, once or several times, says where its placeholders stand and is left alone.
        """
        return tuple(_insert(template, place, PLACEHOLDER * count) for template in self.templates)


def _insert(template: str, place: str, placeholder: str) -> str:
    if PLACEHOLDER in template:
        return template
    if place == "start":
        return f"{placeholder} {template}"
    quoted, with_placeholder, unquoted = _INSERTIONS[place]
    if quoted in template:
        return template.replace(quoted, with_placeholder.replace("{p}", placeholder))
    return template.replace(SENTENCE, unquoted.replace("{p}", placeholder))


def read_prompts(file: Path) -> dict[str, Prompt]:
    """The prompts of a YAML file, by name; each entry holds the arguments of `Prompt`."""
    entries = yaml.safe_load(file.read_text(encoding="utf-8"))
    return {entry["name"]: Prompt(**entry | {"templates": tuple(entry["templates"])}) for entry in entries}


PROMPTS: dict[str, Prompt] = read_prompts(Path(__file__).with_name("prompts.yaml"))


def get_prompt(prompt: str | Prompt) -> Prompt:
    """A prompt by its name in `PROMPTS`; a `Prompt` passes through. Raises `ValueError`, listing the names."""
    if isinstance(prompt, Prompt):
        return prompt
    if prompt not in PROMPTS:
        raise ValueError(f"Unknown prompt {prompt!r}; choose from {', '.join(PROMPTS)} or pass a Prompt.")
    return PROMPTS[prompt]
