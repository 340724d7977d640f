"""The JSON of vLLM's endpoint: our bytes are those of vLLM's own encoder, and both shapes of its answers are read."""

from __future__ import annotations

import base64
import importlib
import warnings
from typing import Any

import numpy as np
import orjson
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from support.image_fields import QWEN, TILED
from vlmrl.config.model import Dtype
from vlmrl.inference.vllm.image_fields import TensorDigest, is_picture, unpack_picture
from vlmrl.inference.vllm.server import vllm_version
from vlmrl.inference.vllm.wire import (
    BANNED_BIAS,
    WireError,
    data_size,
    encode_item,
    parse_answer,
    request_body,
    to_bfloat16,
)
from vlmrl.models import broken_wheels
from vlmrl.types import ImageItem, Placeholder, SamplingParams

SAMPLING = SamplingParams(
    max_new_tokens=5,
    temperature=0.7,
    stop_token_ids=(9,),
    banned_token_ids=(3, 4),
    seed=2**64 - 1,
    top_p=0.9,
    top_k=5,
    stop=("END", "\n"),
)


@pytest.fixture(scope="module")
def vllm() -> Any:
    """`vllm("a.b", "name")` returns `name` of the module `vllm.a.b`, without the warnings of its import."""
    if vllm_version() is None:
        pytest.skip("vLLM is not installed")
    broken_wheels.install()

    def find(module: str, name: str) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return getattr(importlib.import_module(f"vllm.{module}"), name)

    return find


def image(rows: int, columns: int, *, hash: str = "ab", patch_dim: int = 1536) -> ImageItem:
    """`rows` × `columns` patches of random pixels."""
    pixels = np.random.default_rng(rows * 1000 + columns).standard_normal((rows * columns, patch_dim), np.float32)
    return ImageItem(
        hash=hash,
        pixels=np.zeros((rows * 16, columns * 16, 3), np.uint8),
        mm_kwargs={"pixel_values": pixels, "image_grid_thw": np.array([[1, rows, columns]])},
        num_tokens=rows * columns // 4,
    )


@given(npst.arrays(np.float32, npst.array_shapes(max_dims=2), elements=st.floats(width=32, allow_nan=False)))
def test_bfloat16_rounds_as_torch_does(array: np.ndarray) -> None:
    expected = torch.from_numpy(array).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(to_bfloat16(array), expected)


# With these patch dims, the lengths of the raw data need every one of msgpack's encodings of a length.
SIZES = [(2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 2, 15), (2, 2, 16), (2, 4, 1536), (14, 30, 1536)]


@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # vLLM's decoder does not copy tensors
@pytest.mark.parametrize("dtype", [Dtype.float32, Dtype.bfloat16, Dtype.float16])
@pytest.mark.parametrize(("rows", "columns", "patch_dim"), SIZES)
def test_data_of_an_image_is_what_vllms_own_encoder_writes(
    rows: int, columns: int, patch_dim: int, dtype: Dtype, vllm: Any
) -> None:
    from transformers import BatchFeature

    encode = vllm("entrypoints.scale_out.token_in_token_out.mm_serde", "encode_mm_kwargs_item")
    decode = vllm("entrypoints.scale_out.token_in_token_out.mm_serde", "decode_mm_kwargs_item")
    fields_of = vllm("model_executor.models.qwen2_vl", "_create_qwen2vl_field_factory")(2)
    items_type = vllm("multimodal.inputs", "MultiModalKwargsItems")

    item = image(rows, columns, patch_dim=patch_dim)
    pixels = torch.from_numpy(item.mm_kwargs["pixel_values"]).to(getattr(torch, dtype.value))
    grid = torch.from_numpy(item.mm_kwargs["image_grid_thw"])
    inputs = BatchFeature({"pixel_values": pixels, "image_grid_thw": grid})
    (theirs,) = items_type.from_hf_inputs(inputs, fields_of(inputs))["image"]

    theirs = type(theirs)(
        {name: theirs[name] for name in item.mm_kwargs}
    )  # the order of names differs between versions

    ours = base64.b64encode(encode_item(item, dtype, QWEN)).decode()
    assert ours == encode(theirs)
    decoded = decode(ours)
    assert torch.equal(decoded["pixel_values"].data, pixels)
    assert torch.equal(decoded["image_grid_thw"].data, grid[0])
    assert encode(decoded) == ours


