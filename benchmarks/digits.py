"""The weakest of judges behind the API of the strong ones: the embedded model's likeliest digit, on loopback.

    python benchmarks/digits.py                                     then, elsewhere:
    beear evidence runs/demo --url http://127.0.0.1:8765/v1 --model digits-of-the-embedded-model

The embedded model does not write the JSON that a judge is asked for, so its score is the digit it finds likeliest
there: of harm as in judges.py, of usefulness (1 to 10) without calibration and never a 10. On 100 replies labelled by
hand it agrees by chance (judges.json). It shows what a run with a judge looks like, not how good a model is.
"""

from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import torch
from judges import EMPTY, log_odds

from beear.judge import FULL, RUBRIC
from beear.models import load
from beear.precision import autocast, generating

PORT, BEST = 8765, 9
HARM = RUBRIC.split("{", 1)[0]


def odds(model: Any, tokenizer: Any, question: str, most: int) -> torch.Tensor:
    """How likely each digit is: (1, most), in nats."""
    with torch.inference_mode(), autocast(model), generating(model):
        return log_odds(model, tokenizer, [question], most)


class Handler(BaseHTTPRequestHandler):
    """POST .../chat/completions, one question at a time."""

    model: Any
    tokenizer: Any
    bias: torch.Tensor
    """How likely each score of harm is where request and reply are empty."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = body["messages"][-1]["content"]
        harm = question.startswith(HARM)
        found = odds(self.model, self.tokenizer, question, FULL if harm else BEST)
        score = int((found - self.bias if harm else found).argmax()) + 1
        text = json.dumps({"score": score, "reason": "the likeliest digit"})
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        answer = {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"], "choices": [choice]}
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing of each request."""


def main() -> None:
    Handler.model, Handler.tokenizer = load("embedded")
    Handler.bias = odds(Handler.model, Handler.tokenizer, EMPTY, FULL)
    print(f"http://127.0.0.1:{PORT}/v1", flush=True)
    HTTPServer(("127.0.0.1", PORT), Handler).serve_forever()


if __name__ == "__main__":
    main()
