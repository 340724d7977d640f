"""One rollout whose turns are requests of a foreign program.

    ChatRequest ─▶ same request as an earlier one? ─ yes ─▶ its answer (also while it is still sampled)
                          │ no
                          ▼
                   extends an earlier request and its answer? ─ yes ─▶ prompt bridged from the sampled token ids
                          │ no                                              │
                          └─▶ prompt rendered: a new branch ────────────────┴─▶ engine ─▶ turn ─▶ ChatAnswer

What the client sends back is only compared (conversation.py); the tokens of the next prompt are those that were
sampled. A request that cannot be served is refused with words and counted. It never ends the run, and the program may
go on: `stop_reason` is that of the last request.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass

from vlmrl.errors import ConfigError, EngineError, UserFault, safe_text
from vlmrl.inference.stop_strings import answer_before, text_before
from vlmrl.orchestrator.endpoint.branches import Node, turns_of
from vlmrl.orchestrator.endpoint.conversation import Conversation, conversation_of, extended
from vlmrl.orchestrator.endpoint.refusal import RefusedError
from vlmrl.orchestrator.endpoint.request import ChatRequest
from vlmrl.orchestrator.endpoint.sampling import SessionSampling
from vlmrl.orchestrator.fences import rendering_fence, stop_reason_of
from vlmrl.rendering.messages import shown_in
from vlmrl.rendering.renderer import Renderer
from vlmrl.types import (
    Answer,
    ChatUse,
    Completion,
    ContractError,
    EngineSession,
    Image,
    Message,
    MMItem,
    Prompt,
    StopReason,
    ToolCall,
    Turn,
    Video,
    check_placeholders,
    extends,
)


@dataclass(frozen=True)
class Budgets:
    """What a session may use."""

    max_turns: int
    """Most answers of a rollout."""
    max_new_tokens: int
    """Most tokens of an answer. A client's `max_tokens` can only lower it."""
    max_model_len: int
    """Most tokens of prompt plus answer."""
    max_frames: int | None = None
    """Most frames of all videos of a prompt together; None for no limit."""


@dataclass(frozen=True, eq=False)
class ChatAnswer:
    """What the policy answered to a request."""

    id: str
    created: int
    """Seconds since 1970."""
    prompt_tokens: int
    completion: Completion
    message: Message
    """What the client gets: text and parsed tool calls. A broken call stays in the text, so that the program can tell
    the policy what is wrong with it."""
    spellings: tuple[str, ...]
    """The text of each token of the completion; empty for special tokens."""


@dataclass(frozen=True, eq=False)
class Prepared:
    """A request with its prompt."""

    prompt: Prompt
    history: tuple[Message, ...]
    """The messages up to the answer that it extends; empty where it extends none."""
    new: tuple[Message, ...]
    """The messages after `history`."""
    parent: Node | None
    is_bridged: bool
    """As in `Node`."""


