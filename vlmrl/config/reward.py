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

from vlmrl.config.fields import NAME, PATTERN, PROSE, SMALLEST, Form, Resume, setting


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
    """Column that holds the texts of the options. None: `choices` or `options` where a row has one, else the lines of
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


class PercentSign(Enum):
    """What a percent sign says where the answer or the reference has one."""

    either = "either"
    """`45%` equals 45 and 0.45."""
    plain = "plain"
    """The sign is a unit: `45%` equals 45."""
    share = "share"
    """`45%` equals 0.45."""


class UnitRule(Enum):
    """What the units of numbers count for."""

    ignore = "ignore"
    """`12 cm` equals `12` and `12 inches`."""
    match = "match"
    """An answer needs the unit of the reference, in any spelling: `12 cm`, `12 centimeters`. A reference without a unit
    accepts any. Nothing is converted."""


@dataclass
class NumberTerm(RewardTerm):
    """1 if the last number of the answer is the reference, else 0. Reads thousands separators, fractions, percent
    signs, units, exponents and number words."""

    kind: str = setting("number", on_resume=Resume.refused)
    """Compare numbers."""
    absolute: float = setting(
        0.0, on_resume=Resume.noted, low=0, high=1e12, outside="no answer is right or every one is"
    )
    """Tolerance: the largest allowed difference, in units of the reference. The larger of the two tolerances counts."""
    relative: float = setting(
        1e-7, on_resume=Resume.noted, low=0, high=1e12, outside="no answer is right or every one is"
    )
    """Tolerance: the largest allowed difference as a share of the reference; 0.05 is ChartQA's relaxed accuracy. The
    default covers the rounding of a float32 column, while whole numbers below ten million stay distinct."""
    percent: PercentSign = setting(PercentSign.either, on_resume=Resume.noted)
    """What `45%` equals."""
    units: UnitRule = setting(UnitRule.ignore, on_resume=Resume.noted)
    """Whether the unit must be right too."""


@dataclass
class MathTerm(RewardTerm):
    """1 if math-verify says that the answer equals the reference as mathematics, else 0."""

    kind: str = setting("math", on_resume=Resume.refused)
    """Compare mathematics."""
    timeout_s: float = setting(5.0, on_resume=Resume.noted, low=0.1, high=3600, outside="no answer is checked in time")
    """Seconds of processor time for one answer. After that its worker process is killed and replaced, the value is 0,
    and the metric `timeouts` counts it."""
    workers: int = setting(2, on_resume=Resume.free, low=1, high=256, outside="nothing checks the answers")
    """Worker processes per rank. They start with the first answer; each takes about 60 MB."""


class BoxFormat(Enum):
    """What the four numbers of a box are. Named corners, like `{"x1": …}`, need no format."""

    xyxy = "xyxy"
    """Two corners: left, top, right, bottom."""
    xywh = "xywh"
    """The top left corner, width and height, as in COCO."""
    cxcywh = "cxcywh"
    """The center, width and height, as in YOLO."""


class BoxSpace(Enum):
    """What coordinates count in."""

    absolute = "absolute"
    """Pixels of the original image."""
    processed = "processed"
    """Pixels of the resized image that the model saw, as Qwen2-VL and Qwen2.5-VL answer."""
    relative = "relative"
    """Shares of width and height, 0 to 1."""
    thousand = "thousand"
    """Thousandths of width and height, 0 to 1000, as Qwen3-VL and InternVL answer."""


class BoxShape(Enum):
    """What an answer consists of."""

    box = "box"
    """Boxes."""
    point = "point"
    """Points. An answer that is a box counts as the box's center."""


@dataclass
class IouTerm(RewardTerm):
    """How well the boxes of the answer match the boxes of the reference: intersection over union (IoU) of one box and
    one box; of sets, twice the sum of matched IoUs over the number of boxes in both (the F1 score with IoU as the
    degree of a match). Boxes are matched one to one such that the sum is largest."""

    kind: str = setting("iou", on_resume=Resume.refused)
    """Compare boxes or points."""
    shape: BoxShape = setting(BoxShape.box, on_resume=Resume.noted)
    """What the answer consists of. A point matches a box that contains it."""
    answer_space: BoxSpace = setting(BoxSpace.absolute, on_resume=Resume.noted)
    """What the coordinates of the answer count in. It depends on the model."""
    reference_space: BoxSpace = setting(BoxSpace.absolute, on_resume=Resume.noted)
    """What the coordinates of the reference count in. It depends on the data."""
    answer_format: BoxFormat = setting(BoxFormat.xyxy, on_resume=Resume.noted)
    """What the four numbers of a box in the answer are."""
    reference_format: BoxFormat = setting(BoxFormat.xyxy, on_resume=Resume.noted)
    """What the four numbers of a box in the reference are."""
    threshold: float | None = setting(
        None, on_resume=Resume.noted, low=SMALLEST, high=1, outside="all boxes match, or none"
    )
    """A match counts 1 from this IoU (a share of the area) on, else 0. None counts the IoU itself."""
    radius: float = setting(
        10.0, on_resume=Resume.noted, low=SMALLEST, high=1e9, outside="no point matches a point, or every one does"
    )
    """`shape=point` with points as reference: the match falls from 1 to 0 over this distance. In pixels of the original
    image, or in the coordinates of both where `answer_space` and `reference_space` are the same."""


@dataclass
class F1Term(RewardTerm):
    """The F1 score of the words that answer and reference share, as in SQuAD: without case, punctuation and articles.
    Of a reference that is a list, the best entry counts."""

    kind: str = setting("f1", on_resume=Resume.refused)
    """Compare words."""


