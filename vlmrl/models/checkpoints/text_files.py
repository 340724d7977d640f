"""Tokenizer, chat template and processors of a checkpoint that is made here, so that nothing is downloaded.

The family's recipe (`models/families`) says which tokens, template and processor; the vocabulary is trained on the
task's own words.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vlmrl.models.checkpoints.built_folders import write_json
from vlmrl.models.families.base import CheckpointRecipe, ImageBounds

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def build_tokenizer(recipe: CheckpointRecipe, texts: tuple[str, ...], merges: int) -> Tokenizer:
    """A byte-level BPE: 256 bytes, at most `merges` merges learned from `texts`, then the recipe's added tokens."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from tokenizers.trainers import BpeTrainer

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(recipe.pre_tokenizer_regex), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(
        vocab_size=len(alphabet) + merges, initial_alphabet=sorted(alphabet), special_tokens=[], show_progress=False
    )
    tokenizer.train_from_iterator([*recipe.chat_words, *texts], trainer)
    tokenizer.add_tokens(
        [AddedToken(token, special=True, normalized=False) for token in recipe.special_tokens]
        + [AddedToken(token, special=False, normalized=False) for token in recipe.atomic_tokens]
    )
    return tokenizer


def write_text_files(
    folder: Path, recipe: CheckpointRecipe, texts: tuple[str, ...], merges: int, max_length: int, bounds: ImageBounds
) -> Tokenizer:
    """Write everything in a checkpoint's folder except config.json and the weights; return the tokenizer.

    `max_length` is in tokens; `bounds` are those of an image.
    """
    tokenizer = build_tokenizer(recipe, texts, merges)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(recipe.chat_template, encoding="utf-8")
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": recipe.tokenizer_class,
            "add_bos_token": False,
            "add_prefix_space": False,
            "bos_token": None,
            "eos_token": recipe.end_of_turn,
            "pad_token": recipe.end_of_text,
            "unk_token": None,
            "additional_special_tokens": [token for token in recipe.special_tokens if token != recipe.end_of_text],
            "clean_up_tokenization_spaces": False,
            "errors": "replace",
            "model_max_length": max_length,
            "split_special_tokens": False,
        },
    )
    # `size` holds areas in pixels, although its keys speak of edges.
    size = {"shortest_edge": bounds.least, "longest_edge": bounds.most}
    write_json(folder / "preprocessor_config.json", {**recipe.preprocessor_config, "size": size})
    write_json(folder / "video_preprocessor_config.json", {**recipe.video_preprocessor_config, "size": size})
    ids = tokenizer.get_vocab()
    end_of_text, end_of_turn = ids[recipe.end_of_text], ids[recipe.end_of_turn]
    write_json(
        folder / "generation_config.json",
        {
            "bos_token_id": end_of_text,
            "eos_token_id": [end_of_turn, end_of_text],
            "pad_token_id": end_of_text,
            "do_sample": True,
        },
    )
    return tokenizer


def config_token_ids(recipe: CheckpointRecipe, tokenizer: Tokenizer) -> tuple[dict[str, int], dict[str, int]]:
    """The token ids in config.json: those in its `text_config`, and those on its top level."""
    ids = tokenizer.get_vocab()
    text = {"bos_token_id": ids[recipe.end_of_text], "eos_token_id": ids[recipe.end_of_turn]}
    return text, {key: ids[token] for key, token in recipe.config_tokens.items()}
