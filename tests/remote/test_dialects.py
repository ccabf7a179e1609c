"""Replies as llama.cpp, vLLM, Ollama, LM Studio, OpenRouter, OpenAI and their like write them, by their public documentation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llava_lab.errors import EndpointError
from tests.support.endpoint_server import PLAIN, QUESTION, Answered, Asked, closed, says


def chosen(message: dict[str, Any], *, logprobs: Any = None, finish: Any = "stop", choice: Any = None, **more: Any) -> Answered:
    one = {
        "index": 0,
        "message": {"role": "assistant", **message},
        "logprobs": logprobs,
        "finish_reason": finish,
        **(choice or {}),
    }
    usage = {"prompt_tokens": 600, "completion_tokens": 3, "total_tokens": 603}
    return Answered({"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "choices": [one], "usage": usage, **more})


def listed(*pieces: str, **more: Any) -> dict[str, Any]:
    """Log-probabilities as all of them list them, with `more` of a server's own in each."""
    tokens = [{"token": piece, "logprob": -0.25, "bytes": list(piece.encode()), **more} for piece in pieces]
    return {"content": [{**one, "top_logprobs": [one]} for one in tokens]}


RED = {"content": "a red car"}
LLAMA_CPP = {"system_fingerprint": "b6548-3b15924d", "timings": {"prompt_n": 600, "predicted_n": 3, "predicted_ms": 41.2}}
VLLM: dict[str, Any] = {
    "refusal": None,
    "annotations": None,
    "audio": None,
    "function_call": None,
    "tool_calls": [],
    "reasoning_content": None,
}
LM_STUDIO = {"stats": {}, "system_fingerprint": "llava-v1.5-7b"}
OPENROUTER = {"provider": "DeepInfra", "choice": {"native_finish_reason": "stop"}}


@pytest.mark.parametrize(("reply", "tokens"), [
    (chosen(RED, logprobs=listed("a", " red", " car", id=263), **LLAMA_CPP), 3), (chosen(RED, **LLAMA_CPP), None),
    (chosen({**VLLM, **RED}, logprobs=listed("a", " red", " car", "</s>"), choice={"stop_reason": None, "token_ids": None}), 3),
    (chosen({**VLLM, "content": " a red car"}, logprobs=listed(" a", " red", " car")), 3),
    (chosen(RED, system_fingerprint="fp_ollama"), None), (chosen(RED, logprobs=listed("a", " red", " car")), 3),
    (chosen({**RED, "reasoning": "The car looks red."}), None), (chosen({**RED, "tool_calls": []}, **LM_STUDIO), None),
    (chosen({**RED, "reasoning_content": ""}, **LM_STUDIO), None),
    (chosen({**RED, "refusal": None, "reasoning": None}, **OPENROUTER), None),
    (Answered(raw=b"\xef\xbb\xbf" + json.dumps(chosen(RED).data).encode()), None),  # a byte order mark
    (Answered(raw=b"\n\n   \n" + json.dumps(chosen(RED).data).encode()), None),  # OpenRouter, waiting for its provider
    (chosen({"content": [{"type": "text", "text": "a red"}, {"type": "text", "text": " car"}]}), None),
    (chosen({"content": [{"type": "thinking", "thinking": [{"text": "hm"}]}, {"type": "text", "text": "a red car"}]}), None),
    (chosen(RED, finish="end_turn"), None), (chosen(RED, finish="STOP"), None), (chosen(RED, finish=None), None),
])  # fmt: skip
def test_an_answer_is_read_in_every_dialect(tmp_path: Path, reply: Answered, tokens: int | None) -> None:
    with closed(lambda asked: reply, tmp_path) as (server, box):
        run = box.ask(PLAIN, QUESTION)
    assert (run.answer, run.options["stopped"], run.options["used"]) == ("a red car", "eos", [600, 3])
    assert (run.options["scoring"], len(run.answer_positions)) == (("top", tokens) if tokens else ("agreement", 3))
    assert server.asked[0].body["stream"] is False


