"""A judge behind an OpenAI-compatible address, for benchmarks with free answers.

    judge = open_judge("gpt-4o", "https://api.openai.com/v1", max_requests=200)
    benchmark(lab, "mm-vet", data="mm-vet", judge=judge)

What was paid for is kept: the same prompt to the same judge is answered from the cache, so a run that was stopped goes on.
"""

from __future__ import annotations

import hashlib
import json
import os

from llava_lab.checks import entry
from llava_lab.errors import EndpointError, OptionError
from llava_lab.evaluation.benchmarks import Judge
from llava_lab.remote.black_box import cache_folder
from llava_lab.remote.client import Endpoint
from llava_lab.remote.replies import ReplyCache


@entry
def open_judge(
    model: str,
    base_url: str,
    *,
    max_requests: int = 500,
    key_variable: str | None = None,
    cache: str | os.PathLike | bool | None = None,
    timeout: float = 120.0,
    retries: int = 4,
) -> Judge:
    """A `Judge` that asks `model` at `base_url`; at most `max_requests` are ever sent, retries too.

    The key is read from `key_variable` (``OPENAI_API_KEY``) for each request and kept nowhere. `cache`: a folder, None for
    ``~/.cache/llava-lab/replies``, False for none. Raises OptionError, and when it is asked EndpointError and BudgetError.

    >>> from llava_lab.remote import open_judge
    >>> open_judge("a-model", "http://127.0.0.1:8000/v1", cache=False).about["base_url"]
    'http://127.0.0.1:8000/v1'
    """
    if not model.strip():
        raise OptionError("a judge has a name, the one its server knows")
    endpoint = Endpoint(base_url, max_requests=max_requests, key_variable=key_variable, timeout=timeout, retries=retries)
    replies = ReplyCache(cache_folder(cache))

    def ask(system: str, text: str, temperature: float, tokens: int) -> str:
        turns = [("system", system), ("user", text)]
        messages = [{"role": role, "content": said} for role, said in turns if said]
        body = {"model": model, "messages": messages, "temperature": temperature, "max_tokens": tokens}
        key = hashlib.sha256(json.dumps([endpoint.base_url, body], sort_keys=True).encode()).hexdigest()
        reply = replies.get(key)
        if reply is None:
            reply = endpoint.ask(body)
            if not reply.text and reply.silence:
                raise EndpointError(f"the judge gave no grade: {reply.silence}")
            replies.put(key, reply)
        return reply.text

    return Judge(model, ask, {"base_url": endpoint.base_url, "kind": "chat completions"})
