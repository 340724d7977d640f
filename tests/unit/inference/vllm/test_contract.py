"""What the run needs of vLLM, asked of vLLM's own classes without an engine: a release that drops or renames a field,
a route or a method fails here by its name. vLLM ignores unknown fields of a request, so nothing else would say it.
"""

from __future__ import annotations

import importlib
import inspect
import re
import warnings
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

import vlmrl
from support.image_fields import QWEN
from vlmrl.config.inference import VllmConfig
from vlmrl.config.model import Dtype
from vlmrl.inference.vllm import old_vllm
from vlmrl.inference.vllm.arguments import NEW_FLAGS, SERVER_FLAGS, command_line, server_arguments
from vlmrl.inference.vllm.client import ENDPOINT, ROUTE_FLAG
from vlmrl.inference.vllm.frames import ROUTE, request_header
from vlmrl.inference.vllm.server import vllm_version
from vlmrl.inference.vllm.wire import encode_item, parse_answer, picture_request_body, request_body
from vlmrl.models import broken_wheels
from vlmrl.types import ImageItem, Placeholder, SamplingParams

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(vllm_version() is None, reason="vLLM is not installed"),
    pytest.mark.skipif(old_vllm.is_old(vllm_version() or (0, 0)), reason="vLLM 0.26 has other modules"),
]

SAMPLING = SamplingParams(5, 0.7, (9,), (3, 4), seed=2**63 - 1, top_p=0.9, top_k=5)
IMAGE = ImageItem(
    "ab",
    np.zeros((32, 32, 3), np.uint8),
    {"pixel_values": np.ones((4, 6), np.float32), "image_grid_thw": np.array([[1, 2, 2]])},
    1,
)
PLACEHOLDERS = (Placeholder(1, 1, "ab"), Placeholder(3, 1, "held"))
DATA = {"ab": encode_item(IMAGE, Dtype.float32, QWEN)}
PROTOCOL = "entrypoints.scale_out.token_in_token_out.protocol"


def vllm(module: str, name: str) -> Any:
    """`name` of the module `vllm.<module>`."""
    broken_wheels.install()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(importlib.import_module(f"vllm.{module}"), name)


# ── requests and answers ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "body",
    [
        request_body("train/1/2", np.arange(8), PLACEHOLDERS, DATA, SAMPLING),
        picture_request_body("train/1/2", [1, 7, 2, 7], ["ab", "held"], {"ab": b"data:image/png;base64,AA"}, SAMPLING),
    ],
    ids=["features", "content_parts"],
)
def test_a_request_keeps_every_field(body: bytes) -> None:
    sent = orjson.loads(body)
    read = vllm(PROTOCOL, "GenerateRequest").model_validate_json(body)
    assert set(sent) <= set(type(read).model_fields)
    params = read.sampling_params
    assert set(sent["sampling_params"]) <= set(type(params).__struct_fields__)
    for name, value in sent["sampling_params"].items():
        if name == "logit_bias":
            value = {int(token): bias for token, bias in value.items()}
        kept = getattr(params, name)
        assert getattr(kept, "value", kept) == value, name
    assert read.token_ids == sent["token_ids"]
    assert read.content_parts == sent.get("content_parts")
    assert read.return_token_ids == sent.get("return_token_ids")
    if "features" in sent:
        assert set(sent["features"]) <= set(type(read.features).model_fields)
        (first, _) = read.features.mm_placeholders["image"]
        assert set(sent["features"]["mm_placeholders"]["image"][0]) <= set(type(first).model_fields)
        kept = {name: getattr(read.features, name) for name in ("mm_hashes", "kwargs_data")}
        assert kept == {name: sent["features"][name] for name in kept}


def test_the_parts_of_a_picture_are_those_that_vllm_reads() -> None:
    """`content_parts` are dicts without a schema: vLLM reads keys out of them."""
    source = inspect.getsource(vllm("entrypoints.scale_out.token_in_token_out.serving", "ServingTokens").serve_tokens)
    (part, _) = orjson.loads(picture_request_body("r", [1], ["ab", "cd"], {"ab": b"x"}, SAMPLING))["content_parts"]
    assert set(part) == {"type", "url", "uuid"}
    assert set(re.findall(r"part\.get\(\"(\w+)\"", source)) >= set(part)
    assert f'ptype == "{part["type"]}"' in source


