"""Whether a chat format can be used with tools."""

from __future__ import annotations

import numpy as np

from vlmrl.errors import UserFault, safe_repr, safe_text
from vlmrl.rendering.chat_format import ChatFormat
from vlmrl.rendering.tool_calls import PROBE, PROBE_CALL, PROBE_TOOL, PROBE_WORDS
from vlmrl.types import ContractError


def tool_problem(chat_format: ChatFormat) -> str:
    """Why a chat format cannot be used with tools; empty where it can. A tool, a call and its result are rendered, and
    the call is read back from the tokens that a policy would sample."""
    try:
        rendered = chat_format.render(PROBE, (), generate=False, tools=(PROBE_TOOL,))
    except (UserFault, ContractError) as error:
        return f"it does not write tool calls ({safe_text(error)})"
    text = chat_format.tokenizer.decode(rendered.token_ids.tolist())
    if missing := [word for word in PROBE_WORDS if word not in text]:
        what = "the tools" if missing[0] in PROBE_WORDS[:4] else "tool calls or their results"
        return f"it leaves {what} out of the prompt"
    if not rendered.sampled_mask:
        return "it does not report which tokens a policy samples, so no call can be read back"
    answer = rendered.token_ids[np.array(rendered.sampled_mask, np.bool_)]
    parsed = chat_format.parse(answer, (PROBE_TOOL,), None)
    if [(call.name, call.arguments) for call in parsed.calls] != [(PROBE_CALL.name, PROBE_CALL.arguments)]:
        written = chat_format.tokenizer.decode(answer.tolist())
        return f"it writes a tool call as {safe_repr(written)}, and nothing here reads calls of that form"
    return ""
