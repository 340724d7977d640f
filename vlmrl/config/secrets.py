"""What looks like a secret: the one rule that the check, the report and the loggers share.

A value is a secret because of its name (`api_key`, `dbPassword`, `Authorization`) or because of its own form
(`sk-…`, `hf_…`, `https://user:password@host`). Names that only contain a secret's word are left alone: `max_tokens`,
`stop_token`, `monkey`, `key_frames`. So are hashes, which cannot be told from a key by their form.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

HIDDEN = "(hidden)"
"""What `redacted` writes in place of a secret."""

PASSWORD_NAME = re.compile(r"(^|_)(passwords?|passwd|pwd|passphrase)$")
"""Names whose value is a secret even where it is a number."""

SECRET_NAME = re.compile(
    r"""(^|_)(
        (client_?)?secrets? (_(key|token|value))? | credentials? | authorization | bearer | jwt
        | (api|auth|access|secret|private|signing|encryption|ssh|deploy|account|subscription|service|master
           |openai|anthropic|gemini|google|azure|aws|hf|huggingface|wandb|openrouter|mistral|groq) _?keys?
        | (api|auth|access|oauth|refresh|session|security|bearer|personal|private|secret|login
           |hf|hub|huggingface|github|gh|gitlab|wandb|openai|slack) _?tokens?
    )$""",
    re.VERBOSE,
)
"""Names, in lower case and with underscores, whose text is a secret."""

SECRET_VALUE = re.compile(
    r"""
      (?<![A-Za-z0-9]) sk-(?!learn)(?=[\w-]*[0-9A-Z])[\w-]{8,}            # OpenAI, Anthropic
    | (?<![A-Za-z0-9_]) hf_(?=[A-Za-z0-9]*[0-9A-Z])[A-Za-z0-9]{12,}       # Hugging Face
    | (?<![A-Za-z0-9_]) (gh[opsur]_[A-Za-z0-9]{16,} | github_pat_\w{16,} | glpat-[\w-]{16,})
    | (?<![A-Za-z0-9_]) xox[abeprs]-[\w-]{8,}                             # Slack
    | (?<![A-Za-z0-9]) (AKIA|ASIA)[0-9A-Z]{16} (?![A-Za-z0-9])            # AWS
    | (?<![A-Za-z0-9]) AIza[\w-]{30,}                                     # Google
    | (?<![A-Za-z0-9]) eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*                    # JSON web token
    | -----BEGIN\ [A-Z\ ]*PRIVATE\ KEY-----
    | \b[Bb]earer\ +(?=[^\s]*[0-9A-Z])[\w.~+/=-]{8,}
    | ://[^\s/?\#@:]*:[^\s/?\#@]+@                                      # a URL with a password,
    | ://(?=[^\s/@]*[0-9])[\w.~-]{16,}@                                 # or with a token in place of the user
    """,
    re.VERBOSE,
)
"""Forms that are secrets under any name."""

ASSIGNMENT = re.compile(
    r"(?<![\w-])(?:--?)?([A-Za-z][\w-]*)=[^\s&;,] | (?<!\S)--([A-Za-z][\w-]*)\s+[^\s-] | [?&](token)=[^&\s]", re.VERBOSE
)
"""`name=value`, `--name value` and `?token=value` inside a text: connection strings, commands, queries of URLs."""

USER_OF_URL = re.compile(r"(?<=://)[^\s/?#@]+@")

OPAQUE = re.compile(r"(?=.*[0-9])(?=.*[A-Za-z])((?=.*[a-z])(?=.*[A-Z])[\w.~+/=-]{8,}|[\w.~+/=-]{20,})")
"""Text that no one would choose as a word."""


def is_secret_name(name: str) -> bool:
    """Whether a text under this name is a secret.

    >>> [name for name in ("api_key", "openaiApiKey", "DB-Password", "headers.Authorization") if is_secret_name(name)]
    ['api_key', 'openaiApiKey', 'DB-Password', 'headers.Authorization']
    >>> [name for name in ("max_tokens", "stop_token", "monkey", "key_frames", "primary_key") if is_secret_name(name)]
    []
    """
    return bool(_matches(PASSWORD_NAME, name) or _matches(SECRET_NAME, name))


def is_secret_value(text: str) -> bool:
    """Whether a text is, or holds, a secret by its own form.

    >>> is_secret_value("sk-proj-9f8e7d6c5b4a"), is_secret_value("https://user:hunter2@host/x")
    (True, True)
    >>> is_secret_value("e3b0c44298fc1c149afbf4c8996fb92427ae41e4"), is_secret_value("http://10.0.0.7:8000")
    (False, False)
    """
    return SECRET_VALUE.search(text) is not None or any(
        found[3] or is_secret_name(found[1] or found[2]) for found in ASSIGNMENT.finditer(text)
    )


def find_secrets(tree: Any) -> list[str]:
    """Dotted keys of the secrets in a tree of mappings, lists and values.

    >>> find_secrets({"args": {"level": 3, "clients": [{"api_key": "hunter2"}], "url": "ftp://me:pw@host"}})
    ['args.clients[0].api_key', 'args.url']
    """
    return list(_secrets_in(tree, "", ""))


def redacted(tree: Any) -> Any:
    """A copy of a tree with `HIDDEN` in place of each secret. Of a URL, only its user and password are hidden.

    >>> redacted({"level": 3, "api_key": "hunter2", "urls": ["http://host", "http://me:pw@host"]})
    {'level': 3, 'api_key': '(hidden)', 'urls': ['http://host', 'http://(hidden)@host']}
    """
    return _redacted(tree, "")


def redacted_text(text: str) -> str:
    """A text, such as a message or a line of a log, without the secrets in it.

    >>> redacted_text("model.name=https://me:pw@host is no folder, --api-key sk-proj-9f8e7d6c5b4a")
    'model.name=https://(hidden)@host is no folder, --api-key (hidden)'
    """
    return SECRET_VALUE.sub(HIDDEN, USER_OF_URL.sub(f"{HIDDEN}@", text))


def redacted_words(arguments: Sequence[str]) -> list[str]:
    """The words of a command line without the secrets in them.

    >>> redacted_words(["seed=1", "++task.args.api_key=hunter2", "task.args.clients=[{api_key: hunter2}]"])
    ['seed=1', '++task.args.api_key=(hidden)', 'task.args.clients=[{api_key: (hidden)}]']
    """
    return [_redacted_word(argument) for argument in arguments]


def _redacted_word(argument: str) -> str:
    key, equals, value = argument.partition("=")
    if equals and not value.startswith(("[", "{")):
        return f"{redacted_text(key)}={_redacted(value, key.lstrip('+~'))}"

    def pair(found: re.Match[str]) -> str:
        name, colon, text = found.groups()
        return f"{name}{colon}{HIDDEN if _is_secret(name, text) else text}"

    return redacted_text(re.sub(r"([\w.-]+)(\s*:\s*)([^\s,}\]]+)", pair, argument))


def _secrets_in(tree: Any, key: str, name: str) -> Iterator[str]:
    """`name` decides whether a value is a secret: the last name on the way to it, or a secret's name above it."""
    match tree:
        case Mapping():
            for child, value in tree.items():
                if is_secret_value(str(child)):
                    yield f"{key}.{HIDDEN}".lstrip(".")
                else:
                    yield from _secrets_in(value, f"{key}.{child}".lstrip("."), _inherited(name, str(child)))
        case list() | tuple():
            for index, value in enumerate(tree):
                yield from _secrets_in(value, f"{key}[{index}]", name)
        case _:
            if _is_secret(name, tree):
                yield key