def test_an_answer_has_all_that_is_read() -> None:
    name = {each: vllm(PROTOCOL, each) for each in ("GenerateTokensResponse", "GenerateTokensChoice")}
    logprobs = vllm(PROTOCOL, "GenerateLogProbs")(content=[{"token_id": 5, "logprob": -1.0, "rank": 2}])
    span = vllm("outputs", "WeightVersionSpan")(version="3", start=0, end=1)
    choice = name["GenerateTokensChoice"](
        index=0, token_ids=[5], logprobs=logprobs, finish_reason="length", weight_versions=[span]
    )
    answer = name["GenerateTokensResponse"](request_id="r", choices=[choice], prompt_token_ids=[1, 7])
    read = parse_answer(answer.model_dump_json().encode())
    assert (read.token_ids.tolist(), read.logprobs.tolist(), read.finish_reason) == ([5], [-1.0], "length")
    assert read.versions is not None
    assert read.versions.tolist() == [3]
    assert read.prompt_token_ids is not None
    assert read.prompt_token_ids.tolist() == [1, 7]


# ── the server ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def arguments() -> Any:
    """The run's command line, as vLLM's own parser reads it."""
    parser = vllm("utils.argparse_utils", "FlexibleArgumentParser")()
    ours = server_arguments(VllmConfig(dtype=Dtype.bfloat16), Path("/ckpt"), (0, 32), on_cpu=True)
    words = command_line({"uds": "/socket"} | ours)
    read = vllm("entrypoints.launchers.cli_args", "make_arg_parser")(parser).parse_args(words)
    for name, value in (SERVER_FLAGS | NEW_FLAGS | {"hf_overrides": {"head_dtype": "float32"}}).items():
        assert getattr(read, name) == value, name
    return read


