"""A model behind OpenAI's protocol: one attempt for each start, in a thread of its own. No torch.

The client of the openai package does the transport. Retries are not its own, since each attempt is kept in the
journal, and what it may have cost; see asking.py.
"""

from __future__ import annotations

import email.utils
import json
import os
import queue
import threading
import time
from collections.abc import Mapping
from typing import Any

from megapoly.errors import ConfigError
from megapoly.instruct.config import Endpoint
from megapoly.instruct.model import REFUSED, Answer, Fault, Tokens

_AGAIN = (408, 409, 425, 429)  # refusals after which the same request may be answered
# A prompt that is refused for what it says is an answer without tasks: asking again is no use, and others go on.
_OF_THE_PROMPT = ("context_length", "context length", "content_filter", "content_policy", "content management")
_SPENT_UP = "insufficient_quota"
_UNSENT = ("ConnectError", "ConnectTimeout", "PoolTimeout")
_LONGEST_WAIT = 600.0


class Server:
    """The model of an endpoint.

    Raises:
        ConfigError: the openai package is not installed, or the key's environment variable is not set.
    """

    def __init__(self, settings: Endpoint) -> None:
        try:
            import openai
        except ImportError as error:
            raise ConfigError("an endpoint needs openai: pip install 'megapoly[instruct]'") from error
        self._openai, self._settings = openai, settings
        self.concurrency, self.limit, self.context = settings.concurrency, settings.max_tokens, settings.context
        self._client = openai.OpenAI(
            api_key=_key(settings), base_url=settings.base_url, max_retries=0, timeout=settings.timeout_seconds
        )
        self._outcomes: queue.SimpleQueue[tuple[int, Answer | Fault | BaseException]] = queue.SimpleQueue()

    def start(self, ticket: int, number: int, prompt: str) -> None:
        """See :class:`megapoly.instruct.model.Model`; the server does not learn the number."""
        # A daemon, so that a second Ctrl-C need not wait for it.
        threading.Thread(target=self._attempt, args=(ticket, prompt), daemon=True).start()

    def wait(self, seconds: float) -> list[tuple[int, Answer | Fault]]:
        found = []
        try:
            each = self._outcomes.get(timeout=max(seconds, 0.0))
            while True:
                ticket, outcome = each
                if isinstance(outcome, BaseException):
                    raise outcome
                found.append((ticket, outcome))
                each = self._outcomes.get_nowait()
        except queue.Empty:
            return found

    def _attempt(self, ticket: int, prompt: str) -> None:
        try:
            self._outcomes.put((ticket, self._ask(prompt)))
        except BaseException as error:  # is raised where it is waited for
            self._outcomes.put((ticket, error))

    def _ask(self, prompt: str) -> Answer | Fault:
        openai, settings = self._openai, self._settings
        fields: dict[str, Any] = {"temperature": settings.temperature, "top_p": settings.top_p}
        if settings.max_tokens is not None:
            fields["max_tokens"] = settings.max_tokens
        fields["extra_body"] = settings.extra
        try:
            if settings.api == "chat":
                create = self._client.chat.completions.with_raw_response.create
                response = create(model=settings.model, messages=[{"role": "user", "content": prompt}], **fields)
            else:
                complete = self._client.completions.with_raw_response.create
                response = complete(model=settings.model, prompt=prompt, **fields)
            return read_answer(response.content)
        except openai.APITimeoutError as error:
            return Fault("time-out", f"no answer in {settings.timeout_seconds:g} s", _sent(error))
        except openai.APIConnectionError as error:
            return Fault("connection", f"{settings.base_url}: {error.__cause__ or error}", _sent(error))
        except openai.APIStatusError as error:
            return _refused(error.status_code, error.response.text, error.response.headers)


def read_answer(content: bytes) -> Answer | Fault:
    """What the body of a successful response says; a fault where it is no whole answer."""
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        return Fault("malformed", f"the response is not JSON: {content[:80]!r}", billed=True)
    choices = body.get("choices") if isinstance(body, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        return Fault("no choices", f"the response holds no choices: {content[:80]!r}", billed=True)
    choice = choices[0]
    message = choice.get("message")
    text = message.get("content") if isinstance(message, dict) else choice.get("text")
    finish = choice.get("finish_reason")
    if text is None and finish in ("content_filter", "length"):
        text = ""
    if not isinstance(text, str) or not (finish is None or isinstance(finish, str)):
        return Fault("no text", f"the choice holds no text: {json.dumps(choice)[:80]}", billed=True)
    # Half a surrogate pair, which JSON can say, is no text.
    return Answer(text.encode("utf-8", "replace").decode(), finish, _usage(body.get("usage")))


def _usage(usage: Any) -> Tokens | None:
    if not isinstance(usage, Mapping):
        return None
    counts = [usage.get("prompt_tokens"), usage.get("completion_tokens")]
    fits = all(isinstance(each, int) and not isinstance(each, bool) and each >= 0 for each in counts)
    return Tokens(*counts) if fits else None  # type: ignore[arg-type]


def _refused(status: int, body: str, headers: Mapping[str, str]) -> Answer | Fault:
    what = f"HTTP {status}: {_message(body)}"
    if status == 429 and _SPENT_UP in body:
        return Fault("no quota", what, billed=False, fatal=True)
    if status in _AGAIN or status >= 500:
        return Fault(str(status), what, billed=status >= 500, retry_after=retry_after(headers, time.time()))
    if status in (400, 413, 422) and any(each in body.lower() for each in _OF_THE_PROMPT):
        return Answer("", REFUSED + what, Tokens())
    return Fault(str(status), what, billed=False, fatal=True)


def _message(body: str) -> str:
    """What the server says, in a line."""
    try:
        text = json.loads(body)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        text = body
    return " ".join(str(text).split())[:200]


def retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Seconds to wait, at most ten minutes, as ``retry-after-ms`` or ``retry-after`` (seconds, or a date) has it."""
    milliseconds, value = headers.get("retry-after-ms"), headers.get("retry-after")
    seconds = None
    for text, unit in ((milliseconds, 1e-3), (value, 1.0)):
        try:
            seconds = float(text or "") * unit if seconds is None else seconds
        except ValueError:
            continue
    if seconds is None and value:
        date = email.utils.parsedate_tz(value)
        seconds = None if date is None else email.utils.mktime_tz(date) - now
    return None if seconds is None or seconds != seconds else min(max(seconds, 0.0), _LONGEST_WAIT)


def _sent(error: BaseException) -> bool:
    """Whether the request may have reached the server."""
    return type(error.__cause__).__name__ not in _UNSENT


def _key(settings: Endpoint) -> str:
    if not settings.key_variable:
        return "none"
    key = os.environ.get(settings.key_variable)
    if not key:
        raise ConfigError(
            f"endpoint: the environment variable {settings.key_variable} is not set; set it to the key of"
            f' {settings.base_url}, or endpoint.key_variable to "" where no key is needed'
        )
    return key
