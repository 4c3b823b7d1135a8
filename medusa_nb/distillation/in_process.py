"""Self-distillation: the base model answers the prompts itself, and the heads learn from that."""

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset

from medusa_nb.base_model import context_length, eos_token_ids
from medusa_nb.chat import (
    accepted_by_template,
    can_supervise,
    clean_text,
    lay_out,
    prompt_ids,
    require_chat_template,
    with_answers,
)
from medusa_nb.distillation.batching import Request, answer_all
from medusa_nb.distillation.records import AnswerFile, AnswerSettings, Conversation, asked_turns, is_loop
from medusa_nb.distillation.states import KeptStates
from medusa_nb.errors import InputError
from medusa_nb.rope import rope_switches
from medusa_nb.storage import portable_name

SLACK = 8  # tokens that words may take more when they are split again as part of a conversation


@dataclass(frozen=True)
class DistillationSettings(AnswerSettings):
    """How answers are made; ``batch_size`` sequences at once, which has no influence on them."""

    batch_size: int = 64


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
    made_with = settings.made_with(portable_name(model.config.name_or_path))
    with AnswerFile(file, made_with, len(prompts), dropped) as answers:
        conversations = []
        for row in answers.still_open(prompts):
            try:
                conversations.append(OwnConversation(row, tokenizer))
            except InputError as error:
                answers.drop(row["id"], str(error))
        can_supervise(tokenizer, [dict(messages=c.turns) for c in conversations])
        keeper = KeptStates(states, model) if states else None
        for conversation in answer_conversations(model, tokenizer, conversations, settings, bool(states)):
            if conversation.failure:
                answers.drop(conversation.id, conversation.failure)
                continue
            if keeper and conversation.states:
                keeper.add(conversation.id, conversation.said, conversation.states)
            answers.add(conversation.record())
    return answers.report


def answer_conversations(
    model, tokenizer, conversations: list["OwnConversation"], settings: DistillationSettings, keep_states: bool = False
) -> Iterator["OwnConversation"]:
    """Yield conversations as all their turns are answered, or as they fail."""
    rooms = [c.room(settings.max_new_tokens) for c in conversations]
    limits = [n for n in (context_length(model), *rope_switches(model)) if n is not None]
    capacity = min([max(rooms, default=1), *limits])
    waiting: deque[Request] = deque()

    def ask(conversation: OwnConversation) -> bool:
        """Queue its next question; False if there is none, or it cannot be asked."""
        if conversation.failure or not conversation.turns:
            return False
        try:
            prompt = prompt_ids(tokenizer, conversation.ask())
        except InputError as error:
            conversation.failure = str(error)
            return False
        if len(prompt) + settings.max_new_tokens > capacity:
            conversation.failure = "prompt too long for the context"
            return False
        seed = f"{settings.seed}:{conversation.id}:{len(conversation.messages)}"
        waiting.append(Request(conversation, prompt, settings.max_new_tokens, seed))
        return True

    for conversation in sorted(conversations, key=lambda c: c.layout_tokens):
        if not ask(conversation):
            yield conversation
    if not waiting:
        return
    slots, eos = min(settings.batch_size, len(waiting)), eos_token_ids(model, tokenizer)
    for request in answer_all(model, waiting, slots, capacity, eos, settings.temperature, keep_states):
        request.about.take(request)
        if not ask(request.about):
            yield request.about


class OwnConversation(Conversation):
    """A conversation that the model in this process answers, with all token ids and states of its last answer.

    Raises:
        InputError: the chat template rejects it, even with the system turn folded into the first user turn.
    """

    def __init__(self, row: dict, tokenizer):
        super().__init__(row["id"], row["split"], accepted_by_template(tokenizer, asked_turns(row["messages"])))
        self.tokenizer, self.failure = tokenizer, ""
        self.said: list[int] = []
        self.states: list[torch.Tensor] = []
        self.answers = sum(turn["role"] == "user" for turn in self.turns)
        laid_out = lay_out(tokenizer, with_answers(self.turns, "x"))
        self.layout_tokens = len(tokenizer(laid_out, add_special_tokens=False).input_ids)

    def room(self, max_new_tokens: int) -> int:
        """How many tokens the conversation can grow to."""
        return self.layout_tokens + self.answers * (max_new_tokens + SLACK)

    def take(self, request: Request) -> None:
        """Add what the model answered."""
        plain, text = (self.tokenizer.decode(request.tokens, skip_special_tokens=skip) for skip in (True, False))
        if not plain.strip():
            self.failure = "empty answer"
        elif plain != text:
            self.failure = "the answer holds special tokens, which a conversation cannot keep apart from its layout"
        else:
            self.said = request.tokens if request.end is None else [*request.tokens, request.end]
            finish = "length" if request.end is None else "stop"
            message = dict(role="assistant", content=clean_text(text))
            self.answer(message, finish, len(request.prompt), len(self.said), is_loop(request.tokens))
            self.states = request.states if self.answers == 1 else []
