"""`reward`: what an answer is worth. A run has any number of reward terms, each with a name and a weight.

    reward.terms:
      math:   {kind: math, weight: 0.9}
      format: {kind: format, weight: 0.1, presets: [boxed]}

The reward of a rollout is `task_weight` times the reward of the task itself plus the sum of weight times value over the
terms. Each kind of term has a schema of its own (`TERMS`); its function is in the file of that name in vlmrl/rewards/.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING

from vlmrl.config.fields import NAME, PATTERN, Resume, setting


class Extraction(Enum):
    """Where a completion holds the answer."""

    whole = "whole"
    """All of the completion, without white space at its ends."""
    boxed = "boxed"
    r"""What stands between the braces of the last `\boxed{…}`."""
    tag = "tag"
    """What stands between the last `<answer>` and `</answer>`; `extract.tag` names another tag."""
    last_line = "last_line"
    """The last line that is not empty."""
    regex = "regex"
    """The first group of the last match of `extract.pattern`, or all of the match without a group."""


@dataclass
class ExtractConfig:
    """How the answer is found in a completion. A completion without one has value 0 for the terms that need it."""

    kind: Extraction | None = setting(None, on_resume=Resume.noted)
    """Where the answer stands. None in a term: what `reward.extract` says. None in `reward.extract`: `whole`."""
    tag: str = setting("answer", on_resume=Resume.noted, form=NAME)
    """`kind=tag`: the name of the tag, `answer` for `<answer>…</answer>`."""
    pattern: str | None = setting(None, on_resume=Resume.noted, form=PATTERN)
    """`kind=regex`: a regular expression, in which `.` also matches the end of a line. A search that takes longer than
    a second ends its rollout as `reward_error`."""


@dataclass
class RewardTerm:
    """What every reward term has."""

    weight: float = setting(
        1.0, on_resume=Resume.noted, low=-1e6, high=1e6, outside="rewards of that size leave no other term a say"
    )
    """Factor on the term's value in the rollout's reward. 0 only logs the value; a negative weight is a penalty."""
    extract: ExtractConfig = field(default_factory=ExtractConfig)
    """How this term finds the answer, where it differs from `reward.extract`."""
    kind: str = setting(MISSING, on_resume=Resume.refused)
    """The term's schema; set by the option that `reward=` chooses."""


@dataclass
class ExactTerm(RewardTerm):
    """1 if the answer is the reference, else 0. Of a reference that is a list, any entry will do."""

    kind: str = setting("exact", on_resume=Resume.refused)
    """Compare texts."""
    ignore_case: bool = setting(False, on_resume=Resume.noted)
    """Whether `Paris` equals `paris`."""
    ignore_spaces: bool = setting(False, on_resume=Resume.noted)
    """Whether `1 000` equals `1000`. White space at the ends never counts, and any run of it within counts as one
    space."""
    ignore_punctuation: bool = setting(False, on_resume=Resume.noted)
    """Whether `Paris.` equals `Paris`: every punctuation mark is removed, also within a word or number."""


@dataclass
class ChoiceTerm(RewardTerm):
    """1 if the answer names the right option of a multiple-choice question, else 0. `B`, `(B)`, `Answer: B`, and the
    text of option B are the same answer; the reference may be a letter, an index or a text."""

    kind: str = setting("choice", on_resume=Resume.refused)
    """Compare options."""
    options: str | None = setting(None, on_resume=Resume.noted)
    """Column that holds the texts of the options. None: `options` or `choices` where a row has one, else the lines of
    the prompt that begin with a letter, like `A. red` and `(B) blue`."""
    first_index: int = setting(0, on_resume=Resume.noted, low=0, high=1, outside="options are counted from 0 or from 1")
    """The positions of options start at this number, where the reference is a number."""


class FormatPreset(Enum):
    """A form of a whole completion. White space at the ends does not count."""

    think = "think"
    """`<think>…</think>` and then an answer, each once."""
    think_answer = "think_answer"
    """`<think>…</think><answer>…</answer>` and nothing else, with only white space between the two."""
    boxed = "boxed"
    r"""At least one `\boxed{…}` whose braces close."""
    think_boxed = "think_boxed"
    r"""`<think>…</think>` once and after it an answer with a `\boxed{…}`."""


@dataclass
class FormatTerm(RewardTerm):
    """1 if the whole completion has the right form, else 0. `extract` does not matter here."""

    kind: str = setting("format", on_resume=Resume.refused)
    """Check the form."""
    presets: list[FormatPreset] = setting([], on_resume=Resume.noted)
    """Forms that the completion must have, all of them. With neither `presets` nor `pattern`: `think_answer`."""
    pattern: str | None = setting(None, on_resume=Resume.noted, form=PATTERN)
    """A regular expression that is searched in the completion, in addition to `presets`. `^` and `$` are the ends of
    the text, and `.` also matches the end of a line."""


@dataclass
class ImportedTerm(RewardTerm):
    """A reward function of your own: `reward=my_module:fn` or `reward=path/to/file.py:fn`."""

    kind: str = setting("imported", on_resume=Resume.refused)
    """A function of your own, which `target` names."""
    target: str = setting(MISSING, on_resume=Resume.refused)
    """Import path of the function, or of a class that makes one, `package.module:name` or `path/to/file.py:name`."""
    args: dict[str, Any] = setting({}, on_resume=Resume.noted, free_form=True)
    """Settings that your function reads, given to it as keyword arguments; they are not checked."""


TERMS: dict[str, type[RewardTerm]] = {
    "exact": ExactTerm,
    "choice": ChoiceTerm,
    "format": FormatTerm,
    "imported": ImportedTerm,
}
"""`kind` → schema."""


@dataclass
class RewardConfig:
    """The reward terms of a run, or of one task of it."""

    terms: dict[str, RewardTerm] = field(default_factory=dict)
    """Name → term. `reward=[math,format]` makes one term per kind, named after it."""
    task_weight: float = setting(
        1.0, on_resume=Resume.noted, low=-1e6, high=1e6, outside="rewards of that size leave no other term a say"
    )
    """Factor on the reward of the task itself, where it has one (color_codeword, a task of your own)."""
    extract: ExtractConfig = field(default_factory=ExtractConfig)
    """How the answer is found in a completion."""