class ChatSession:
    """The requests of one rollout. It is used in one event loop, and holds no HTTP."""

    def __init__(
        self,
        rollout_id: str,
        renderer: Renderer,
        engine: EngineSession,
        sampling: SessionSampling,
        budgets: Budgets,
        *,
        samples_again: bool = False,
    ) -> None:
        """`engine` is opened and closed by the caller; the engine must not wait for it between two requests
        (`InferenceEngine.session(…, is_awaited=False)`). With `samples_again`, a repeated request is sampled again, as
        a server does that trains nothing."""
        self.rollout_id = rollout_id
        self._renderer = renderer
        self._engine = engine
        self._sampling = sampling
        self._budgets = budgets
        self._nodes: list[Node] = []
        self._after: dict[bytes, Node] = {}
        """Digest of a conversation that ends with an answer → the request that got it."""
        self._answers: dict[bytes, asyncio.Task[ChatAnswer]] = {}
        """Digest of a request → its answer."""
        self._items: dict[Image | Video, MMItem] = {}
        self.use = ChatUse()
        """How its requests went."""
        self._samples_again = samples_again
        self._numbered = 0
        self.is_closed = False
        self.stop_reason: StopReason | None = None
        """Why the last request got no whole answer: `max_turns`, `context_full`, `frames_full`, `max_new_tokens`, or a
        fault. None where it did."""
        self.fault: UserFault | EngineError | ContractError | None = None
        """What went wrong with the last request."""
        self.failure: Exception | None = None
        """An error that this rollout did not cause, such as an engine that is gone. It ends the run."""

    @property
    def client_samples(self) -> bool:
        """As in `SessionSampling`."""
        return self._sampling.client_samples

    # ── requests ────────────────────────────────────────────────────────────────────────────────────────────

    async def answer(self, request: ChatRequest) -> ChatAnswer:
        """The policy's answer. A request that is repeated gets the same answer. Raises `RefusedError`.

        A caller that is cancelled, because its client has left, leaves the answer to be sampled: the turn is kept.
        """
        try:
            return await self._found(request)
        except RefusedError as error:
            self.refuse(error)
            raise

    def refuse(self, error: RefusedError) -> None:
        """Count a request that was refused, here or before it reached `answer`."""
        self.use.refused += 1

    async def _found(self, request: ChatRequest) -> ChatAnswer:
        """The answer to a request: that of an equal request, or a new one."""
        self._refuse_if_over()
        self.use.requests += 1
        try:
            conversation = await conversation_of(request, self._renderer, self._items)
        except UserFault as error:
            raise self._faulty(error) from None
        self._refuse_if_over()
        key = conversation.request
        if self._samples_again:
            key += self.use.requests.to_bytes(8)
        task = self._answers.get(key)
        if task is not None:
            self.use.repeated += 1
        else:
            self._items.update(zip(shown_in(request.messages), conversation.items, strict=True))
            task = asyncio.create_task(self._answer(request, conversation))
            task.add_done_callback(_retrieve)
            self._answers[key] = task
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if self.is_closed and task.cancelled():
                raise self._over() from None
            raise

    async def _answer(self, request: ChatRequest, conversation: Conversation) -> ChatAnswer:
        try:
            if request.tools:
                self._check_tools()
            with rendering_fence():
                prepared = await self._prepared(request, conversation)
            return await self._sampled(request, conversation, prepared)
        except (UserFault, EngineError, ContractError) as error:
            raise self._faulty(error) from None
        except RefusedError:
            raise
        except Exception as error:
            self.failure = error
            raise

    async def _sampled(self, request: ChatRequest, conversation: Conversation, prepared: Prepared) -> ChatAnswer:
        """Sample the answer to a prompt, and keep both as a turn."""
        prompt, budgets = prepared.prompt, self._budgets
        if self._numbered == budgets.max_turns:
            raise self._used_up(
                StopReason.MAX_TURNS, f"this rollout has used all of its {budgets.max_turns} answers, so it is over"
            )
        if budgets.max_frames is not None and prompt.num_frames > budgets.max_frames:
            raise self._used_up(
                StopReason.FRAMES_FULL,
                f"the videos of the conversation have {prompt.num_frames} frames, and they may have "
                f"{budgets.max_frames}: show fewer of them",
            )
        room = budgets.max_model_len - len(prompt.token_ids)
        if room < 1:
            raise self._used_up(
                StopReason.CONTEXT_FULL,
                f"the conversation has {len(prompt.token_ids)} tokens, and with its answer it may have "
                f"{budgets.max_model_len}: shorten it",
            )
        own = min(budgets.max_new_tokens, request.max_tokens or budgets.max_new_tokens)
        number = self._numbered
        params = self._sampling.params(request, min(own, room), number)
        self._numbered += 1
        completion = await self._engine.generate(prompt, params)
        written = self._renderer.decode(completion.token_ids)
        answer = self._renderer.parse(completion.token_ids, request.tools, prompt)
        message = sent_message(answer_before(answer, completion.stop), number)
        text = text_before(written, completion.stop)
        turn = Turn(prompt, completion, text, list(prepared.new), branch=0, reward=0.0, tools=request.tools)
        node = Node(number, params, written, turn, prepared.history, prepared.parent, prepared.is_bridged, request.lane)
        self._keep(node, conversation, message)
        self.fault, self.stop_reason = None, None
        if completion.finish_reason == "length":
            self.stop_reason = StopReason.MAX_NEW_TOKENS if own <= room else StopReason.CONTEXT_FULL
        ids = [completion.token_ids[index : index + 1] for index in range(len(completion.token_ids))]
        return ChatAnswer(
            id=f"chatcmpl-{hashlib.sha256(f'{self.rollout_id}/{number}'.encode()).hexdigest()[:24]}",
            created=int(time.time()),
            prompt_tokens=len(prompt.token_ids),
            completion=completion,
            message=message,
            spellings=tuple(map(self._renderer.decode, ids)) if request.logprobs else (),
        )

    def _keep(self, node: Node, conversation: Conversation, message: Message) -> None:
        self._nodes.append(node)
        self._after[extended(conversation.digests[-1], message)] = node
        if node.parent is not None:
            node.parent.children.append(node)
            if node.is_bridged:
                self.use.bridged += 1
            else:
                self.use.breaks += 1

    # ── prompts ─────────────────────────────────────────────────────────────────────────────────────────────

    async def _prepared(self, request: ChatRequest, conversation: Conversation) -> Prepared:
        """The prompt of a request: bridged where it extends an earlier one. Raises `UserFault` and `ContractError`."""
        parent, known = self._extended_by(request, conversation)
        made = None if parent is None else await self._bridged(request, parent, request.messages[known:])
        if made is None:
            prompt = await self._renderer.first_turn(request.messages, request.tools)
            made = Prepared(prompt, request.messages[:known], request.messages[known:], parent, is_bridged=False)
        check_placeholders(len(made.prompt.token_ids), made.prompt.placeholders, made.prompt.mm_items)
        return made

    async def _bridged(self, request: ChatRequest, parent: Node, new: Sequence[Message]) -> Prepared | None:
        """The prompt that continues `parent`'s tokens; None where the chat format does not allow one."""
        before, history = parent.turn, parent.conversation
        ids = before.completion.token_ids
        prompt, is_bridged = await self._renderer.next_turn(before.prompt, ids, history, new, request.tools)
        if not is_bridged:
            return None
        if not extends(prompt, before.prompt, ids):
            raise ContractError("the prompt of a request does not extend the answer before it")
        return Prepared(prompt, history, tuple(new), parent, is_bridged=True)

    def _check_tools(self) -> None:
        try:
            self._renderer.check_tools()
        except ConfigError as error:
            raise RefusedError(str(error), param="tools") from None

    def _extended_by(self, request: ChatRequest, conversation: Conversation) -> tuple[Node | None, int]:
        """The longest earlier conversation that the request extends, and how many messages that are.

        Nothing but user, system and tool messages may follow: an answer of the client's own was not sampled.
        """
        for known in range(len(request.messages) - 1, 0, -1):
            if request.messages[known].role == "assistant":
                break
            node = self._after.get(conversation.digests[known - 1])
            if node is not None:
                return node, known
        return None, 0

    # ── the end ─────────────────────────────────────────────────────────────────────────────────────────────

    def close(self, lanes: Collection[str] | None = None) -> list[Turn]:
        """End the rollout: its turns, ordered by branch; only those of `lanes` where they are given
        (`ChatRequest.lane`). Requests that are still sampled, and later ones, are refused. May be called twice."""
        self.is_closed = True
        for task in self._answers.values():
            task.cancel()
        nodes = [node for node in self._nodes if lanes is None or node.lane in lanes]
        return turns_of(nodes, self._sampling.noted)

    @property
    def is_busy(self) -> bool:
        """Whether an answer is being sampled."""
        return any(not task.done() for task in self._answers.values())

    def known(self, conversation: Conversation) -> int:
        """How many messages of a conversation are a request of this session and its answer; 0 for none."""
        digests = conversation.digests
        return next((count for count in range(len(digests), 0, -1) if digests[count - 1] in self._after), 0)

    def metrics(self) -> dict[str, float]:
        """`use` as metrics of a rollout: `endpoint/requests`, …"""
        return {f"endpoint/{name}": float(count) for name, count in asdict(self.use).items()}

    def _refuse_if_over(self) -> None:
        if self.is_closed:
            raise self._over()
        if isinstance(self.fault, EngineError):
            raise RefusedError(f"this rollout has failed: {safe_text(self.fault)}", status=503)

    def _over(self) -> RefusedError:
        return RefusedError("this session is closed, because its rollout is over", status=409, code="session_closed")

    def _used_up(self, reason: StopReason, message: str) -> RefusedError:
        self.stop_reason = reason
        code = "context_length_exceeded" if reason is StopReason.CONTEXT_FULL else reason.value
        return RefusedError(message, param="messages", code=code)

    def _faulty(self, error: UserFault | EngineError | ContractError) -> RefusedError:
        self.fault, self.stop_reason = error, stop_reason_of(error)
        if isinstance(error, EngineError):
            return RefusedError(f"the engine failed: {safe_text(error)}", status=503)
        text = error.text if isinstance(error, UserFault) else safe_text(error)
        return RefusedError(text, param="messages", code=self.stop_reason.value)


def _retrieve(task: asyncio.Task[ChatAnswer]) -> None:
    """Mark the error of a request as seen: its client may have left."""
    if not task.cancelled():
        task.exception()


def sent_message(answer: Answer, number: int) -> Message:
    """An answer as the client gets it. Calls without an id get one, which is unique in the session."""
    calls = tuple(
        ToolCall(call.name, call.arguments, call.id or f"call_{number}_{index}")
        for index, call in enumerate(answer.calls)
    )
    text = answer.text + "".join(each.text for each in answer.broken)
    return Message(
        "assistant", Message.of("assistant", text).content if text else (), tool_calls=calls, reasoning=answer.reasoning
    )
