"""Small data sets with exactly the columns and types of public layouts, and the command that starts each.

Every fixture says where its columns were transcribed from. The pictures are generated: a grey square whose shade is the
row's number. `LAYOUTS` is a list of builders; `write(folder)` makes the files and returns what a test needs.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

ROWS = 24


@dataclass(frozen=True)
class Layout:
    """One layout: how its rows are made, and what has to come out."""

    name: str
    source: str
    """Where the columns were transcribed from."""
    file: str
    """Name of the file; its ending is the format."""
    row: Callable[[int], dict[str, Any]]
    """The cells of a row. Paths of pictures are those that `write` makes, `pictures/<n>.png`."""
    answer: Callable[[int], Any]
    """What rewards compare an answer with."""
    question: Callable[[int], str]
    """The text of the last user message, with `<image>` where the picture stands."""
    reward: str
    """The option of `reward=` that fits."""
    images: int = 1
    schema: Any = None
    """Arrow types of a Parquet file, where they do not follow from the values."""
    overrides: tuple[str, ...] = ()
    """What the command needs besides path and reward."""
    system: str | None = None
    features: dict[str, Any] = field(default_factory=dict)
    """Features of Hugging Face `datasets` that the file names: column → feature."""

    def write(self, folder: Path) -> Path:
        """Write the data set and its pictures; returns the path of the file."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "pictures").mkdir(exist_ok=True)
        for number in range(ROWS):
            (folder / f"pictures/{number}.png").write_bytes(picture(number))
        path, rows = folder / self.file, [self.row(number) for number in range(ROWS)]
        if path.suffix == ".parquet":
            table = pa.Table.from_pylist(rows, schema=self.schema)
            if self.features:
                info = {"huggingface": json.dumps({"info": {"features": self.features}})}
                table = table.replace_schema_metadata(info)
            pq.write_table(table, path)
        elif path.suffix == ".json":
            path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
        else:
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return path

    def command(self, path: Path) -> list[str]:
        """The arguments that start a run on it."""
        return ["task=dataset", f"task.path={path}", f"reward={self.reward}", *self.overrides]


def shade(number: int) -> int:
    return 10 * number


def picture(number: int, size: int = 16) -> bytes:
    """A grey square as PNG."""
    data = io.BytesIO()
    Image.fromarray(np.full((size, size, 3), shade(number), np.uint8)).save(data, "PNG")
    return data.getvalue()


def stored(number: int) -> dict[str, Any]:
    """An image as `datasets` stores it in Parquet."""
    return {"bytes": picture(number), "path": f"{number}.png"}


IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})
TEXT = pa.string()
IMAGE_FEATURE = {"_type": "Image"}


def value(dtype: str) -> dict[str, Any]:
    return {"dtype": dtype, "_type": "Value"}


def fields(**types: Any) -> Any:
    return pa.schema(types)


def boxed(number: int) -> list[int]:
    return [1 + number, 2, 11 + number, 12]


def count(number: int) -> str:
    return str(number % 10)


VERL_INSTRUCTION = " You FIRST think about the reasoning process."