@pytest.fixture(scope="module")
def app(arguments: Any) -> Iterator[Any]:
    """The app of a server, without an engine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_SERVER_DEV_MODE", "1")
        patch.setenv("VLLM_API_KEY", "key")  # which the middleware reads
        yield vllm("entrypoints.launchers.app", "build_app")(arguments, ("generate",))


def test_the_app_has_every_route_that_the_run_calls(app: Any) -> None:
    package = Path(vlmrl.__file__).parent
    callers = [*(package / "inference" / "vllm").glob("*.py"), *(package / "weight_sync").glob("*.py")]
    called = {path for file in callers for path in re.findall(r"\"(/[a-z][a-z0-9_/]*)\"", file.read_text())}
    assert {ENDPOINT, "/collective_rpc", "/pause", "/reset_encoder_cache", "/update_weight_version"} <= called
    routes = {route.path for route in app.routes}
    assert sorted(called - routes - {ROUTE, "/dev/shm", "/tmp"}) == []


def test_the_app_has_the_runs_middleware(app: Any) -> None:
    names = [f"{each.cls.__module__}.{each.cls.__name__}" for each in app.user_middleware]
    assert "vlmrl.inference.vllm.in_server.guard.RequireKey" in names
    module, _, name = ROUTE_FLAG.split()[1].rpartition(".")
    assert inspect.isclass(getattr(importlib.import_module(module), name))


# ── the engine, behind the run's own endpoint and in the workers ────────────────────────────────────────────


def test_the_engine_has_what_the_runs_endpoint_uses() -> None:
    engine = vllm("v1.engine.async_llm", "AsyncLLM")
    assert list(inspect.signature(engine.add_request).parameters)[1:4] == ["request_id", "prompt", "params"]
    assert "internal" in inspect.signature(engine.abort).parameters
    assert isinstance(engine.errored, property)
    assert "model_config" in vllm("engine.protocol", "EngineClient").__annotations__
    assert callable(vllm("config", "ModelConfig").get_vocab_size)
    collector = vllm("v1.engine.output_processor", "RequestOutputCollector")
    assert callable(collector.get_nowait)
    assert inspect.iscoroutinefunction(collector.get)
    assert "request_id" in inspect.getsource(collector.__init__)
    completion = {field.name for field in fields(vllm("outputs", "CompletionOutput"))}
    assert {"token_ids", "logprobs", "finish_reason", "weight_versions"} <= completion
    assert {"token_ids", "logprobs"} <= {field.name for field in fields(vllm("logprobs", "FlatLogprobs"))}
    assert issubclass(vllm("v1.engine.exceptions", "EngineDeadError"), Exception)


def test_the_engine_gets_every_sampling_parameter_and_image_token() -> None:
    from vlmrl.inference.vllm.in_server.route import _engine_input, _sampling_params

    place = Placeholder(1, 4, "ab", gaps=((2, 1),))
    header = orjson.loads(
        orjson.dumps(
            request_header("train/1/2", np.arange(8), [place], SAMPLING, is_whole=True),
            option=orjson.OPT_SERIALIZE_NUMPY,
        )
    )
    params = _sampling_params(header, vocabulary=100)
    assert (params.temperature, params.top_p, params.top_k, params.max_tokens) == (0.7, 0.9, 5, 5)
    assert (params.seed, params.stop_token_ids, params.ignore_eos) == (2**63 - 1, [9], True)
    assert (params.logprobs, params.flat_logprobs, params.skip_clone) == (0, True, True)
    assert params.logit_bias.keys() == {3, 4}
    reporting = _sampling_params(header | {"min_p": 0.25, "reported": 13}, vocabulary=100)
    assert (reporting.min_p, reporting.logprobs) == (0.25, 13)
    assert _sampling_params(header | {"reported": 130}, vocabulary=100).logprobs == 100
    made = _engine_input(header, {"ab": vllm("multimodal.inputs", "MultiModalKwargsItem").dummy()})
    assert made["prompt_token_ids"] == list(range(8))
    assert made["mm_hashes"] == {"image": ["ab"]}
    (range_,) = made["mm_placeholders"]["image"]
    assert (range_.offset, range_.length, range_.is_embed.tolist()) == (1, 4, [True, True, False, True])


def test_the_engine_gets_videos_and_images_by_their_kinds() -> None:
    """A video of Qwen3-VL begins one token early for vLLM, whose model looks for the begin of each frame from there."""
    from vlmrl.inference.vllm.in_server.route import _engine_input

    places = [Placeholder(2, 5, "film", ((1, 3),), "video"), Placeholder(8, 1, "ab")]
    header = request_header("r", np.arange(10), places, SAMPLING, is_whole=True, leads=["video"])
    made = _engine_input(orjson.loads(orjson.dumps(header, option=orjson.OPT_SERIALIZE_NUMPY)), {})
    assert made["mm_hashes"] == {"video": ["film"], "image": ["ab"]}
    (film,), (image,) = made["mm_placeholders"]["video"], made["mm_placeholders"]["image"]
    assert (film.offset, film.length, film.is_embed.tolist()) == (1, 6, [False, True, False, False, False, True])
    assert (image.offset, image.length, image.is_embed) == (8, 1, None)


@pytest.mark.parametrize("frames", [2, 5])
def test_positions_in_the_server_are_the_trainers(frames: int) -> None:
    """vLLM's own are the same up to the end of a video, and after a short one. After a long one they go on from its
    last frame, which the doctored model does not."""
    from types import SimpleNamespace

    import torch

    from vlmrl.inference.vllm.in_server.positions import count_as_the_trainer, rotary_positions

    elem, batched = (
        vllm("multimodal.inputs", "MultiModalFieldElem"),
        vllm("multimodal.inputs", "MultiModalBatchedField"),
    )

    def feature(kind: str, offset: int, grid: list[int], **more: Any) -> Any:
        data = {f"{kind}_grid_thw": torch.tensor(grid), **more}
        item = vllm("multimodal.inputs", "MultiModalKwargsItem")({k: elem(v, batched()) for k, v in data.items()})
        place = vllm("multimodal.inputs", "PlaceholderRange")(offset, grid[0] * grid[1] * grid[2] // 4)
        return vllm("multimodal.inputs", "MultiModalFeatureSpec")(item, kind, "", place)

    film = feature("video", 3, [frames, 4, 6], second_per_grid_ts=torch.tensor(0.5))
    features = [feature("image", 5 + 6 * frames, [1, 4, 4]), film]
    config = SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2, tokens_per_second=2))
    model_class: Any = vllm("model_executor.models.qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration")
    model = SimpleNamespace(config=config)
    model.iter_mm_grid_thw = lambda features: model_class.iter_mm_grid_thw(model, features)
    length = 6 * frames + 12
    theirs, behind = model_class.get_mrope_input_positions(model, list(range(length)), features)
    end = 3 + 6 * frames
    ours = rotary_positions(length, features, 2, 2)
    np.testing.assert_array_equal(ours[:, :end], theirs.numpy()[:, :end])
    assert np.array_equal(ours, theirs.numpy()) == (frames == 2)
    model.get_mrope_input_positions = None
    count_as_the_trainer(model, config)
    made, ours_behind = model.get_mrope_input_positions(list(range(length)), features)
    np.testing.assert_array_equal(made.numpy(), ours)
    assert ours_behind + length == ours[:, -1].max() + 1
    assert (ours_behind == behind) == (frames == 2)


def test_a_worker_can_have_the_runs_methods() -> None:
    from vlmrl.inference.vllm.in_server.worker import WorkerInspector

    worker = vllm("v1.worker.gpu_worker", "Worker")
    assert "weights_path" in inspect.signature(worker.reload_weights).parameters or "kwargs" in str(
        inspect.signature(worker.reload_weights)
    )
    ours = {name for name in dir(WorkerInspector) if not name.startswith("__")}
    assert sorted(name for name in ours if hasattr(worker, name)) == []
