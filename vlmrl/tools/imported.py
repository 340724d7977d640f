"""`tool=[my_module:fn]`: a function of your own. Its type hints become the JSON schema of its arguments, its docstring
the description, and the part of the docstring below `Args:` the descriptions of the arguments.

    def count(image: Image, what: str) -> int:
        '''Count things in an image.

        Args:
            what: What is counted, in one word.
        '''

A parameter whose type is an image (`vlmrl.Image`, a PIL image, a numpy array) is the number of an image in the call;
the function gets the image itself, with all pixels that the task gave.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image as PILImage

from vlmrl.config.import_paths import import_named
from vlmrl.config.tool import ImportedTool
from vlmrl.errors import ConfigError
from vlmrl.rendering.images import Pixels
from vlmrl.tools.base import image_at
from vlmrl.tools.schema import IMAGE_TYPES, check_arguments, description_of, example_of, parameters_of
from vlmrl.types import Image, ToolSpec


@dataclass(frozen=True)
class Imported:
    """The tool of an `ImportedTool`."""

    config: ImportedTool
    spec: ToolSpec
    function: Callable[..., Any]
    images: Mapping[str, Any]
    """Parameters that are images → their type."""

    @classmethod
    def of(cls, config: ImportedTool, name: str, key: str) -> Imported:
        """The tool at `key`. Raises `ConfigError` where there is no such function, or where it cannot be described."""
        target = f"{key}.target"
        function = import_named(target, config.target, "tool function", callable, inspect.isfunction)
        names = inspect.signature(function).parameters
        if stray := [each for each in config.args if each not in names]:
            raise ConfigError(
                f"{key}.args.{stray[0]} names no parameter of {config.target}, so no call could use it: leave it out, "
                f"or write one of {', '.join(names) or 'none'}"
            )
        description = config.description or description_of(function)
        if not description:
            raise ConfigError(
                f"{target}={config.target} has no docstring, so the policy would not know what it does: write one, or "
                f"set {key}.description"
            )
        parameters = parameters_of(target, config.target, function, config.args)
        hints = inspect.get_annotations(function, eval_str=True)
        images = {each: _image_type(hint) for each, hint in hints.items() if _image_type(hint) is not None}
        images = {each: kind for each, kind in images.items() if each in parameters["properties"]}
        return cls(config, ToolSpec(name, description, parameters), function, images)

    @property
    def timeout_s(self) -> float:
        return self.config.timeout_s

    @property
    def example(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = example_of(self.spec.parameters)
        return found

    def call(self, arguments: Mapping[str, Any], images: Sequence[Pixels]) -> Any:
        check_arguments(self.spec.parameters, arguments)
        given = {
            name: _as_type(image_at(images, value, name), self.images[name]) if name in self.images else value
            for name, value in arguments.items()
        }
        return self.function(**given, **self.config.args)


def _image_type(hint: Any) -> Any:
    """The image type of a hint; None for another hint."""
    kind = getattr(hint, "__origin__", hint)
    return kind if kind in IMAGE_TYPES else None


def _as_type(pixels: Pixels, kind: Any) -> Any:
    """An image as the function takes it. A copy: the function may draw on it."""
    own = np.array(pixels)
    if kind is Image:
        return Image(own)
    return own if kind is np.ndarray else PILImage.fromarray(own)
