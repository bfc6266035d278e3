"""Responses of the OpenAI API, in full and in chunks, from the events of a request."""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mooshak.generation.completion import Completion
from mooshak.serving.events import Event, Token
from mooshak.serving.protocol import Prompt, Request
from mooshak.tokenizer.token_texts import TokenTexts

MIN_LOG_PROB = -9999.0
"""OpenAI's number for a probability of zero; JSON has no infinity."""


@dataclass
class Choice:
    """A sample of a request, filled by its events."""

    request: Request
    index: int
    """Index of the sample among those of all prompts."""
    texts: TokenTexts
    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    prompt_tokens: list[Token] = field(default_factory=list)
    completion: Completion | None = None
    _opened: bool = False
    _decoder: Any = field(default_factory=lambda: codecs.getincrementaldecoder("utf-8")("ignore"))
    _offset: int | None = None

    def push(self, event: Event) -> None:
        """Append an event of the sample."""
        self.prompt_tokens += event.prompt or ()
        if event.completion is not None:
            self.completion = event.completion
        self.text += event.text
        self.tokens += event.tokens

    def body(self) -> dict[str, Any]:
        """Return the complete choice."""
        done, request = self.completion, self.request
        assert done is not None
        text = self._echoed() + (done.text or "")
        choice = self._choice(text, [*self._scored_prompt(), *self.tokens])
        if request.is_chat:
            content = choice.pop("text")
            choice["message"] = {"role": "assistant", "content": content, "refusal": None}
        choice["finish_reason"] = self._finish_reason()
        if request.return_token_ids:
            choice["prompt_token_ids"] = self._prompt.ids
            choice["token_ids"] = done.token_ids
        return choice

    def chunks(self) -> list[dict[str, Any]]:
        """Return chunks with what came since the last call."""
        found = []
        if not self._opened:
            self._opened = True
            if self.request.is_chat:
                opening: dict[str, Any] = {"role": "assistant", "content": ""}
                found.append({"index": self.index, "delta": opening, "finish_reason": None})
            if self.request.echo or self.request.return_token_ids:
                found.append(self._chunk(self._echoed(), self._scored_prompt(), []))
                if self.request.return_token_ids:
                    found[-1]["prompt_token_ids"] = self._prompt.ids
        if self.text or self.tokens or self.completion is not None:
            found.append(self._chunk(self.text, self.tokens, [token.id for token in self.tokens]))
            found[-1]["finish_reason"] = self._finish_reason()
        self.text, self.tokens = "", []
        return found

    @property
    def _prompt(self) -> Prompt:
        return self.request.prompts[self.index // self.request.n]

    def _finish_reason(self) -> str | None:
        return None if self.completion is None else self.completion.finish_reason

    def _echoed(self) -> str:
        """Return the text of the prompt, if it is part of the result."""
        if not self.request.echo:
            return ""
        prompt = self._prompt
        return prompt.text if prompt.text is not None else self.texts.tokenizer.decode(prompt.ids)

    def _scored_prompt(self) -> list[Token]:
        return self.prompt_tokens if self.request.echo else []

    def _chunk(self, text: str, tokens: Sequence[Token], ids: list[int]) -> dict[str, Any]:
        choice = self._choice(text, tokens)
        if self.request.is_chat:
            text = choice.pop("text")
            choice["delta"] = {"content": text} if text or tokens else {}
        if self.request.return_token_ids:
            choice["token_ids"] = ids
        return choice

    def _choice(self, text: str, tokens: Sequence[Token]) -> dict[str, Any]:
        """Return a choice, or a part of one, with the log-probabilities of its tokens."""
        logprobs = None
        if self.request.top_logprobs is not None:
            logprobs = (
                self._chat_logprobs(tokens) if self.request.is_chat else self._logprobs(tokens)
            )
        return {"index": self.index, "text": text, "logprobs": logprobs, "finish_reason": None}

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any]:
        """Return log-probabilities as /v1/completions has them."""
        top: list[dict[str, float] | None] = []
        for token in tokens:
            if token.log_prob is None:
                top.append(None)
                continue
            named: dict[str, float] = {}
            # Tokens of one text count as the most probable one; the chosen one is always there.
            for id, log_prob in [*self._top(token), (token.id, token.log_prob)]:
                named.setdefault(self.texts.text_of(id), max(log_prob, MIN_LOG_PROB))
            top.append(named)
        return {
            "tokens": [self.texts.text_of(token.id) for token in tokens],
            "token_logprobs": [_bounded(token.log_prob) for token in tokens],
            "top_logprobs": top,
            "text_offset": [self._text_offset(token) for token in tokens],
        }

    def _chat_logprobs(self, tokens: Sequence[Token]) -> dict[str, Any]:
        """Return log-probabilities as /v1/chat/completions has them."""
        content = [
            self._named(token.id, token.log_prob)
            | {"top_logprobs": [self._named(*one) for one in self._top(token)]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _named(self, id: int, log_prob: float | None) -> dict[str, Any]:
        data = self.texts.bytes_of(id)
        return {
            "token": self.texts.text_of(id),
            "logprob": _bounded(log_prob),
            "bytes": None if data is None else list(data),
        }

    def _top(self, token: Token) -> list[tuple[int, float]]:
        return list((token.top or {}).items())[: self.request.top_logprobs]

    def _text_offset(self, token: Token) -> int:
        """Return the place of the next token in the text of the choice, in characters."""
        if self._offset is None:
            # Tokenizers may strip the space of the first word of a text.
            data = b"".join(self.texts.bytes_of(t.id) or b"" for t in self._scored_prompt()[:8])
            stripped = data.startswith(b" ") and not self._echoed().startswith(" ")
            self._offset = -1 if stripped else 0
        place = max(self._offset, 0)
        self._offset += len(self._decoder.decode(self.texts.bytes_of(token.id) or b""))
        return place


def _bounded(log_prob: float | None) -> float | None:
    return None if log_prob is None else max(log_prob, MIN_LOG_PROB)


def usage(request: Request, choices: Sequence[Choice]) -> dict[str, int]:
    """Return the numbers of tokens: each prompt counts once, end tokens do not count."""
    prompt = sum(len(one.ids) for one in request.prompts)
    generated = sum(len(c.completion.token_ids) for c in choices if c.completion is not None)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
    }
