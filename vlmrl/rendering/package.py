"""The renderers that grammar.py asks: those of the `renderers` package, and the user's own.

A renderer of the user's own is a class that `orchestrator.renderer.name=my_module:MyRenderer` names. It is called as
`MyRenderer(tokenizer, processor=…, **options)` and has the methods of `OwnRenderer`; a subclass of one of the package's
renderers has them all. Its renders and bridges are checked like those of the package.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from vlmrl.config.import_paths import import_named, is_import_path, user_code
from vlmrl.errors import ConfigError

KEY = "orchestrator.renderer.name"


class OwnRenderer(Protocol):
    """What a renderer of the user's own has. Messages are `{"role", "content"}`; `content` is a text, or a list of
    `{"type": "text", "text"}` and `{"type": "image", "image"}`.

    For tools (`tool=`) it also has `parse_response(token_ids, *, tools, prompt_ids=None)`, which returns a
    `renderers.ParsedResponse`, and `render` and `bridge_to_next_turn` take `tools=[{"type": "function", …}]`; messages
    may then have `tool_calls`, `tool_call_id`, `name` and `reasoning_content`.

    `render` and `bridge_to_next_turn` return `renderers.RenderedTokens`: `token_ids`, `sampled_mask` and
    `message_indices` by token (empty where they are not known), and for images `multi_modal_data` with placeholders and
    what `processor(images=[image], return_tensors="np")` returned for each image, unchanged.
    """

    mm_token_type_id_map: Mapping[int, int]
    """The ids of image tokens → 1; only where `is_multimodal` is True."""
    is_multimodal: bool

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool) -> Any:
        """The tokens of a conversation."""
        ...

    def bridge_to_next_turn(
        self,
        previous_prompt_ids: Sequence[int],
        previous_completion_ids: Sequence[int],
        new_messages: Sequence[Mapping[str, Any]],
        previous_multi_modal_data: Any = None,
    ) -> Any:
        """The tokens before, then the new messages up to the next answer; None where that is not possible. The last
        argument is given where `is_multimodal` is True."""
        ...

    def get_stop_token_ids(self) -> Sequence[int]:
        """Tokens that end a generation, first the one that closes a turn."""
        ...


class Renderers:
    """Makes the renderer of a name, as often as it is needed."""

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        """Raises `ConfigError` for a name or for options that there are not."""
        self._name = name
        self._options = dict(options)
        self._own = import_named(KEY, name, "renderer class", callable) if is_import_path(name) else None
        self._config: Any = None if self._own is not None else package_config(name, options)

    def make(self, tokenizer: Any, processor: Any) -> Any:
        """A renderer. `processor` is None for a text-only model, and where no image is rendered yet."""
        if self._own is not None:
            with user_code(KEY, self._name, f"{self._name}(tokenizer, processor=…)", "renderer class"):
                return self._own(tokenizer, processor=processor, **self._options)
        import renderers

        made = renderers.create_renderer(tokenizer, self._config)
        return type(made)(tokenizer, self._config, processor=processor) if processor is not None else made


def package_config(name: str, options: Mapping[str, Any], key: str = KEY) -> Any:
    """The package's config of a renderer. `key` is the setting that has the name. Raises `ConfigError`."""
    import renderers

    try:
        known: Any = type(renderers.config_from_name(name))
    except ValueError as error:
        raise ConfigError(
            f"{key}={name} is not a name of the `renderers` package, so nothing would make tokens: set it to one of "
            f"its names ({error}), to template, or to the import path of a renderer of your own"
        ) from error
    fields = {field for field in getattr(known, "model_fields", {}) if field not in ("name", "image_cache_max")}
    if unknown := sorted(options.keys() - fields):
        raise ConfigError(
            f"orchestrator.renderer.options.{unknown[0]} is no option of the renderer {name}, so it would change "
            f"nothing: its options are {', '.join(sorted(fields))}"
        )
    # The package would keep hundreds of processed images alive; the ImageStore already holds them.
    bounded = {"image_cache_max": 1} if "image_cache_max" in known.model_fields else {}
    try:
        return known(**options, **bounded)
    except ValueError as error:
        raise ConfigError(
            f"orchestrator.renderer.options={dict(options)} does not fit the renderer {name}, so nothing would make "
            f"tokens: correct the value ({error})"
        ) from error
