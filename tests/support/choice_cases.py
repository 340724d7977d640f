r"""Multiple-choice answers with what they are worth, written by hand before vlmrl/rewards/choice.py.

A case is (options, reference, first_index, answer, value). The rules that the table follows:

- A letter, in any of the ways in which people write one, names its option. So does the text of the option, whatever its
  case, its punctuation and its article.
- A statement such as "the answer is …" counts more than what stands around it, and the last statement counts. Without
  a statement, the last line counts where it is an option by itself.
- A text that names no option, or several, is no answer: 0. So is a letter together with the text of another option.
- The article "a" and the pronoun "I" are no letters of options.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

COLORS = ("red", "blue", "dark green", "green")
ANIMALS = ("a cat", "a dog", "the bird", "an elk")
NUMBERS = ("2", "3", "1", "0")
SENTENCES = (
    "The man is holding an umbrella.",
    "The man is riding a bicycle.",
    "The man is walking a dog.",
)
FORMULAS = (r"$x^2$", r"$\frac{1}{2}$", "$2x + 1$", "12 cm", "12 cm^2")
LETTERS = ("B", "A", "D", "C")
YES_NO = ("yes", "no")
TEN = tuple(f"place {number}" for number in range(1, 11))


@dataclass(frozen=True)
class Case:
    options: tuple[str, ...] | None
    """None: they are known neither from a column nor from the prompt."""
    reference: Any
    first_index: int
    answer: str
    value: float | None


def _cases(
    options: tuple[str, ...] | None, reference: Any, right: list[str], wrong: list[str], first_index: int = 0
) -> list[Case]:
    return [
        *(Case(options, reference, first_index, answer, 1.0) for answer in right),
        *(Case(options, reference, first_index, answer, 0.0) for answer in wrong),
    ]


LETTER_FORMS = _cases(
    COLORS,
    "B",
    right=[
        "B",
        "b",
        " B ",
        "B.",
        "B)",
        "(B)",
        "(b)",
        "[B]",
        "B:",
        "B,",
        "**B**",
        "**B.**",
        "*B*",
        "__B__",
        "`B`",
        '"B"',
        "'B'",
        "“B”",
        "$B$",
        r"\boxed{B}",
        r"$\boxed{\text{B}}$",
        r"\text{B}",
        r"\textbf{(B)}",
        r"\mathrm{B}",
        "<answer>B</answer>",
        "(B).",
        "Option B",
        "option (b)",
        "Choice B",
        "Answer: B",
        "answer: b",
        "Answer: (B)",
        "Answer : B.",
        "Answer:B",
        "**Answer:** B",
        "**Answer: B**",
        "Final answer: B",
        "### Answer\nB",
        "ANSWER: B",
        "Ans: B",
        "Answer is B",
        "The answer is B",
        "The answer is B.",
        "The answer is (B)",
        "The answer is: B",
        "The answer is **B**",
        "The answer is option B.",
        r"The answer is \boxed{B}.",
        "The correct answer is B.",
        "The correct option is B.",
        "The correct choice is (B).",
        "So the correct answer is: (B) blue",
        "the right answer would be B",
        "My answer is B.",
        "I choose B",
        "I would choose option B.",
        "I pick (B).",
        "It is B.",
        "It's B",
        "Therefore, B",
        "Therefore, the answer is B.",
        "Thus, option B is correct.",
        "Option B is correct.",
        "B is correct.",
        "B is the correct answer.",
        "(B) is the right answer.",
        "Hence (B).",
        "So, B.",
        "The car is parked in the shade.\nB",
        "Let me look.\n\n(B)",
        "Let me look.\n\n**B. blue**",
        "It could be A or C, but the answer is B.",
        "A is wrong. C is wrong. The answer is B.",
        "The answer is A. Wait, the answer is B.",
        "Answer: A\nNo, I was mistaken.\nAnswer: B",
        "Looking at the sky, I see (B).",
    ],
    wrong=[
        "A",
        "a",
        "C",
        "(C)",
        "D.",
        "E",
        "F)",
        "Z",
        "",
        " ",
        ".",
        "()",
        "?",
        "AB",
        "BB",
        "A, B",
        "A and B",
        "A or B",
        "B or C",
        "B and C",
        "(A) (B)",
        "(A) or (B)",
        "Answer: A",
        "Answer: A or B",
        "Answer: A, B",
        "Answer:",
        "The answer is",
        "The answer is C",
        "The answer is not B",
        "The answer is not (B).",
        "It is not B.",
        "The answer is B. Wait, the answer is A.",
        "Answer: B\nNo, I was mistaken.\nAnswer: A",
        "Banana",
        "Because of the light",
        "I do not know.",
        "None of the above",
        "8",
        "option",
        "A B C D",
        "A. red\nB. blue\nC. dark green\nD. green",
        "Bravo",
        "vitamin B12",
        "β",
    ],
)

LETTER_WITH_TEXT = _cases(
    COLORS,
    "B",
    right=[
        "B. blue",
        "B) blue",
        "(B) blue",
        "(B) Blue.",
        "B: blue",
        "B - blue",
        "B – blue",
        "B, blue",
        "B blue",
        "A blue",  # the article
        "B. Blue, because the sky is clear.",
        "B. It is the color of the sky.",
        "**B. blue**",
        "**B.** blue",
        "The answer is B. blue",
        "The answer is B: blue.",
        "Answer: B. blue",
        "Answer: B (blue)",
        "blue (B)",
        "Blue, so B",
        r"\boxed{B. blue}",
        r"\boxed{\text{B. blue}}",
        "B.\nblue",
    ],
    wrong=[
        "B. red",
        "(B) green",
        "B: dark green",
        "The answer is B. red",
        "Answer: A (blue)",
        "A. blue",
        "red (B)",
        r"\boxed{B. red}",
    ],
)

OPTION_TEXT = _cases(
    COLORS,
    "B",
    right=[
        "blue",
        "Blue",
        "BLUE",
        "blue.",
        " blue ",
        "**blue**",
        '"blue"',
        "the blue",
        r"\boxed{blue}",
        r"\boxed{\text{blue}}",
        "Answer: blue",
        "The answer is blue.",
        "It is blue.",
        "The car is blue.",
        "The car in the picture is clearly blue!",
        "I think it is blue, not sure.",
        "The light is dim.\nblue",
    ],
    wrong=["red", "green", "dark green", "bluish", "blueberry", "light", "red and blue", "It is red.", "Answer: green"],
)

LONGER_TEXT = [
    *_cases(COLORS, "C", right=["dark green", "Dark green.", "It is dark green.", "C"], wrong=["green", "dark", "D"]),
    *_cases(COLORS, "D", right=["green", "It is green.", "D"], wrong=["dark green", "It is dark green.", "greenish"]),
    *_cases(
        ANIMALS,
        "A",
        right=["a cat", "A cat", "cat", "the cat", "Cat.", "It is a cat.", "A", "A. a cat", "I see a cat."],
        wrong=["a dog", "A dog", "A dog.", "an elk", "cats", "A bird", "I see a dog.", "I", "concatenate"],
    ),
    *_cases(
        SENTENCES,
        "B",
        right=[
            "The man is riding a bicycle.",
            "the man is riding a bicycle",
            "B. The man is riding a bicycle.",
            "In the image, the man is riding a bicycle.",
        ],
        wrong=["The man is walking a dog.", "The man", "A man is riding a bicycle and the man is walking a dog.", "A"],
    ),
    *_cases(
        FORMULAS,
        "B",
        right=[r"$\frac{1}{2}$", r"\frac{1}{2}", "B", r"B. $\frac{1}{2}$", r"The answer is $\frac{1}{2}$."],
        wrong=["$x^2$", "12 cm", r"\frac{1}{3}", "C"],
    ),
    *_cases(FORMULAS, "D", right=["12 cm", "12 cm.", "D", "(D) 12 cm"], wrong=["12 cm^2", "112 cm", "12 cm²", "E"]),
    *_cases(FORMULAS, "E", right=["12 cm^2", "E", "Answer: 12 cm^2"], wrong=["12 cm", "D"]),
]

REFERENCE_FORMS = [
    *(
        case
        for reference in ("B", "b", "(B)", "B.", "B)", " B ", "B. blue", "(B) blue", "blue", "Blue", 1, 1.0, ["B"], "1")
        for case in _cases(COLORS, reference, right=["B", "(B) blue", "blue"], wrong=["A", "red"])
    ),
    *_cases(COLORS, 1, first_index=1, right=["A", "red", "(A)"], wrong=["B", "blue"]),
    *_cases(COLORS, "4", first_index=1, right=["D", "green"], wrong=["C", "A"]),
    *_cases(COLORS, 0, right=["A", "red"], wrong=["B", ""]),
    *_cases(COLORS, ["A", "C"], right=["A", "C", "red", "dark green"], wrong=["B", "blue", "A and B"]),
]

NUMBERS_AS_OPTIONS = [
    *_cases(
        NUMBERS, "A", right=["A", "2", "A. 2", "Answer: 2", "The answer is 2.", "(2)"], wrong=["B", "3", "20", "12"]
    ),
    *_cases(NUMBERS, "3", right=["B", "3", "There are 3."], wrong=["D", "0", "13", "3.5"]),
    *_cases(NUMBERS, 3, right=["D", "0"], wrong=["B", "3"]),
]

LETTERS_AS_OPTIONS = [
    # A letter is the letter of an option, and not its text, as in the questions of most data sets.
    *_cases(LETTERS, "A", right=["A", "(A)", "Answer: A"], wrong=["B", "C"]),
    *_cases(LETTERS, 0, right=["A"], wrong=["B"]),
]

FEW_OR_MANY = [
    *_cases(YES_NO, "yes", right=["yes", "Yes.", "A", "Yes, it is."], wrong=["no", "No.", "B", "not", "C", "D"]),
    *_cases(YES_NO, "B", right=["no", "No, it is not.", "B", "The answer is no."], wrong=["yes", "know", "A"]),
    *_cases(TEN, "J", right=["J", "place 10", "(J)", "Answer: place 10"], wrong=["A", "place 1", "K", "place"]),
    *_cases(TEN, "A", right=["A", "place 1", "Place 1."], wrong=["J", "place 10", "place 11"]),
    *_cases(TEN, "I", right=["I", "(I)", "I. place 9"], wrong=["I think so", "I do", "I am not sure"]),
]

UNKNOWN_OPTIONS = [
    *_cases(
        None,
        "C",
        right=[
            "C",
            "c",
            "(C)",
            "C. green",
            "Answer: C",
            "The answer is C.",
            "It is hidden.\nC",
            "I choose C",
            r"\boxed{C}",
        ],
        wrong=["A", "green", "", "A or C", "The answer is B.", "Cat"],
    ),
    *_cases(None, "A", right=["A", "A. a cat"], wrong=["A cat", "a dog", "I see a cat"]),
    *_cases(None, 2, right=["C", "(C)"], wrong=["B", "D"]),
    *_cases(None, "(D) 4", right=["D", "D. 4"], wrong=["4", "A"]),
]

CASES = [
    *LETTER_FORMS,
    *LETTER_WITH_TEXT,
    *OPTION_TEXT,
    *LONGER_TEXT,
    *REFERENCE_FORMS,
    *NUMBERS_AS_OPTIONS,
    *LETTERS_AS_OPTIONS,
    *FEW_OR_MANY,
    *UNKNOWN_OPTIONS,
]

PROMPTS: list[tuple[str, tuple[str, ...] | None]] = [
    ("What color is it?\nA. red\nB. blue\nC. dark green\nD. green", COLORS),
    ("What color is it?\nA) red\nB) blue\nC) dark green\nD) green", COLORS),
    ("What color is it?\n(A) red\n(B) blue\n(C) dark green\n(D) green", COLORS),
    ("What color is it?\nA: red\nB: blue\nC: dark green\nD: green\nAnswer with the letter.", COLORS),
    ("What color is it?\n  A.  red \n\n  B.  blue \n  C. dark green\n D. green\n\n", COLORS),
    ("What color is it? (A) red (B) blue (C) dark green (D) green", COLORS),
    ("What color is it? A. red B. blue C. dark green D. green", COLORS),
    ("What color is it? Choices: (A) red; (B) blue; (C) dark green; (D) green", COLORS),
    ("What color is it? A) red, B) blue, C) dark green, D) green", COLORS),
    ("Is it?\nA. yes\nB. no", YES_NO),
    ("Example:\nA. 1\nB. 2\nAnswer: A\n\nIs it?\nA. yes\nB. no", YES_NO),
    ("What did A. Smith paint?", None),
    ("Solve it. Answer: A number.", None),
    ("What color is it?", None),
    ("Is point B. left of point A.", None),
    ("", None),
]
"""(the text of a prompt, the options in it)."""
