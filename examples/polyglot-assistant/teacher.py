"""A teacher that stands for a large model: an endpoint of OpenAI's protocol on this machine, for the example alone.

It writes tasks of ``phrases.py`` where it is asked for tasks, with the slips of a real model (repetitions, a task
without output, a link), and translates the example's seeds. What it answers depends on the prompt alone.
"""

from __future__ import annotations

import json
import random
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType

from phrases import BEGINNINGS, ENDS, FACTS

_TASKS = re.compile(r"diverse tasks in (\w+).*write tasks (\d+) to (\d+)", re.DOTALL)
_TRANSLATION = re.compile(
    r"from \w+ into (\w+)\..*^1\. Instruction: (.*)$\n1\. Input:.*\n^1\. Output: (.*)$", re.DOTALL | re.M
)


def instruction(language: str, thing: str, begin: int, end: int) -> str:
    """A way to ask for what is known of a thing."""
    beginning, ending = BEGINNINGS[language][begin], ENDS[language][end]
    space = "" if language == "Japanese" else " "
    return f"{beginning}{space}{thing}{space if language == 'English' else ''}{ending}"


def block(number: int, asked: str, answer: str) -> str:
    return f"{number}. Instruction: {asked}\n{number}. Input: <noinput>\n{number}. Output: {answer}"


def answer(prompt: str) -> str:
    """What the teacher says.

    Raises:
        ValueError: a prompt that is neither of self-instruct's.
    """
    if found := _TASKS.search(prompt):
        return _tasks(prompt, found[1], int(found[2]), int(found[3]))
    if found := _TRANSLATION.search(prompt):
        number = list(FACTS["English"].values()).index(found[3].strip())
        thing, fact = list(FACTS[found[1]].items())[number]
        return block(1, instruction(found[1], thing, number, number), fact)
    raise ValueError(f"this teacher writes and translates tasks only; it was asked {prompt[:80]!r}")


def _tasks(prompt: str, language: str, first: int, last: int) -> str:
    pick = random.Random(prompt)
    blocks = []
    for number in range(first, last + 1):
        thing, fact = pick.choice(list(FACTS[language].items()))
        asked = instruction(language, thing, *(pick.randrange(len(kind[language])) for kind in (BEGINNINGS, ENDS)))
        slip = pick.random()
        fact = "" if slip < 0.03 else f"{fact} https://example.org" if slip < 0.06 else fact
        blocks.append(block(number, asked, fact))
    return "\n\n".join(blocks)


class Teacher:
    """The endpoint, as a context; ``url`` is what a client's ``base_url`` has to be."""

    def __init__(self) -> None:
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def __enter__(self) -> Teacher:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        prompt = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][-1]["content"]
        try:
            status, message = 200, {"role": "assistant", "content": answer(prompt)}
        except ValueError as error:
            self._send(400, {"error": {"message": str(error)}})
            return
        usage = {"prompt_tokens": len(prompt) // 4, "completion_tokens": len(message["content"]) // 4}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        self._send(status, {
            "id": "1", "object": "chat.completion", "created": 0, "model": "teacher", "choices": [choice],
            "usage": {**usage, "total_tokens": sum(usage.values())},
        })  # fmt: skip

    def _send(self, status: int, content: dict[str, object]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Says nothing of requests."""
