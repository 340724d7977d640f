"""A folder on the `PYTHONPATH` of a vLLM server. Python imports its `sitecustomize` at the start of every process."""
