"""What counts as a secret: names and values of real leaks, and what looks like one and is none."""

from __future__ import annotations

from typing import Any

import pytest

from vlmrl.cli.exit_codes import report
from vlmrl.config.secrets import find_secrets, is_secret_name, is_secret_value, redacted, redacted_words
from vlmrl.errors import ConfigError

S = "hunter2SECRET"

LEAKS: tuple[tuple[dict[str, Any], str], ...] = (
    *(
        ({name: S}, name)
        for name in (
            *("api_key", "API_KEY", "apikey", "apiKey", "openaiApiKey", "X-Api-Key", "openai_key", "api_keys"),
            *("token", "hf_token", "HF_TOKEN", "access_token", "accessToken", "auth-token", "github_token"),
            *("password", "PASSWORD", "dbPassword", "db_password", "passwd", "pwd", "passphrase"),
            *("secret", "client_secret", "secret_key", "aws_secret_access_key", "private_key", "ssh_key", "accessKey"),
            *("credential", "credentials", "bearer", "Authorization", "jwt", "key"),
            *("signing_key", "encryptionKey", "session_token", "refreshToken", "slack_token", "wandb_api_key"),
        )
    ),
    ({"password": 12345678}, "password"),
    ({"clients": [{"api_key": S}]}, "clients[0].api_key"),
    ({"clients": [[{"api_key": S}]]}, "clients[0][0].api_key"),
    ({"headers": {"Authorization": f"Basic {S}"}}, "headers.Authorization"),
    ({"headers": {"X": f"Bearer {S}"}}, "headers.X"),
    ({"credentials": {"user": "me", "phrase": ""}}, "credentials.user"),
    ({"api_keys": ["", S]}, "api_keys[1]"),
    ({"a": ["sk-proj-abcDEF123456"]}, "a[0]"),
    ({"a": {"sk-proj-abcDEF123456": 1}}, "a.(hidden)"),
)

VALUES = (
    "sk-ant-api03-AbCdEf123456",
    "sk-proj-abcDEF123456",
    "sk-1234567890abcdef",
    "hf_" + "F4ce" * 8,
    "ghp_" + "a1B2" * 9,
    "github_pat_" + "a1B2" * 9,
    "xoxb-1234567890-abcdef",
    "AKIAIOSFODNN7EXAMPLE",
    "AIza" + "Sy1_" * 9,
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.abcdefg",
    "-----BEGIN RSA PRIVATE KEY-----\nMIIE",
    "Bearer hunter2SECRET",
    f"https://u:{S}@h/x",
    f"postgresql+psycopg://u:{S}@h/x",
    f"https://:{S}@h",
    f"https://h/x?api_key={S}",
    f"https://h/x?a=1&token={S}",
    f"host=h user=u password={S}",
    f"serve --api-key {S}",
    f"serve --api-key={S}",
    f"export OPENAI_API_KEY={S}",
)

INNOCENT: tuple[dict[str, Any], ...] = (
    {
        "max_tokens": 512,
        "stop_token": "<|im_end|>",
        "image_token": "<|image_pad|>",
        "pad_token": "x",
        "eos_token_id": 3,
    },
    {"monkey": "george", "key_frames": "all", "keyboard": "qwerty", "hockey": "ice", "primary_key": "id"},
    {"key": "question", "keys": ["image", "answer"], "answer_key": "B", "sort_key": "length"},
    {"token": "<think>", "tokens": ["a", "b"], "token_budget": 5, "tokenizer": "Qwen/Qwen3-VL-4B-Instruct"},
    {"secret": 42, "secretary": "ann", "secret_word_length": 5, "password_length": 8, "author": "me"},
    {"api_key": None, "password": "", "auth_token": False, "use_auth_token": True},
    {
        "sha": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        "md5": "9e107d9d372bb6826bd81d3542a419d6",
    },
    {"commit": "34e859f0c1d2b3a4958677889900aabbccddeeff", "uuid": "123e4567-e89b-12d3-a456-426614174000"},
    {"url": "http://10.0.0.7:8000/v1?max_tokens=5", "email": "me@host.org", "ssh": "git@host.org:a/b.git"},
    {"path": "/data/task-2024-01-results-A1", "lib": "sk-learn-1.5-baseline", "hub": "hf_hub_download_v2"},
    {"prompt": "The secret password is the bearer of all keys. Basic arithmetic: a=1, key=b, tokens=3 --verbose 1"},
    {"max_new_tokens": 8, "tokenizer_name": "bpe", "num_tokens": "3", "token_type": "image", "tokens_per_step": "9"},
    {"key_size": "2048", "keypoints": "x,y", "keywords": ["a"], "foreign_key": "row", "keyframe": "12", "turkey": "a"},
    {"passage": "p. 3", "passing_grade": "C", "compass": "N", "bypass": "no", "authority": "us", "authors": "a, b"},
    {"secretion": "x", "bearer_of_news": "bob", "cwd": "/a", "pwd_note": "", "hash_key": "sha256", "group_key": "id"},
    {"target": "my_package.api_key:password", "time": "12:30@noon", "ratio": "3:2@x"},
)


