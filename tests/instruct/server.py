"""An endpoint that speaks OpenAI's protocol on this machine, with faults, and counts what it is asked and bills.

What it answers is a function of the prompt alone: tasks of a bank, in the form that prompts ask for, some cut off;
a translation is the task with a mark before each text. Other faults are a function of (prompt, how often it was asked).
"""

from __future__ import annotations

import json
import random
import re
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

FAULTS = ("time-out", "429", "500", "malformed", "no choices", "no usage", "closed")
UNIT = 4  # bytes of a token
Row = dict[str, Any]


def bank(count: int, seed: int = 0) -> list[Row]:
    """Tasks of random words; about a third have an input, and some are alike."""
    pick = random.Random(seed)
    words = ["".join(pick.choices("abcdefghijklmnopqrstuvwxyz", k=pick.randint(2, 7))) for _ in range(400)]

    def text(low: int, high: int) -> str:
        return " ".join(pick.choices(words, k=pick.randint(low, high)))

    rows = []
    for _ in range(count):
        instruction = text(4, 12)
        if rows and pick.random() < 0.2:
            instruction = pick.choice(rows)["instruction"] + " " + pick.choice(words)
        given = text(3, 9) if pick.random() < 0.4 else None
        if given and pick.random() < 0.2:
            given = instruction.rsplit(" ", 1)[0]
        if given and pick.random() < 0.2:
            given = instruction.split(" ", 1)[1] + " more"
        rows.append({"instruction": instruction, "input": given, "output": text(1, 20)})
    return rows


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """A client has gone: some are killed."""


class Endpoint:
    """The server, on a port that is free.

    Args:
        rows: what its tasks are drawn from.
        faulty: share of the attempts that go wrong. An eighth attempt never does.
        cut: share of the answers with tasks that are cut off.
        hook: is called with the number of a request when it comes, and again when it is answered.

    Attributes:
        received: how often each prompt came.
        faults: by kind.
        billed: tokens of prompts and answers of every request, delivered or not.
        most: requests at one time.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        faulty: float = 0.0,
        cut: float = 0.25,
        hook: Callable[[int, str], None] = lambda *_: None,
    ) -> None:
        self.rows, self.faulty, self.cut, self.hook = rows, faulty, cut, hook
        self.received: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.bodies: list[Row] = []
        self.keys: set[str | None] = set()
        self.billed = self.total = self.most = self._now = 0
        self._lock = threading.Lock()
        self._released = threading.Event()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                with suppress(OSError):  # the client has gone
                    endpoint._serve(self)

            def log_message(self, *_: object) -> None:
                pass

        self._server = _Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> Endpoint:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._released.set()
        self._server.shutdown()
        self._server.server_close()

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        prompt = body["messages"][0]["content"] if "messages" in body else body["prompt"]
        with self._lock:
            self.bodies.append(body)
            self.keys.add(handler.headers["Authorization"])
            self.received[prompt] += 1
            attempt, number = self.received[prompt], self.total
            self.total += 1
            self._now += 1
            self.most = max(self.most, self._now)
        self.hook(number, "asked")
        try:
            self._answer(handler, body, prompt, attempt)
        finally:
            with self._lock:
                self._now -= 1
        self.hook(number, "answered")

    def _answer(self, handler: BaseHTTPRequestHandler, body: Row, prompt: str, attempt: int) -> None:
        pick = random.Random(f"{attempt} {prompt}")
        kind = pick.choice(FAULTS) if attempt < 8 and pick.random() < self.faulty else ""
        text, finish = self.text(prompt), "stop"
        of_prompt = random.Random(f"cut {prompt}")
        if "Translate" not in prompt and of_prompt.random() < self.cut:
            text, finish = text[: int(len(text) * of_prompt.uniform(0.2, 0.99))], "length"
        spent = [len(prompt.encode()) // UNIT + 1, len(text.encode()) // UNIT + 1]
        if spent[1] > (most := body.get("max_tokens", 10**9)):
            text, finish, spent[1] = text.encode()[: most * UNIT].decode(errors="ignore"), "length", most
        with self._lock:
            if kind != "429":
                self.billed += sum(spent)
            if kind or finish == "length":
                self.faults[kind or "cut"] += 1
        choice: Row = {"index": 0, "finish_reason": finish}
        choice |= {"message": {"role": "assistant", "content": text}} if "messages" in body else {"text": text}
        reply: Row = {"id": "x", "choices": [choice]}
        if kind != "no usage":
            reply["usage"] = {"prompt_tokens": spent[0], "completion_tokens": spent[1]}
        if kind == "time-out":
            self._released.wait(60)
        elif kind == "429":
            send(handler, 429, b'{"error": {"message": "slow down"}}', {"Retry-After": "0.02"})
        elif kind == "500":
            send(handler, 500, b"oops")
        elif kind == "malformed":
            send(handler, 200, json.dumps(reply).encode()[:-20])
        elif kind == "no choices":
            send(handler, 200, json.dumps(reply | {"choices": []}).encode())
        elif kind == "closed":
            handler.close_connection = True
        else:
            send(handler, 200, json.dumps(reply).encode())

    def text(self, prompt: str) -> str:
        """What a model would write."""
        if "Translate" in prompt:
            block = prompt[prompt.index("1. Instruction:") :].removesuffix("1. Instruction:").strip()
            block = block.split("\n\nThe task in")[0]
            return re.sub(r"^(1\. \w+: )(?!<noinput>)", r"\1§ ", block, flags=re.MULTILINE)
        pick = random.Random(prompt)
        first, last = map(int, re.findall(r"write tasks (\d+) to (\d+)", prompt)[0])
        blocks = []
        for number in range(first, last + 1):
            row = pick.choice(self.rows)
            given = row["input"] or "<noinput>"
            parts = (("Instruction", row["instruction"]), ("Input", given), ("Output", row["output"]))
            blocks.append("\n".join(f"{number}. {label}: {text}" for label, text in parts))
        return "\n\n".join(blocks)


def send(handler: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
    handler.send_response(status)
    for name, value in {
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        **(headers or {}),
    }.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(body)