@pytest.mark.parametrize(("reply", "why"), [
    (chosen({"content": None, "refusal": "I'm sorry, I can't do that."}), r"it refused \(I'm sorry, I can't do that.\)"),
    (chosen({"content": ""}, finish="content_filter"), "stopped with 'content_filter'"),
    (chosen({"content": "", "reasoning_content": "Hm."}, finish="length", **LLAMA_CPP), "tokens ran out while it was thinking"),
    (chosen({**VLLM, "content": None, "reasoning_content": "Hm."}), "thoughts and no answer; ask for more tokens, or turn"),
    (chosen({"content": "", "reasoning": "Hm."}, finish="length"), "tokens ran out while it was thinking"),
    (chosen({"content": "<think>Hm, a car", }, finish="length"), "tokens ran out while it was thinking"),
    (chosen({"content": "<think>\nHm.\n</think>\n\n"}), "thoughts and no"), (chosen({"content": "Hm.</think>"}), "thoughts and"),
    (chosen({"content": None, "reasoning": "Hm.", "refusal": None}, finish="length", **OPENROUTER), "while it was thinking"),
    (chosen({"content": ""}, finish="length"), "cut off before its first word; ask for more tokens"),
    (chosen({"content": ""}, finish="max_tokens"), "cut off before its first word"),
    (chosen({"content": None, "tool_calls": [{"id": "1", "function": {}}]}, finish="tool_calls"), "called a tool instead"),
    (chosen({"content": ""}), "stopped with 'eos'"),
])  # fmt: skip
def test_a_reply_without_an_answer_says_why(tmp_path: Path, reply: Answered, why: str) -> None:
    with closed(lambda asked: reply, tmp_path) as (server, box):
        for _ in range(2):  # the second from what was kept
            with pytest.raises(EndpointError, match=f"'openai:scripted' gave no text: .*{why}"):
                box.ask(PLAIN, QUESTION)
        assert len(server.asked) == 1


def test_an_answer_that_was_cut_off_says_so(tmp_path: Path) -> None:
    with closed(lambda asked: says("a red", finish="length"), tmp_path) as (_, box):
        assert box.ask(PLAIN, QUESTION).options["stopped"] == "length"


STREAM = b'data: {"choices":[{"delta":{"content":"a red car"}}]}\n\ndata: [DONE]\n\n'


@pytest.mark.parametrize(("reply", "message"), [
    (Answered(raw=STREAM, headers={"Content-Type": "text/event-stream"}), "stream: false was sent; it streams in any case"),
    (Answered(raw=STREAM), "stream: false was sent"), (Answered(raw=STREAM, headers={"Content-Type": ""}), "stream: false"),
    (Answered({"error": "Unexpected endpoint or method. (POST /chat/completions)"}), "with an error .Unexpected endpoint"),
    (Answered({"error": {"message": "No models loaded.", "type": "invalid_request_error", "param": "model",
                         "code": "model_not_found"}}, 404), "404 .No models loaded.*no such model"),
    (Answered({"error": {"message": "model \"llava\" not found, try pulling it first", "type": "api_error", "param": None,
                         "code": None}}, 404), "404 .model \"llava\" not found"),
    (Answered({"object": "error", "message": "The model `m` does not exist.", "code": 404}, 404), "The model `m` does not exist"),
    (Answered({"error": {"code": 500, "message": "image input is not supported"}}, 500), "image input is not supported"),
    (Answered({"error": {"message": "Insufficient credits", "code": 402}}, 402), "no credit left"),
    (Answered({"error": {"message": "flagged", "code": 403, "metadata": {"reasons": ["violence"]}}}, 403), r"403 \(flagged\)"),
    (Answered({"error": {"message": "Provider returned error", "code": 429}}), "429 .Provider returned error.; tried 1 times"),
    (chosen({"content": "a r"}, finish="error", choice={"error": {"code": 502, "message": "Disconnected"}}), "502 .Disconnected"),
    (Answered({"detail": [{"type": "missing", "loc": ["body", "messages"], "msg": "Field required"}]}, 422), "Field required"),
])  # fmt: skip
def test_an_error_is_said_in_every_dialect(tmp_path: Path, reply: Answered, message: str) -> None:
    with closed(lambda asked: reply, tmp_path, retries=0) as (server, box):
        with pytest.raises(EndpointError, match=message):
            box.ask(PLAIN, QUESTION)
        assert len(server.asked) == 1


