"""Prompt templates that make a language model summarise a sentence, and the sentence cleaning that goes with them.

PromptEOL, Pretended CoT and KE are quoted from the official Token Prepending code; the eight tasks of MetaEOL and the
Echo prompt follow their papers' description in our own wording, so their scores are not those of the original wording.
"""

from __future__ import annotations

from dataclasses import dataclass

SENTENCE = "{sentence}"
PLACEHOLDER = "<PST>"

# Where each place of `TokenPrepending(place=...)` inserts the placeholder: this text -> that text, {p} the placeholder.
_INSERTIONS = {
    "before_quote": ('"{sentence}"', '{p} "{sentence}"'),
    "in_quote": ('"{sentence}"', '"{p} {sentence}"'),
    "after_text": ('"{sentence}"', '"{sentence} {p}"'),
}
_UNQUOTED = {"before_quote": "{p} {sentence}", "in_quote": "{p} {sentence}", "after_text": "{sentence} {p}"}


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
        pooling: how the embedding is read: `"last"` token, `"mean"` or `"weighted_mean"` (weights 1, 2, 3, ...). The
            means run from the first token of the sentence's last occurrence to the end of the prompt; with the bare
            sentence as template, over all its tokens.
        clean: whether the papers' sentence cleaning is applied first.
        source: where the prompt comes from.
    """

    name: str
    templates: tuple[str, ...]
    pooling: str = "last"
    clean: bool = True
    source: str = ""

    def prepare(self, sentence: str) -> str:
        """The sentence as it enters the template."""
        return clean_sentence(sentence) if self.clean else sentence

    def with_placeholder(self, place: str, count: int = 1) -> tuple[str, ...]:
        """The templates with `count` placeholders at `place` (see `lib.core.token_prepending.PLACES`).

        A template that holds `<PST>` itself says where it stands and is left alone.
        """
        placeholder = PLACEHOLDER * count

        def insert(template: str) -> str:
            if PLACEHOLDER in template:
                return template
            if place == "start":
                return f"{placeholder} {template}"
            old, new = _INSERTIONS[place]
            if old in template:
                return template.replace(old, new.replace("{p}", placeholder))
            return template.replace(SENTENCE, _UNQUOTED[place].replace("{p}", placeholder))

        return tuple(insert(template) for template in self.templates)


_EOL = 'this sentence : "{sentence}" means in one word:"'
_PROMPTEOL = "T" + _EOL[1:]
_COT = f"After thinking step by step , {_EOL}"
_KE = (
    "The essence of a sentence is often captured by its main subjects and actions, while descriptive terms provide "
    f"additional but less central details. With this in mind , {_EOL}"
)

# The eight tasks of MetaEOL (arXiv 2402.18458); wording ours.
_META_TASKS = (
    ("Sort the text by its general topic, such as science, sport, business or travel. By topic ,", _EOL),
    ("Decide whether the text reports a fact or gives an opinion. As fact or opinion ,", _EOL),
    ("Judge how good a rating the text would go with. As a rating ,", _EOL),
    ("Name the feeling that the text expresses, such as joy, anger, fear or sadness. As a feeling ,", _EOL),
    ("Say the same thing in other words, so that the meaning is kept. As a paraphrase ,", _EOL),
    ("Find the word whose meaning is closest to that of the whole text. As a synonym ,", _EOL),
    ("Pick out the single most important fact that the text states. As its key fact ,", _EOL),
    ("Name the main things in the text and how they relate to each other. As things and their relation ,", _EOL),
)

_TP_SOURCE = "official Token Prepending code (arXiv 2412.11556)"
_ALL = (
    Prompt("none", (SENTENCE,), clean=False, source="the bare sentence"),
    Prompt("prompteol", (_PROMPTEOL,), source=f"PromptEOL, arXiv 2307.16645; {_TP_SOURCE}"),
    Prompt("cot", (_COT,), source=f"Pretended CoT, arXiv 2404.03921; {_TP_SOURCE}"),
    Prompt("ke", (_KE,), source=f"Knowledge Enhancement, arXiv 2404.03921; {_TP_SOURCE}"),
    Prompt("ck", (_COT, _KE), source="mean of CoT and KE, arXiv 2505.12831"),
    Prompt("metaeol", tuple(f"{task} {eol}" for task, eol in _META_TASKS), source="MetaEOL, arXiv 2402.18458; wording ours"),
    Prompt(
        "echo",
        ("Rewrite the sentence: {sentence}\nThe rewritten sentence: {sentence}",),
        pooling="mean",
        clean=False,
        source="Echo embeddings, arXiv 2402.15449; wording ours",
    ),
)
PROMPTS: dict[str, Prompt] = {prompt.name: prompt for prompt in _ALL}


def get_prompt(prompt: str | Prompt) -> Prompt:
    """A prompt by its name in `PROMPTS`; a `Prompt` of your own passes through. Raises `ValueError`, listing the names."""
    if isinstance(prompt, Prompt):
        return prompt
    if prompt not in PROMPTS:
        raise ValueError(f"Unknown prompt {prompt!r}; choose from {', '.join(PROMPTS)} or pass a Prompt.")
    return PROMPTS[prompt]