def _redacted(tree: Any, name: str) -> Any:
    match tree:
        case Mapping():
            return {
                HIDDEN if is_secret_value(str(child)) else child: _redacted(value, _inherited(name, str(child)))
                for child, value in tree.items()
            }
        case list() | tuple():
            return [_redacted(value, name) for value in tree]
        case _:
            if not _is_secret(name, tree):
                return tree
            rest = USER_OF_URL.sub(f"{HIDDEN}@", str(tree))
            return HIDDEN if _is_secret(name, rest) else rest


def _inherited(above: str, name: str) -> str:
    return above if above and is_secret_name(above) else name


def _is_secret(name: str, value: Any) -> bool:
    if value is None or isinstance(value, bool) or value == "":
        return False
    if not isinstance(value, str):
        return _matches(PASSWORD_NAME, name)
    match _words(name):
        case "token":  # a special token of a chat template is none
            return re.fullmatch(r"[\w.~+/=-]+", value) is not None
        case "key":  # mostly the name of a column
            return OPAQUE.fullmatch(value) is not None or is_secret_value(value)
        case _:
            return is_secret_name(name) or is_secret_value(value)


def _matches(pattern: re.Pattern[str], name: str) -> bool:
    return pattern.search(_words(name)) is not None


def _words(name: str) -> str:
    """`openaiApiKey`, `OPENAI-API-KEY` → `openai_api_key`."""
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name)
    return re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_").lower()
