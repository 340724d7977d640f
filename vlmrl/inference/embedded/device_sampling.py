"""Sampling one token per row on the device, from the same uniform numbers as sampling.py and without a copy of the
logits.

    logits [rows, vocabulary]
      └─▶ probability of each chunk of 128 tokens ─▶ the chunk in which the cumulative distribution passes the uniform
          number ─▶ the token in that chunk

No size depends on the contents of a tensor and nothing waits for the device, so a decode step with its sampling is one
CUDA graph. The exceptions are supports that are reported: their sizes are unknown before, so they are read at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlmrl.inference.embedded.sampling import Shape, supports_of, truncated
from vlmrl.models.compiling import compiled_on_gpu, of_one_width
from vlmrl.models.head import final_logits
from vlmrl.models.logit_map import LogitMap

CHUNK = 128
"""Tokens of a chunk of the vocabulary."""


@dataclass(frozen=True, eq=False)
class Final:
    """What turns the head's output for R rows into the logits that are sampled from (`head.final_logits`)."""

    banned: Tensor
    """bool [vocabulary]."""
    temperature: Tensor
    """float32 [R, 1], above 0."""
    logit_map: LogitMap

    def of_columns(self, logits: Tensor, columns: Tensor) -> Tensor:
        """The final logits of the output [R, n] at columns int64 [R, n]."""
        return final_logits(logits, self.banned[columns], self.temperature, self.logit_map)


@dataclass(frozen=True, eq=False)
class Draw:
    """How R rows are sampled."""

    final: Final
    uniforms: Tensor
    """float64 [R] in [0, 1)."""
    is_greedy: Tensor
    """bool [R]; True where the most probable token is taken."""
    shape: Tensor
    """int64 [R]; index in `shapes` of the row's truncation."""
    shapes: Sequence[Shape]
    """The distinct truncations; their temperature is not read."""
    has_greedy: bool
    """Whether a row may be greedy."""


def draw_tokens(logits: Tensor, how: Draw) -> tuple[Tensor, Tensor, list[NDArray[np.int32] | None]]:
    """Sample from the head's output, float32 [R, vocabulary], which may be overwritten.

    → tokens int64 [R]; their natural-log probabilities float32 [R] under the distribution that they were drawn from;
    and the supports of the rows that report theirs (empty where no row does).
    """
    supports: list[NDArray[np.int32] | None] = []
    final = how.final
    of_one_width(logits, final.banned)
    if len(how.shapes) == 1 and not how.shapes[0].truncates and not how.has_greedy:
        found = _masses_of_output(logits, final.banned, final.temperature, final.logit_map)
        token, logprob = _invert(logits, *found, how.uniforms, final)
    else:
        logits = _finished(logits, final.banned, final.temperature, final.logit_map)
        lse, masses = _chunk_masses(logits)
        token = torch.zeros_like(how.shape)
        logprob = torch.zeros_like(logits[:, 0])
        for number, shape in enumerate(how.shapes):
            if shape.truncates:
                log_probs = truncated(logits - lse, shape.top_k, shape.top_p, shape.min_p)
                found = _invert(log_probs, *_chunk_masses(log_probs), how.uniforms)
                if shape.reports_support:
                    supports = supports or [None] * len(logits)
                    known = supports_of(log_probs)
                    for row in (how.shape == number).nonzero()[:, 0].tolist():
                        supports[row] = known[row]
            else:
                found = _invert(logits, lse, masses, how.uniforms)
            is_mine = how.shape == number
            token, logprob = torch.where(is_mine, found[0], token), torch.where(is_mine, found[1], logprob)
    if how.has_greedy:
        best = logits.argmax(-1)
        token = torch.where(how.is_greedy, best, token)
        logprob = torch.where(how.is_greedy, (logits.gather(1, best[:, None]) - lse)[:, 0], logprob)
    return token, logprob, supports


@compiled_on_gpu
def _finished(output: Tensor, banned: Tensor, temperature: Tensor, logit_map: LogitMap) -> Tensor:
    """The final logits, in place of the output. Where it is compiled, it makes no array of their size."""
    return output.copy_(final_logits(output, banned, temperature, logit_map))


@compiled_on_gpu
def _masses_of_output(
    logits: Tensor, banned: Tensor, temperature: Tensor, logit_map: LogitMap
) -> tuple[Tensor, Tensor]:
    """`_masses` of the final logits. Where it is compiled, it reads the output once and makes no array of its size."""
    return _masses(final_logits(logits, banned, temperature, logit_map))


def _masses(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Log-sum-exp float32 [R, 1], and the probability of each chunk of the vocabulary, float64 [R, chunks]."""
    whole = logits.shape[1] // CHUNK * CHUNK
    of_chunks = _log_sum_exp(logits[:, :whole].reshape(len(logits), -1, CHUNK))
    if whole < logits.shape[1]:
        of_chunks = torch.cat([of_chunks, _log_sum_exp(logits[:, whole:])[:, None]], -1)
    lse = of_chunks.logsumexp(-1, keepdim=True)
    return lse.float(), (of_chunks - lse).exp()


def _log_sum_exp(logits: Tensor) -> Tensor:
    """float64 […] of float32 […, n]; −inf where all are −inf."""
    largest = logits.amax(-1).clamp(min=torch.finfo(logits.dtype).min)
    return largest.double() + (logits - largest[..., None]).exp().sum(-1).double().log()


_chunk_masses = compiled_on_gpu(_masses)


def _invert(
    logits: Tensor, lse: Tensor, masses: Tensor, uniforms: Tensor, final: Final | None = None
) -> tuple[Tensor, Tensor]:
    """The first token whose cumulative probability exceeds the uniform number, and its logprob. The last token with a
    probability takes the rounding error. With `final`, `logits` are the head's output."""
    vocabulary = logits.shape[1]
    below = masses.cumsum(-1)
    total = below[:, -1:]
    target = uniforms[:, None] * total
    chunk = torch.minimum((below <= target).sum(-1, keepdim=True), (below < total).sum(-1, keepdim=True))
    chunk = chunk.clamp(max=below.shape[1] - 1)  # past the end only for NaN, which the host refuses
    left = target - (below.gather(1, chunk) - masses.gather(1, chunk))
    place = torch.arange(CHUNK, device=logits.device)
    columns = chunk * CHUNK + place
    known = columns.clamp(max=vocabulary - 1)
    chosen = logits.gather(1, known)
    logprobs = (chosen if final is None else final.of_columns(chosen, known)) - lse
    probabilities = logprobs.double().exp().masked_fill(columns >= vocabulary, 0.0)
    found = (probabilities.cumsum(-1) <= left).sum(-1, keepdim=True)
    found = torch.minimum(found, ((probabilities > 0) * place).amax(-1, keepdim=True))
    return columns.gather(1, found)[:, 0], logprobs.gather(1, found)[:, 0]
