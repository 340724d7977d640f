"""A request that is not served, as the client is told: an HTTP status and an OpenAI error object."""

from __future__ import annotations

from typing import Any

from vlmrl.errors import safe_text

KINDS = {401: "authentication_error", 404: "not_found_error"}
"""HTTP status → `type` of the error object. Other statuses below 500 are `invalid_request_error`."""


class RefusedError(Exception):
    """The endpoint does not serve a request. It costs this request, never the run.

    >>> RefusedError("messages is empty, so there is nothing to answer", param="messages").body()["error"]["type"]
    'invalid_request_error'
    """

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        """`param` is the key of the request that is wrong; `code` is for programs, e.g. `context_length_exceeded`."""
        super().__init__(message)
        self.message = safe_text(message)
        self.status = status
        self.param = param
        self.code = code

    def body(self) -> dict[str, Any]:
        """The JSON of the response."""
        kind = KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}
