"""One request while the rows of row_decoding.py sample its completion: what the host knows about it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vlmrl.inference.embedded.completions import Sampled
from vlmrl.inference.embedded.requests import Request
from vlmrl.inference.embedded.sampling import uniform_numbers
from vlmrl.inference.stop_strings import StopFinder, TextOf
from vlmrl.models.attention.layer_cache import PrefixStates
from vlmrl.types import FloatArray, IntArray


class SampledRow:
    """Collects the tokens of one request. The device stops a row after a stop token and at its limit; only the host
    finds stop strings, so some tokens may come after them, which are dropped."""

    def __init__(self, request: Request, prompt: int, slots: IntArray, text_of: TextOf | None) -> None:
        """`prompt` is the index of its prompt, `slots` int64 [max_new_tokens − 1] the places of its tokens in the KV
        cache."""
        self.request, self.prompt, self.slots = request, prompt, slots
        self.uniforms = uniform_numbers(request.sampling)
        self.at = -1
        """Its row in the tensors of the steps."""
        self.length = 0
        """Tokens so far."""
        self.is_finished = False
        self.states: PrefixStates | None = {}
        """See `Sampled.states`."""
        self._is_stopped = False
        self._token_ids: list[IntArray] = []
        self._logprobs: list[FloatArray] = []
        self._supports: list[NDArray[np.int32]] = []
        self._stop: str | None = None
        self._stop_ids = frozenset(request.sampling.stop_token_ids)
        self._finder: StopFinder | None = None
        if request.sampling.stop:
            assert text_of is not None, "a request with stop strings needs an engine that was given `text_of`"
            self._finder = StopFinder(request.sampling.stop, text_of)

    def add(
        self,
        token_ids: IntArray,
        logprobs: FloatArray,
        supports: Sequence[NDArray[np.int32] | None],
        *,
        has_ended: bool,
    ) -> None:
        """Append the newest tokens, int64 [n], at least one, with their logprobs float32 [n]. `has_ended`: whether the
        device has ended the completion with the last of them."""
        end = len(token_ids)
        self.is_finished = has_ended
        self._is_stopped = has_ended and int(token_ids[-1]) in self._stop_ids
        if self._finder is not None:
            for index, token in enumerate(token_ids[: end - self._is_stopped].tolist()):
                self._stop = self._finder.add(token)
                if self._stop is not None:
                    end, self._is_stopped, self.is_finished = index + 1, True, True
                    break
        self._token_ids.append(token_ids[:end])
        self._logprobs.append(logprobs[:end])
        self._supports += [each for each in supports[:end] if each is not None]
        self.length += end

    @property
    def newest(self) -> int:
        """The last token; 0 before the first one."""
        return int(self._token_ids[-1][-1]) if self._token_ids else 0

    @property
    def has_stop_string(self) -> bool:
        """Whether a stop string has ended it."""
        return self._stop is not None

    @property
    def unused_slots(self) -> IntArray:
        """int64 [n]; the slots behind a finished completion."""
        return self.slots[self.length - 1 :]

    def sampled(self) -> Sampled:
        """What a finished row has sampled."""
        return Sampled(
            token_ids=np.concatenate(self._token_ids),
            logprobs=np.concatenate(self._logprobs),
            supports=self._supports,
            stop=self._stop,
            is_stopped=self._is_stopped,
            slots=self.slots[: self.length - 1],
            states=self.states,
        )