@dataclass
class AnlsTerm(RewardTerm):
    """1 minus the edit distance between answer and reference as a share of the longer text, and 0 for texts that differ
    too much (ANLS, arXiv 1907.00490). Of a reference that is a list, the best entry counts."""

    kind: str = setting("anls", on_resume=Resume.refused)
    """Compare characters."""
    threshold: float = setting(0.5, on_resume=Resume.noted, low=SMALLEST, high=1, outside="no answer has a value")
    """τ of the paper: the value is 0 where the distance is not below this share."""


class JudgeFailure(Enum):
    """What happens to a rollout that the judge did not score."""

    fault = "fault"
    """The rollout is a fault and is not learned from. Its siblings keep their advantages on one scale."""
    abstain = "abstain"
    """The term abstains, so the other terms alone make the reward."""


@dataclass
class JudgeTerm(RewardTerm):
    """What another model thinks of the answer, asked over an OpenAI-compatible endpoint, with the images of the
    prompt."""

    kind: str = setting("judge", on_resume=Resume.refused)
    """Ask a model."""
    url: str = setting(
        MISSING,
        on_resume=Resume.free,
        form=Form(r"https?://[^\s?#@]+", "of the form https://host/v1, without user and query", "no judge is found"),
    )
    """Base URL of the endpoint, e.g. `https://api.openai.com/v1`; `/chat/completions` is added."""
    model: str = setting(MISSING, on_resume=Resume.noted)
    """Name of the model at the endpoint."""
    api_key_env: str | None = setting(
        None,
        on_resume=Resume.free,
        form=Form(r"[A-Za-z_]\w*", "the name of an environment variable", "no key is found"),
    )
    """Name of the environment variable that holds the API key, e.g. `OPENAI_API_KEY`. The key itself is never written
    down. None sends no key."""
    prompt: str | None = setting(None, on_resume=Resume.noted, form=PROSE)
    """What the judge is asked: a Jinja template, inline or the path of a file, that sees `question`, `answer`,
    `completion`, `reference`, `columns`, `images`, `low`, `high`, and `mark`, a line that no completion contains. None:
    the default in vlmrl/rewards/judge_prompt.py."""
    images: bool = setting(True, on_resume=Resume.noted)
    """Whether the judge sees the images of the prompt."""
    pattern: str | None = setting(None, on_resume=Resume.noted, form=PATTERN)
    """Regular expression whose last match in the judge's reply holds the score, in its first group or as a whole. None:
    the number after the last `score:`, else the last number."""
    low: float = setting(0.0, on_resume=Resume.noted, low=-1e6, high=1e6, outside="the range has no end")
    """The score of the judge that is worth 0."""
    high: float = setting(10.0, on_resume=Resume.noted, low=-1e6, high=1e6, outside="the range has no end")
    """The score of the judge that is worth 1. A score outside the range is a failure."""
    max_tokens: int = setting(1024, on_resume=Resume.noted, low=1, high=10**6, outside="the judge cannot reply")
    """The longest reply of the judge, in tokens."""
    temperature: float = setting(0.0, on_resume=Resume.noted, low=0, high=10, outside="no endpoint accepts it")
    """Sampling temperature of the judge, the divisor of its logits."""
    extra_body: dict[str, Any] = setting({}, on_resume=Resume.noted, free_form=True)
    """More fields of the request; they win over ours, and null leaves a field out:
    `{max_tokens: null, max_completion_tokens: 1024}`."""
    concurrency: int = setting(16, on_resume=Resume.free, low=1, high=10**4, outside="nothing is asked")
    """Requests at the same time, per rank."""
    timeout_s: float = setting(60.0, on_resume=Resume.noted, low=0.1, high=3600, outside="no reply comes in time")
    """Seconds for one request."""
    retries: int = setting(
        4, on_resume=Resume.free, low=0, high=100, outside="it is not a number of retries (0 is none)"
    )
    """Times that a request is sent again after a timeout, a lost connection, or HTTP status 408, 409, 429 or 5xx, with
    growing waits. A reply without a score is not asked for again."""
    cache: bool = setting(True, on_resume=Resume.free)
    """Keep replies in `$VLMRL_CACHE/judge` (`~/.cache/vlmrl/judge`), under the hash of the request, so that the same
    request is paid for once."""
    on_failure: JudgeFailure = setting(JudgeFailure.fault, on_resume=Resume.noted)
    """What happens to a rollout that the judge did not score."""


@dataclass
class ImportedTerm(RewardTerm):
    """A reward function of your own: `reward=my_module:fn` or `reward=path/to/file.py:fn`."""

    kind: str = setting("imported", on_resume=Resume.refused)
    """A function of your own, which `target` names."""
    target: str = setting(MISSING, on_resume=Resume.refused, imports=True)
    """Import path of the function, or of a class that makes one, `package.module:name` or `path/to/file.py:name`."""
    args: dict[str, Any] = setting({}, on_resume=Resume.noted, free_form=True)
    """Settings that your function reads, given to it as keyword arguments; they are not checked."""


TERMS: dict[str, type[RewardTerm]] = {
    "exact": ExactTerm,
    "choice": ChoiceTerm,
    "number": NumberTerm,
    "math": MathTerm,
    "iou": IouTerm,
    "f1": F1Term,
    "anls": AnlsTerm,
    "format": FormatTerm,
    "judge": JudgeTerm,
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
