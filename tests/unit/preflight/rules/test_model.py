"""Rules about the model and its renderer that need more than the configuration."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from vlmrl.config.run import RunConfig
from vlmrl.errors import ConfigError
from vlmrl.preflight.rules.model import renderer_exists, renderer_serves_family
from vlmrl.preflight.site import this_site


def test_a_renderer_that_the_package_has(run_config: Callable[..., RunConfig]) -> None:
    renderer_exists(run_config(), this_site())


def test_an_unknown_renderer_is_refused(run_config: Callable[..., RunConfig]) -> None:
    config = run_config("model=qwen3vl", "~model/vlm", "model.name=some/text", "orchestrator.renderer.name=qwen33")
    with pytest.raises(ConfigError, match=r"renderer\.name=qwen33 is not a name of the `renderers` package"):
        renderer_exists(config, this_site())


def test_an_unknown_option_of_a_renderer_is_refused(run_config: Callable[..., RunConfig]) -> None:
    config = run_config("+orchestrator.renderer.options.thinks=true")
    with pytest.raises(ConfigError, match=r"options\.thinks is no option of the renderer qwen3-vl"):
        renderer_exists(config, this_site())


@pytest.mark.parametrize("name", ["template", "support.own_renderers:Quoting"])
def test_a_template_and_an_own_renderer_serve_any_family(run_config: Callable[..., RunConfig], name: str) -> None:
    config = run_config(f"orchestrator.renderer.name={name}", "model.vlm.renderers=[]")
    renderer_serves_family(config)
    renderer_exists(config, this_site())


def test_an_unknown_renderer_of_a_family_is_refused(run_config: Callable[..., RunConfig]) -> None:
    config = run_config("model.vlm.renderers=[qwen33]")
    with pytest.raises(ConfigError, match=r"model\.vlm\.renderers=qwen33 is not a name of the `renderers` package"):
        renderer_exists(config, this_site())