@pytest.mark.parametrize(("tree", "key"), LEAKS, ids=str)
def test_a_secret_is_found_and_hidden(tree: dict[str, Any], key: str) -> None:
    assert find_secrets(tree) == [key]
    assert find_secrets({"task": {"args": tree}}) == [f"task.args.{key}"]
    shown = str(redacted(tree))
    assert "(hidden)" in shown
    assert S not in shown
    assert "sk-proj" not in shown


@pytest.mark.parametrize("value", VALUES)
def test_a_value_is_a_secret_by_its_form(value: str) -> None:
    assert is_secret_value(value)
    assert find_secrets({"anything": [value]}) == ["anything[0]"]
    assert is_secret_value(f"use {value} please")


@pytest.mark.parametrize("tree", INNOCENT, ids=str)
def test_what_only_looks_like_a_secret_is_left_alone(tree: dict[str, Any]) -> None:
    assert find_secrets(tree) == []
    assert redacted(tree) == tree


def test_names() -> None:
    assert is_secret_name("task.args.openaiApiKey")
    assert not is_secret_name("monkey")


def test_redacting_leaves_the_tree_alone() -> None:
    tree = {"args": [{"api_key": "hunter2"}], "pair": (1, 2)}
    assert redacted(tree) == {"args": [{"api_key": "(hidden)"}], "pair": [1, 2]}
    assert tree == {"args": [{"api_key": "hunter2"}], "pair": (1, 2)}


WORDS = (
    (f"++task.args.api_key={S}", "++task.args.api_key=(hidden)"),
    (f"task.args.headers.Authorization='Bearer {S}'", "task.args.headers.Authorization=(hidden)"),
    (f"task.args.clients=[{{name: a, api_key: {S}}}]", "task.args.clients=[{name: a, api_key: (hidden)}]"),
    (f"model.name=https://u:{S}@h/x", "model.name=https://(hidden)@h/x"),
    ("task.args.x=sk-proj-abcDEF123456", "task.args.x=(hidden)"),
    ("sk-proj-abcDEF123456", "(hidden)"),
    ("task.args.tokenizer=bpe", "task.args.tokenizer=bpe"),
    ("orchestrator.max_new_tokens=8", "orchestrator.max_new_tokens=8"),
    ("inference.urls=[http://10.0.0.7:8000]", "inference.urls=[http://10.0.0.7:8000]"),
    ("--multirun", "--multirun"),
)


@pytest.mark.parametrize(("word", "shown"), WORDS)
def test_the_words_of_a_command_line(word: str, shown: str) -> None:
    assert redacted_words([word]) == [shown]


def test_a_message_quotes_no_secret(capsys: pytest.CaptureFixture[str]) -> None:
    assert report(ConfigError(f"model.name=https://me:{S}@host and sk-proj-abcDEF123456 do not exist")) == 2
    assert capsys.readouterr().err == "error: model.name=https://(hidden)@host and (hidden) do not exist\n"


def test_the_table_is_long_enough() -> None:
    innocent = sum(len(tree) for tree in INNOCENT)
    assert len(LEAKS) + len(VALUES) >= 50
    assert innocent >= 50