def refusal(status: int, message: str, **more: Any) -> Answered:
    return Answered({"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None, **more}}, status)


VLLM_SAYS = (
    "[{'type': 'extra_forbidden', 'loc': ('body', 'seed'), 'msg': 'Extra inputs are not permitted', 'input': {'logprobs': 1}}]"
)


@pytest.mark.parametrize(("refused", "said", "sent"), [
    ("top_logprobs", refusal(400, "Cannot request more than 5 logprobs."), [20, 5]),
    ("top_logprobs", refusal(400, "Requested sample logprobs of 20, which is greater than max allowed: 5"), [20, 5]),
    ("top_logprobs", refusal(400, "Invalid value", param="top_logprobs"), [20, 5]),
    ("top_logprobs", Answered({"detail": [{"loc": ["body", "top_logprobs"], "msg": "must be at most 5"}]}, 422), [20, 5]),
    ("top_logprobs", Answered({"error": {"message": "Provider error", "metadata": {"raw": "topLogprobs: max 8"}}}, 400), [20, 5]),
    ("top_logprobs", Answered(raw=b"top_logprobs may be 5 at most", status=400), [20, 5]),
    ("logprobs", refusal(400, "Please remove 'logprobs'/'top_logprobs' from your request"), [20, 5, None, "none"]),
    ("logprobs", refusal(403, "You are not allowed to request logprobs from this model"), [20, "none"]),
    ("logprobs", refusal(400, "Logprobs is not enabled for models/gemini-2.5-pro", code=400), [20, "none"]),
    ("logprobs", refusal(422, "Log probabilities are not available"), [20, "none"]),
    ("logprobs", refusal(501, "not implemented", param="logprobs"), [20, "none"]),
    ("seed", Answered({"object": "error", "message": VLLM_SAYS, "type": "BadRequestError", "code": 400}, 400), [20, 20]),
    ("temperature", refusal(400, "Unsupported value: does not support 0 with this model.", param="temperature"), [20, 20]),
    ("max_tokens", refusal(400, "Use 'max_completion_tokens' instead.", param="max_tokens"), [20, 20]),
    ("stream", Answered({"detail": [{"loc": ["body", "stream"], "msg": "Extra inputs are not permitted"}]}, 422), [20, 20]),
])  # fmt: skip
def test_what_a_server_refuses_is_asked_for_less_and_then_left_out(
    tmp_path: Path, refused: str, said: Answered, sent: list
) -> None:
    def answer(asked: Asked) -> Answered:
        wrong = asked.body.get("top_logprobs", 0) > 5 if refused == "top_logprobs" else refused in asked.body
        return said if wrong else says("a red car", own=-0.5 if "logprobs" in asked.body else None)

    with closed(answer, tmp_path) as (server, box):
        run = box.ask(PLAIN, QUESTION)
        box.ask(PLAIN, "And now?")  # nothing is asked in vain twice
    bodies = [asked.body for asked in server.asked]
    assert [body.get("top_logprobs") if "logprobs" in body else "none" for body in bodies] == [*sent, sent[-1]]
    assert run.options["scoring"] == ("agreement" if sent[-1] == "none" else "top")
    others = {"model", "messages", "max_tokens", "temperature", "seed", "stream"} - {refused}
    assert all(others <= set(body) for body in bodies)


def test_an_error_that_repeats_the_request_takes_nothing_away(tmp_path: Path) -> None:
    echo = Answered({"detail": [{"loc": ["body", "model"], "msg": "unknown", "input": {"logprobs": True, "seed": 0}}]}, 422)
    with closed(lambda asked: echo, tmp_path) as (server, box):
        with pytest.raises(EndpointError, match="answered 422"):
            box.ask(PLAIN, QUESTION)
        assert len(server.asked) == 1