@pytest.mark.vllm
def test_a_request_passes_through_vllms_own_model(vllm: Any) -> None:
    request_type = vllm("entrypoints.scale_out.token_in_token_out.protocol", "GenerateRequest")
    first, second = image(2, 2, hash="first"), image(2, 4, hash="second")
    placeholders = (Placeholder(1, 1, "first"), Placeholder(3, 2, "second"), Placeholder(6, 1, "first"))
    data = {"second": encode_item(second, Dtype.bfloat16, QWEN)}
    token_ids = np.arange(8)

    request = request_type.model_validate_json(request_body("train/1/2", token_ids, placeholders, data, SAMPLING))
    assert request.request_id == "train/1/2"
    assert request.token_ids == token_ids.tolist()
    assert request.features is not None
    assert request.features.mm_hashes == {"image": ["first", "second", "first"]}
    assert [(p.offset, p.length) for p in request.features.mm_placeholders["image"]] == [(1, 1), (3, 2), (6, 1)]
    assert request.features.kwargs_data == {"image": [None, base64.b64encode(data["second"]).decode(), None]}
    params = request.sampling_params
    assert (params.temperature, params.max_tokens, params.seed) == (0.7, 5, 2**64 - 1)
    assert (params.top_p, params.top_k) == (0.9, 5)
    assert params.stop_token_ids == [9]
    assert (params.stop, params.detokenize) == (["END", "\n"], True)
    assert params.ignore_eos
    assert params.logit_bias == {3: BANNED_BIAS, 4: BANNED_BIAS}
    assert params.logprobs == 0
    assert params.output_kind is vllm("sampling_params", "RequestOutputKind").FINAL_ONLY
    assert len(encode_item(first, Dtype.float32, QWEN)) > data_size(first, Dtype.float32, QWEN)


def test_a_text_prompt_has_no_features() -> None:
    body = orjson.loads(request_body("r", np.arange(3), (), {}, SAMPLING))
    assert "features" not in body


@pytest.mark.parametrize("dtype", [Dtype.float32, Dtype.bfloat16, Dtype.float16])
def test_data_size_is_the_size_of_the_data(dtype: Dtype) -> None:
    item = image(4, 6)
    encoded = encode_item(item, dtype, QWEN)
    assert 0 <= len(encoded) - data_size(item, dtype, QWEN) < 300
    assert len(encoded) > item.mm_kwargs["pixel_values"].size * (4 if dtype is Dtype.float32 else 2)


def test_an_image_of_which_vllm_makes_other_tensors_is_sent_as_its_picture() -> None:
    tiled = image(2, 2)
    document = encode_item(tiled, Dtype.bfloat16, TILED)
    picture = unpack_picture(document)
    assert is_picture(memoryview(document))
    np.testing.assert_array_equal(picture.pixels, tiled.pixels)
    assert picture.num_tokens == tiled.num_tokens
    bits = torch.from_numpy(tiled.mm_kwargs["pixel_values"]).to(torch.bfloat16).view(torch.int16).numpy()
    assert picture.tensors["pixel_values"] == TensorDigest.of(bits, is_float=True)
    assert 0 <= len(document) - data_size(tiled, Dtype.bfloat16, TILED) < 500


def answer(**changes: Any) -> bytes:
    choice = {
        "token_ids": [5, 9],
        "finish_reason": "stop",
        "logprobs": {"content": [{"token_id": 5, "logprob": -1.0}, {"token_id": 9, "logprob": -0.5}]},
        "weight_versions": [{"version": "2", "start": 0, "end": 1}, {"version": "3", "start": 1, "end": 2}],
    }
    return orjson.dumps({"choices": [choice | changes]})


def test_the_newer_shape_of_an_answer() -> None:
    read = parse_answer(answer())
    assert read.token_ids.tolist() == [5, 9]
    assert read.logprobs.tolist() == [-1.0, -0.5]
    assert read.versions is not None
    assert read.versions.tolist() == [2, 3]
    assert read.finish_reason == "stop"


def test_the_older_shape_of_an_answer() -> None:
    content = [{"token": "token_id:5", "logprob": -1.0, "bytes": None}, {"token": "token_id:9", "logprob": -0.5}]
    read = parse_answer(answer(logprobs={"content": content}, weight_versions=None))
    assert read.token_ids.tolist() == [5, 9]
    assert read.logprobs.tolist() == [-1.0, -0.5]
    assert read.versions is None


def test_an_empty_answer_is_an_answer() -> None:
    read = parse_answer(answer(token_ids=[], logprobs={"content": []}, weight_versions=[], finish_reason="abort"))
    assert len(read.token_ids) == len(read.logprobs) == 0


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b'{"choices": []}',
        answer(logprobs=None),
        answer(logprobs={"content": [{"token_id": 5, "logprob": -1.0}]}),
        answer(token_ids=[5, 8]),
        answer(logprobs={"content": [{"token_id": 5, "logprob": -1.0}, {"token_id": 9, "logprob": -9999.0}]}),
        answer(logprobs={"content": [{"token_id": 5, "logprob": -1.0}, {"token_id": 9, "logprob": None}]}),
        answer(weight_versions=[{"version": "2", "start": 0, "end": 1}]),
        answer(weight_versions=[{"version": "default", "start": 0, "end": 2}]),
    ],
)
def test_a_malformed_answer_is_refused(body: bytes) -> None:
    with pytest.raises(WireError):
        parse_answer(body)
