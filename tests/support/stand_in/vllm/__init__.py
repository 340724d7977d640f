"""A package that a test puts in place of vLLM: the engine starts `vllm.entrypoints.openai.api_server` from here."""
