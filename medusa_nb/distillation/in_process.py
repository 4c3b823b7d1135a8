"""Self-distillation: the base model answers the prompts itself, and the heads learn from that."""

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from datasets import Dataset

from medusa_nb.base_model import context_length, eos_token_ids
from medusa_nb.chat import accepted_by_template, can_supervise, clean_text, lay_out, prompt_ids, require_chat_template
from medusa_nb.distillation.batching import Request, answer_all
from medusa_nb.distillation.records import AnswerFile, is_loop
from medusa_nb.distillation.states import KeptStates
from medusa_nb.errors import InputError
from medusa_nb.storage import portable_name
from medusa_nb.verification import rope_switches

SLACK = 8  # tokens that words may take more when they are split again as part of a conversation


@dataclass(frozen=True)
class DistillationSettings:
    """How answers are made.

    ``max_new_tokens`` per turn; ``temperature`` 0 is greedy; ``batch_size`` sequences at once (no influence on the
    answers); ``seed`` of the numbers drawn.
    """

    max_new_tokens: int = 160
    temperature: float = 0.0
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self):
        if self.max_new_tokens < 1 or self.batch_size < 1:
            raise InputError(f"max_new_tokens={self.max_new_tokens}, batch_size={self.batch_size}; both are at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"temperature={self.temperature}; choose 0 (greedy) or a number above")


def distil(
    model,
    tokenizer,
    prompts: Dataset,
    file: str | Path,
    settings: DistillationSettings | None = None,
    dropped: Counter | None = None,
    states: str | Path | None = None,
) -> dict:
    """Let the model answer every prompt that ``file`` does not hold yet; append answers to it.

    Conversations of several turns are answered turn by turn, with the model's own earlier answers. The format of the
    file, and what happens to what cannot be answered, is described in :mod:`medusa_nb.distillation.records`.

    Args:
        dropped: how many conversations were left out before, by reason, for the report.
        states: a folder to keep the hidden states of answers in (of conversations with one turn), for
            :func:`medusa_nb.training.features.cache_features`.

    Returns:
        A report: ``answered``, ``resumed`` (already in the file), ``dropped`` by reason, new ``tokens``, ``seconds``
        and ``tokens_per_second``.

    Raises:
        InputError: no chat template, no prompts, ``file`` was made with other settings, or training would refuse
            the answers.
    """
    settings = settings or DistillationSettings()
    require_chat_template(tokenizer)
    made_with = {name: value for name, value in asdict(settings).items() if name != "batch_size"}
    made_with |= dict(model=portable_name(model.config.name_or_path))
    with AnswerFile(file, made_with, len(prompts), dropped) as answers:
        open_rows = [row for row in prompts if row["id"] not in answers.answered | answers.faults.keys()]
        conversations = []
        for row in open_rows:
            try:
                conversations.append(Conversation(row, tokenizer))
            except InputError as error:
                answers.drop(row["id"], str(error))
        can_supervise(tokenizer, [dict(messages=c.asked) for c in conversations])
        keeper = KeptStates(states, model.get_output_embeddings().weight.shape[1]) if states else None
        for conversation in answer_conversations(model, tokenizer, conversations, settings, bool(states)):
            if conversation.failure:
                answers.drop(conversation.id, conversation.failure)
                continue
            if keeper and conversation.states:
                keeper.add(conversation.id, conversation.said, conversation.states)
            answers.add(conversation.record())
    return answers.report


def answer_conversations(
    model, tokenizer, conversations: list["Conversation"], settings: DistillationSettings, keep_states: bool = False
) -> Iterator["Conversation"]:
    """Yield conversations as all their turns are answered, or as they fail."""
    rooms = [c.room(settings.max_new_tokens) for c in conversations]
    limits = [n for n in (context_length(model), *rope_switches(model)) if n is not None]
    capacity = min([max(rooms, default=1), *limits])
    waiting: deque[Request] = deque()

    def ask(conversation: Conversation) -> bool:
        if len(conversation.prompt_ids) + settings.max_new_tokens > capacity:
            conversation.failure = "prompt too long for the context"
            return False
        seed = f"{settings.seed}:{conversation.id}:{len(conversation.messages)}"
        waiting.append(Request(conversation, conversation.prompt_ids, settings.max_new_tokens, seed))
        return True

    for conversation in sorted(conversations, key=lambda c: len(c.prompt_ids)):
        if not ask(conversation):
            yield conversation
    if not waiting:
        return
    slots, eos = min(settings.batch_size, len(waiting)), eos_token_ids(model, tokenizer)
    for request in answer_all(model, waiting, slots, capacity, eos, settings.temperature, keep_states):
        request.about.take(request)
        if not request.about.open or not ask(request.about):
            yield request.about


class Conversation:
    """One conversation on its way: the turns still to answer and those answered.

    Raises:
        InputError: the chat template rejects it, even with the system turn folded into the first user turn.
    """

    def __init__(self, row: dict, tokenizer):
        self.id, self.split, self.tokenizer = row["id"], row["split"], tokenizer
        asked = [dict(role=m["role"], content=clean_text(m["content"])) for m in row["messages"]]
        self.asked = accepted_by_template(tokenizer, [m for m in asked if m["role"] != "assistant"])
        self.layout_tokens = self._layout_tokens()
        self.turns = list(self.asked)
        self.messages: list[dict] = []
        self.finish_reason, self.failure = "", ""
        self.prompt_tokens = self.completion_tokens = 0
        self.loop, self.said, self.states = False, [], []
        self._next_user_turn()

    def _next_user_turn(self) -> None:
        while self.turns and self.turns[0]["role"] == "system":
            self.messages.append(self.turns.pop(0))
        if self.turns:
            self.messages.append(self.turns.pop(0))
        self.prompt_ids = prompt_ids(self.tokenizer, self.messages)

    def _layout_tokens(self) -> int:
        """Tokens of the whole conversation, laid out with an answer of one letter to every user turn."""
        turns = []
        for message in self.asked:
            turns += [message] if message["role"] != "user" else [message, dict(role="assistant", content="x")]
        return len(self.tokenizer(lay_out(self.tokenizer, turns), add_special_tokens=False).input_ids)

    def room(self, max_new_tokens: int) -> int:
        """How many tokens the conversation can grow to."""
        answers = sum(message["role"] == "user" for message in self.asked)
        return self.layout_tokens + answers * (max_new_tokens + SLACK)

    @property
    def open(self) -> bool:
        """True while there is a turn to answer."""
        return not self.failure and self.messages[-1]["role"] != "assistant"

    def take(self, request: Request) -> None:
        """Add the model's answer and move on to the next user turn."""
        plain, text = (self.tokenizer.decode(request.tokens, skip_special_tokens=skip) for skip in (True, False))
        if not plain.strip():
            self.failure = "empty answer"
        elif plain != text:
            self.failure = "the answer holds special tokens, which a conversation cannot keep apart from its layout"
        else:
            self.messages.append(dict(role="assistant", content=clean_text(text)))
            self.finish_reason = "stop" if request.finished else "length"
            self.prompt_tokens += len(self.prompt_ids)
            self.completion_tokens += len(request.tokens) + request.finished
            self.loop = self.loop or is_loop(request.tokens)
            self.said = request.tokens
            self.states = request.states if [m["role"] for m in self.asked].count("user") == 1 else []
            if self.turns:
                try:
                    self._next_user_turn()
                except InputError as error:
                    self.failure = str(error)

    def record(self) -> dict:
        """The line that is written."""
        names = ("id", "split", "messages", "finish_reason", "prompt_tokens", "completion_tokens", "loop")
        return {name: getattr(self, name) for name in names}