LAYOUTS: Sequence[Layout] = (
    Layout(
        "verl",
        "github.com/volcengine/verl, examples/data_preprocess/geo3k.py (0646a9b)",
        "verl.parquet",
        lambda n: {
            "data_source": "hiyouga/geometry3k",
            "prompt": [{"content": f"<image>Find x in figure {n}.{VERL_INSTRUCTION}", "role": "user"}],
            "images": [stored(n)],
            "ability": "math",
            "reward_model": {"ground_truth": count(n), "style": "rule"},
            "extra_info": {
                "answer": count(n),
                "index": n,
                "question": f"<image>Find x in figure {n}.",
                "split": "train",
            },
        },
        count,
        lambda n: f"<image>Find x in figure {n}.{VERL_INSTRUCTION}",
        "math",
    ),
    Layout(
        "EasyR1",
        "github.com/volcengine/verl, examples/data_preprocess/geo3k.py, which reads hiyouga/geometry3k: images, "
        "problem, answer",
        "easyr1.parquet",
        lambda n: {"images": [stored(n)], "problem": f"<image>Find x in figure {n}.", "answer": count(n)},
        count,
        lambda n: f"<image>Find x in figure {n}.",
        "math",
        features={
            "images": {"feature": IMAGE_FEATURE, "_type": "List"},
            "problem": value("string"),
            "answer": value("string"),
        },
    ),
    Layout(
        "R1-V",
        "huggingface.co/datasets/leonardPKU/clevr_cogen_a_train and GEOQA_R1V_Train_8K, dataset cards",
        "r1v.parquet",
        lambda n: {
            "image": stored(n),
            "problem": f"How many items are in picture {n}?",
            "solution": f"<answer> {count(n)} </answer>",
        },
        count,
        lambda n: f"<image>How many items are in picture {n}?",
        "number",
        features={"image": IMAGE_FEATURE, "problem": value("string"), "solution": value("string")},
    ),
    Layout(
        "TRL",
        "github.com/huggingface/trl, examples/scripts/grpo_vlm.py: `prompt` is added to the columns of "
        "lmms-lab/multimodal-open-r1-8k-verified",
        "trl.parquet",
        lambda n: {
            "image": stored(n),
            "problem": f"Count them, {n}.",
            "solution": f"<think>easy</think><answer>{count(n)}</answer>",
            "original_question": f"Count them, {n}.",
            "original_answer": f"The answer is {count(n)}",
            "prompt": [
                {"role": "system", "content": "Think first."},
                {"role": "user", "content": f"Count them, {n}."},
            ],
        },
        count,
        lambda n: f"<image>Count them, {n}.",
        "math",
        system="Think first.",
    ),
    Layout(
        "TRL with parts",
        "github.com/huggingface/trl, docs/source/dataset_formats.md, conversational prompts with images",
        "trl_parts.parquet",
        lambda n: {
            "prompt": [
                {"role": "system", "content": [{"type": "text", "text": "Think first."}]},
                {
                    "role": "user",
                    "content": [{"type": "image", "text": None}, {"type": "text", "text": f"Count them, {n}."}],
                },
            ],
            "image": stored(n),
            "solution": f"<think>easy</think><answer>{count(n)}</answer>",
        },
        count,
        lambda n: f"<image>Count them, {n}.",
        "math",
        system="Think first.",
    ),
    Layout(
        "ms-swift grounding",
        "github.com/modelscope/ms-swift, docs/source_en/Customization/Custom-dataset.md, Grounding",
        "swift.jsonl",
        lambda n: {
            "messages": [
                {"role": "user", "content": "<image>Locate the <ref-object> in the image"},
                {"role": "assistant", "content": '[{"bbox_2d": <bbox>, "label": "<ref-object>"}]'},
            ],
            "images": [f"pictures/{n}.png"],
            "objects": {"ref": [f"sheep {n}", f"sheep {n}"], "bbox": [boxed(n)]},
        },
        lambda n: f'[{{"bbox_2d": [{n + 1}, 2, {n + 11}, 12], "label": "sheep {n}"}}]',
        lambda n: f"<image>Locate the sheep {n} in the image",
        "iou",
    ),
    Layout(
        "ms-swift GRPO",
        "github.com/modelscope/ms-swift, docs/source_en/Customization/Custom-dataset.md, RLHF: messages, solution",
        "swift_grpo.jsonl",
        lambda n: {
            "messages": [{"role": "user", "content": f"<image>How many in {n}?"}],
            "images": [{"bytes": None, "path": f"pictures/{n}.png"}],
            "solution": count(n),
        },
        count,
        lambda n: f"<image>How many in {n}?",
        "exact",
    ),
    Layout(
        "LLaMA-Factory alpaca",
        "github.com/hiyouga/LLaMA-Factory, data/README.md, Alpaca Format",
        "alpaca.json",
        lambda n: {
            "instruction": "Count the items.",
            "input": f"The picture is <image> of set {n}.",
            "output": count(n),
            "system": "You count.",
            "history": [["Are you ready?", "Yes."]],
            "images": [f"pictures/{n}.png"],
        },
        count,
        lambda n: f"Count the items.\nThe picture is <image> of set {n}.",
        "exact",
        system="You count.",
    ),
    Layout(
        "LLaMA-Factory sharegpt",
        "github.com/hiyouga/LLaMA-Factory, data/README.md, Sharegpt Format",
        "sharegpt.json",
        lambda n: {
            "conversations": [
                {"from": "human", "value": f"<image>What is in {n}?"},
                {"from": "gpt", "value": "Squares."},
                {"from": "human", "value": "How many?"},
                {"from": "gpt", "value": count(n)},
            ],
            "system": "You count.",
            "images": [f"pictures/{n}.png"],
        },
        count,
        lambda n: "How many?",
        "exact",
        system="You count.",
    ),
    Layout(
        "LLaMA-Factory messages",
        "github.com/hiyouga/LLaMA-Factory, data/mllm_demo.json",
        "mllm_demo.json",
        lambda n: {
            "messages": [
                {"content": f"<image>How many in {n}?", "role": "user"},
                {"content": count(n), "role": "assistant"},
            ],
            "images": [f"pictures/{n}.png"],
        },
        count,
        lambda n: f"<image>How many in {n}?",
        "exact",
    ),
    Layout(
        "VLM-R1",
        "github.com/om-ai-lab/VLM-R1, README, 'For your own data'",
        "vlm_r1.jsonl",
        lambda n: {
            "id": n,
            "image": f"pictures/{n}.png",
            "conversations": [
                {"from": "human", "value": f"<image>What number of purple metallic balls are there in {n}?"},
                {"from": "gpt", "value": count(n)},
            ],
        },
        count,
        lambda n: f"<image>What number of purple metallic balls are there in {n}?",
        "exact",
    ),
    Layout(
        "VLM-R1 several images",
        "github.com/om-ai-lab/VLM-R1, README, multi-image input",
        "vlm_r1_multi.jsonl",
        lambda n: {
            "id": n,
            "image": [f"pictures/{n}.png", f"pictures/{(n + 1) % ROWS}.png"],
            "conversations": [
                {"from": "human", "value": f"<image><image>How many balls in total within the two images {n}?"},
                {"from": "gpt", "value": count(n)},
            ],
        },
        count,
        lambda n: f"<image><image>How many balls in total within the two images {n}?",
        "exact",
        images=2,
    ),
    Layout(
        "OpenAI",
        "platform.openai.com/docs/guides/vision-fine-tuning: messages with image_url data URLs",
        "openai.jsonl",
        lambda n: {
            "messages": [
                {"role": "system", "content": "You count."},
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": f"How many in {n}?"},
                        {
                            "type": "image_url",
                            "image_url": {
                                "url": "data:image/png;base64," + base64.b64encode(picture(n)).decode(),
                                "detail": "low",
                            },
                        },
                    ],
                },
                {"role": "assistant", "content": count(n)},
            ]
        },
        count,
        lambda n: f"How many in {n}?<image>",
        "exact",
        system="You count.",
    ),
    Layout(
        "plain",
        "what people write by hand: question, answer, image",
        "plain.jsonl",
        lambda n: {"image": f"pictures/{n}.png", "question": f"How many in {n}?", "answer": int(count(n))},
        lambda n: int(count(n)),
        lambda n: f"<image>How many in {n}?",
        "number",
    ),
    Layout(
        "A-OKVQA",
        "huggingface.co/datasets/HuggingFaceM4/A-OKVQA, dataset card",
        "aokvqa.parquet",
        lambda n: {
            "image": stored(n),
            "question_id": f"q{n}",
            "question": f"What is in picture {n}?",
            "choices": ["toothpick", "food", "popsicle stick", "cigarette"],
            "correct_choice_idx": n % 4,
            "direct_answers": "['cigarette', 'food']",
            "difficult_direct_answer": False,
            "rationales": ["Because."],
        },
        lambda n: "ABCD"[n % 4],
        lambda n: f"<image>What is in picture {n}?\nA. toothpick\nB. food\nC. popsicle stick\nD. cigarette",
        "choice",
        schema=fields(
            image=IMAGE,
            question_id=TEXT,
            question=TEXT,
            choices=pa.list_(TEXT),
            correct_choice_idx=pa.int8(),
            direct_answers=TEXT,
            difficult_direct_answer=pa.bool_(),
            rationales=pa.list_(TEXT),
        ),
    ),
    Layout(
        "ScienceQA",
        "huggingface.co/datasets/derek-thomas/ScienceQA, dataset card",
        "scienceqa.parquet",
        lambda n: {
            "image": stored(n),
            "question": f"Which is it, {n}?",
            "choices": ["red", "blue"],
            "answer": n % 2,
            "hint": "",
            "task": "closed choice",
            "grade": "grade2",
            "subject": "natural science",
            "topic": "physics",
            "category": "colors",
            "skill": "see",
            "lecture": "Colors are seen.",
            "solution": "To find the answer, look at the picture.",
        },
        lambda n: "AB"[n % 2],
        lambda n: f"<image>Which is it, {n}?\nA. red\nB. blue",
        "choice",
    ),
    Layout(
        "MMMU",
        "huggingface.co/datasets/MMMU/MMMU, dataset card: image_1 to image_7, options as text",
        "mmmu.parquet",
        lambda n: {
            "id": f"validation_Math_{n}",
            "question": f"<image 1> Compare with <image 2>, {n}.",
            "options": "['$6', '$7']",
            "explanation": "",
            "image_1": stored(n),
            "image_2": stored((n + 1) % ROWS),
            "image_3": None,
            "img_type": "['Plots']",
            "answer": "AB"[n % 2],
            "topic_difficulty": "Easy",
            "question_type": "multiple-choice",
            "subfield": "Algebra",
        },
        lambda n: "AB"[n % 2],
        lambda n: f"<image> Compare with <image>, {n}.\nA. $6\nB. $7",
        "choice",
        images=2,
        schema=fields(
            id=TEXT,
            question=TEXT,
            options=TEXT,
            explanation=TEXT,
            image_1=IMAGE,
            image_2=IMAGE,
            image_3=IMAGE,
            img_type=TEXT,
            answer=TEXT,
            topic_difficulty=TEXT,
            question_type=TEXT,
            subfield=TEXT,
        ),
    ),
    Layout(
        "MMBench",
        "huggingface.co/datasets/lmms-lab/MMBench, dataset card: options in columns A to D",
        "mmbench.parquet",
        lambda n: {
            "index": n,
            "question": f"Which is it, {n}?",
            "hint": None,
            "answer": "AB"[n % 2],
            "A": "red",
            "B": "blue",
            "C": None,
            "D": None,
            "category": "color",
            "image": stored(n),
            "source": "x",
            "L2-category": "y",
            "comment": None,
            "split": "dev",
        },
        lambda n: "AB"[n % 2],
        lambda n: f"<image>Which is it, {n}?\nA. red\nB. blue",
        "choice",
        schema=fields(
            index=pa.int64(),
            question=TEXT,
            hint=TEXT,
            answer=TEXT,
            A=TEXT,
            B=TEXT,
            C=TEXT,
            D=TEXT,
            category=TEXT,
            image=IMAGE,
            source=TEXT,
            **{"L2-category": TEXT},
            comment=TEXT,
            split=TEXT,
        ),
    ),
    Layout(
        "DocVQA",
        "huggingface.co/datasets/lmms-lab/DocVQA: questionId and docId as text and integer, answers as a list",
        "docvqa.parquet",
        lambda n: {
            "questionId": str(n),
            "question": f"What is the total of page {n}?",
            "question_types": ["form"],
            "image": stored(n),
            "docId": n,
            "ucsf_document_id": "x",
            "ucsf_document_page_no": "1",
            "answers": [count(n), f"{count(n)}.0"],
            "data_split": "val",
        },
        lambda n: [count(n), f"{count(n)}.0"],
        lambda n: f"<image>What is the total of page {n}?",
        "anls",
    ),
    Layout(
        "RefCOCO",
        "huggingface.co/datasets/lmms-lab/RefCOCO, README.md, dataset_info; boxes are x, y, width, height "
        "(github.com/EvolvingLMMs-Lab/lmms-eval, lmms_eval/tasks/refcoco/utils_rec.py)",
        "refcoco.parquet",
        lambda n: {
            "question_id": str(n),
            "image": stored(n),
            "question": "Please carefully observe the area circled in the image and come up with a caption.",
            "answer": [f"the left man {n}", "left guy"],
            "segmentation": [0.0, 1.0],
            "bbox": [1.0, 2.0, 10.0, 10.5],
            "iscrowd": 0,
            "file_name": f"COCO_train2014_{n}.jpg",
        },
        lambda n: [1.0, 2.0, 10.0, 10.5],
        lambda n: f"<image>Where is the left man {n}? Answer with a box.",
        "iou",
        schema=fields(
            question_id=TEXT,
            image=IMAGE,
            question=TEXT,
            answer=pa.list_(TEXT),
            segmentation=pa.list_(pa.float32()),
            bbox=pa.list_(pa.float32()),
            iscrowd=pa.int8(),
            file_name=TEXT,
        ),
        overrides=(
            "task.columns.answer=bbox",
            'task.template="Where is {{ answer[0] }}? Answer with a box."',
            "reward.terms.iou.reference_format=xywh",
        ),
    ),
    Layout(
        "VLM-R1 REC",
        "huggingface.co/datasets/omlab/VLM-R1, rec_jsons_processed: image, problem, solution as four numbers",
        "rec.json",
        lambda n: {
            "image": f"pictures/{n}.png",
            "normal_caption": f"man {n}",
            "problem": f"Please provide the bounding box coordinate of the region this sentence describes: man {n}",
            "dataset": "refcoco",
            "solution": [float(x) for x in boxed(n)],
        },
        lambda n: [float(x) for x in boxed(n)],
        lambda n: f"<image>Please provide the bounding box coordinate of the region this sentence describes: man {n}",
        "iou",
    ),
    Layout(
        "MMK12",
        "huggingface.co/datasets/FanqingM/MMK12, dataset card: id, question, answer, subject, image",
        "mmk12.parquet",
        lambda n: {
            "id": str(n),
            "question": f"As shown in the figure <image>, find x of {n}.",
            "answer": f"${count(n)}$",
            "subject": "math",
            "image": stored(n),
        },
        lambda n: f"${count(n)}$",
        lambda n: f"As shown in the figure <image>, find x of {n}.",
        "math",
    ),
    Layout(
        "ViRL39K",
        "huggingface.co/datasets/TIGER-Lab/ViRL39K, README.md, Dataset Keys: answers in \\boxed{}, images as paths",
        "virl39k.parquet",
        lambda n: {
            "question": f"<image>\nFind x of {n}.",
            "answer": f"\\boxed{{{count(n)}}}",
            "PassRate_32BTrained": 0.5,
            "PassRate_7BBase": -1.0,
            "category": "Geometry",
            "source": "MM-Eureka",
            "qid": f"q{n}",
            "image": [f"pictures/{n}.png"],
        },
        count,
        lambda n: f"<image>\nFind x of {n}.",
        "math",
    ),
    Layout(
        "The Cauldron",
        "huggingface.co/datasets/HuggingFaceM4/the_cauldron, dataset card: images, texts",
        "cauldron.parquet",
        lambda n: {
            "images": [stored(n)],
            "texts": [{"user": f"How many in {n}?", "assistant": count(n), "source": "x"}],
        },
        count,
        lambda n: f"<image>How many in {n}?",
        "exact",
    ),
    Layout(
        "llava-instruct-mix",
        "huggingface.co/datasets/HuggingFaceH4/llava-instruct-mix-vsft, dataset card: parts with index",
        "llava.parquet",
        lambda n: {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"index": None, "text": f"How many in {n}?", "type": "text"},
                        {"index": 0, "text": None, "type": "image"},
                    ],
                },
                {"role": "assistant", "content": [{"index": None, "text": count(n), "type": "text"}]},
            ],
            "images": [stored(n)],
        },
        count,
        lambda n: f"How many in {n}?<image>",
        "exact",
    ),
    Layout(
        "VQAv2",
        "huggingface.co/datasets/lmms-lab/VQAv2, dataset card: answers as structs",
        "vqav2.parquet",
        lambda n: {
            "question_type": "how many",
            "multiple_choice_answer": count(n),
            "answers": [{"answer": count(n), "answer_confidence": "yes", "answer_id": k} for k in range(3)],
            "image_id": n,
            "answer_type": "number",
            "question_id": n,
            "question": f"How many in {n}?",
            "image": stored(n),
        },
        lambda n: [count(n)] * 3,
        lambda n: f"<image>How many in {n}?",
        "exact",
    ),
    Layout(
        "VLMEvalKit",
        "github.com/open-compass/VLMEvalKit, TSV files: index, image in base64, question, A to D, answer",
        "vlmeval.jsonl",
        lambda n: {
            "index": n,
            "image": base64.b64encode(picture(n)).decode(),
            "question": f"Which is it, {n}?",
            "A": "red",
            "B": "blue",
            "answer": "AB"[n % 2],
        },
        lambda n: "AB"[n % 2],
        lambda n: f"<image>Which is it, {n}?\nA. red\nB. blue",
        "choice",
    ),
)
