"""Tokenizers of the tiny checkpoints: each family's kind of BPE, trained here, with the family's special tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer

QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Pre-tokenizer of Qwen 2 and later: digits stand alone."""

LLAMA_PATTERN = QWEN_PATTERN.replace(r"\p{N}|", r"\p{N}{1,3}|")
"""Pre-tokenizer of Llama 3 and GLM-4: up to three digits make a word."""

TEKKEN_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Pre-tokenizer of Mistral's Tekken: a capital letter starts a word."""

SENTENCES = (
    "What colour is the square in the first picture, and which colour is the second?",
    "The answer is red. The other one is blue, green, yellow, white, black or orange.",
    "You are a helpful assistant. Describe the image in one word.",
    "How many circles, triangles and squares are there? There are 1, 2, 3, 4 or 10 of them.",
    "Look at both images and say which of them is larger, brighter, older or newer.",
    "Please think step by step, then write the code word of the colour and stop.",
    "system user assistant model tool human",
)
"""What every vocabulary learns from, in an order of the family's own."""

REPEATS = 20
"""How often a vocabulary sees the name of its family, and each text of `build`'s caller."""

VOCAB_MULTIPLE = 64


@dataclass(frozen=True)
class Vocabulary:
    """How a family's tokenizer is made."""

    special: tuple[str, ...]
    """Special tokens, in the order of their ids."""
    eos: str
    pad: str
    bos: str | None = None
    unk: str | None = None
    named: dict[str, str] = field(default_factory=dict)
    """Attributes of the tokenizer that processors ask for, such as `image_token`."""
    plain: tuple[str, ...] = ()
    """Added tokens that are not special: decoding keeps them."""
    kind: Literal["bytes", "gemma", "llama"] = "bytes"
    """Byte-level, or SentencePiece with bytes as a fallback: Gemma's, or Llama 2's, which begins with a space."""
    pattern: str | None = QWEN_PATTERN
    """Regular expression of the pre-tokenizer; None is GPT-2's with digits alone (`kind="bytes"` only)."""
    normal_form: bool = True
    """Whether text is brought into Unicode's normal form C first (`kind="bytes"` only)."""
    special_first: bool = False
    """Whether the special tokens have the lowest ids."""
    adds_bos: bool = False
    """Whether the tokenizer itself begins with `bos` where `add_special_tokens` is on."""
    tokenizer_class: str = "TokenizersBackend"
    merges: int = 96


def trained(vocabulary: Vocabulary, family: str, texts: tuple[str, ...] = ()) -> Tokenizer:
    """The tokenizer of `family`, always the same. It learns from `texts` too."""
    tokenizer = _untrained(vocabulary)
    learned, merges = _learn(vocabulary, [*_texts(family), *REPEATS * texts])
    first = [*vocabulary.special, *vocabulary.plain] if vocabulary.special_first else []
    ids = {token: number for number, token in enumerate([*first, *learned])}
    if vocabulary.kind == "bytes":
        tokenizer.model = models.BPE(ids, merges)
    else:
        tokenizer.model = models.BPE(ids, merges, unk_token=vocabulary.unk, fuse_unk=True, byte_fallback=True)
    tokenizer.add_tokens(
        [AddedToken(token, special=True, normalized=False) for token in vocabulary.special]
        + [AddedToken(token, special=False, normalized=False) for token in vocabulary.plain]
    )
    if vocabulary.adds_bos:
        assert vocabulary.bos is not None
        bos = (vocabulary.bos, tokenizer.token_to_id(vocabulary.bos))
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos[0]} $A", pair=f"{bos[0]} $A {bos[0]} $B", special_tokens=[bos]
        )
    return tokenizer


def tokenizer_config(vocabulary: Vocabulary) -> dict[str, Any]:
    """The content of tokenizer_config.json."""
    named = dict(vocabulary.named)
    others = [token for token in vocabulary.special if token not in {vocabulary.eos, vocabulary.pad, vocabulary.bos}]
    return {
        "tokenizer_class": vocabulary.tokenizer_class,
        "add_bos_token": vocabulary.adds_bos,
        "bos_token": vocabulary.bos,
        "eos_token": vocabulary.eos,
        "pad_token": vocabulary.pad,
        "unk_token": vocabulary.unk,
        **named,
        "extra_special_tokens": named or others,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
    }


def padded_size(tokenizer: Tokenizer) -> int:
    """Rows of the embedding: released models have more than their tokenizer has tokens."""
    return -(-(tokenizer.get_vocab_size() + 1) // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def _untrained(vocabulary: Vocabulary) -> Tokenizer:
    """A tokenizer with the steps around the model, as transformers' class of the family builds them."""
    tokenizer = Tokenizer(models.BPE())
    if vocabulary.kind == "bytes":
        if vocabulary.normal_form:
            tokenizer.normalizer = normalizers.NFC()
        words = (
            pre_tokenizers.Digits(individual_digits=True)
            if vocabulary.pattern is None
            else pre_tokenizers.Split(Regex(vocabulary.pattern), behavior="isolated")
        )
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=vocabulary.pattern is None)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, to_bytes])
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if vocabulary.kind == "gemma":
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", "first", split=False)
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _learn(vocabulary: Vocabulary, texts: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Tokens in the order of their ids, and merges, of a BPE that learns from `texts`."""
    if vocabulary.kind == "bytes":
        alphabet, fallback = sorted(pre_tokenizers.ByteLevel.alphabet()), []
        pupil = _untrained(vocabulary)
    else:
        alphabet, fallback = [], [f"<0x{byte:02X}>" for byte in range(256)]
        pupil = Tokenizer(models.BPE())
        pupil.normalizer = normalizers.Replace(" ", "▁")
        pupil.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trainer = BpeTrainer(
        vocab_size=len(alphabet or set("".join(texts).replace(" ", "▁"))) + vocabulary.merges,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    pupil.train_from_iterator(texts, trainer)
    model = json.loads(pupil.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return fallback + tokens, [(left, right) for left, right in model["merges"]]


def _texts(family: str) -> Iterator[str]:
    """The sentences, each as often as the family's name decides, so that no two families learn the same merges."""
    random = np.random.default_rng(list(family.encode()))
    for sentence, repeats in zip(SENTENCES, random.integers(1, 9, len(SENTENCES)), strict=True):
        yield from [sentence] * int(repeats)
    yield from [family] * REPEATS
