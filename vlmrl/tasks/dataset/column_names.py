"""Names of columns, by the part that they play: those of verl, EasyR1, R1-V, TRL, ms-swift, LLaMA-Factory, VLM-R1,
OpenAI messages, VQA data sets of lmms-eval, The Cauldron.

Each group of names has a rank: a name of a later group counts only where no earlier one is there.
"""

from __future__ import annotations

PROMPTS = (("prompt", "question", "problem", "query", "instruction", "user_prompt"), ("input", "text", "user"))
"""The question."""

MESSAGES = (("messages", "conversations", "conversation", "dialog", "dialogue", "chat"), ("texts",))
ANSWERS = (
    ("reward_model.ground_truth",),
    (
        *("answer", "answers", "ground_truth", "gt_answer", "gt", "label", "labels", "target", "reference"),
        *("reference_answer", "correct_answer", "final_answer", "expected_answer", "golden_answers", "gold"),
        *("correct_choice_idx", "correct_choice", "correct_option", "correct", "answer_idx", "answer_index"),
        *("multiple_choice_answer", "answer_key", "answerkey"),
    ),
    ("solution", "output", "response", "completion"),
)
CHOSEN = (("chosen",), ("chosen_response", "response_chosen", "preferred"))
REJECTED = (("rejected",), ("rejected_response", "response_rejected", "rejected_messages", "dispreferred"))
CHOICES = (("choices", "options"), ("candidates", "answer_choices", "multiple_choices"))
SYSTEM = (("system", "system_prompt"),)
BOXES = (("objects",), ("bbox", "bboxes", "boxes", "box", "bounding_box", "bounding_boxes", "bbox_2d"))
IMAGES = (
    ("images", "image"),
    (
        *("image_urls", "image_url", "image_path", "image_paths", "image_file", "image_files", "image_bytes"),
        *("image_base64", "img", "imgs", "img_path", "picture", "pictures", "photo", "decoded_image", "png", "jpg"),
        *("jpeg", "webp", "media", "filepath", "file_name", "filename"),
    ),
)
VIDEOS = (
    ("videos", "video"),
    (
        *("video_path", "video_paths", "video_file", "video_files", "video_url", "video_urls", "video_bytes", "mp4"),
        *("webm", "video_name", "video_filename", "clip", "clips", "clip_path"),
    ),
)

ROLE_KEYS = (("role", "content"), ("from", "value"), ("user", "assistant"), ("human", "assistant"))
"""The fields of a message: OpenAI, sharegpt, and pairs as in The Cauldron and in ms-swift's sharegpt."""
