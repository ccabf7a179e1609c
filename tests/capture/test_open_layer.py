"""A layer taken apart: its gradient, put together again, is autograd's, and nothing of it stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llava_lab.attribution.relevancy import attention_backward
from llava_lab.capture.open_layer import keep_calls, open_layer, position_wise
from llava_lab.capture.watch import HANDLERS
from llava_lab.errors import LabError
from llava_lab.models import Lab
from llava_lab.models.layout import language_layers, used_vision_layers
from llava_lab.results import Run
from tests.support.closeness import TERMS, close
from tests.support.gradients import noise_run


@pytest.fixture(scope="module")
def run(tiny_random: Lab) -> Run:
    return noise_run(tiny_random)


@pytest.mark.parametrize("tower", ["language", "vision"])
def test_an_opened_layer_s_gradient_is_autograd_s(tiny_random: Lab, run: Run, tower: str) -> None:
    """A layer's input gradient, put together from its two halves and the attention by hand, for rows that are few and many."""
    layer = (language_layers if tower == "language" else used_vision_layers)(tiny_random.model)[1]
    with torch.no_grad(), keep_calls([layer]) as calls:
        tiny_random.model(**tiny_random.inputs(run), use_cache=False)
        call = calls[layer]
        opened = open_layer(call)
        for rows in (slice(None), slice(-1, None)):
            gradient = torch.zeros(2, *opened.out.shape[1:])
            gradient[:, rows] = torch.randn(gradient[:, rows].shape, generator=torch.Generator().manual_seed(0))
            attended, around = opened.from_out(gradient)
            inner = attention_backward(opened, attended, lambda streams, at, product: None)
            assert inner is not None
            found = around + opened.from_attention(*inner)
            x = call.x.clone().requires_grad_()
            with torch.enable_grad():
                out = layer(x, *call.args, **call.kwargs)
            for number in range(2):
                (expected,) = torch.autograd.grad(out, x, gradient[number][None], retain_graph=True)
                close(found[number], expected[0], terms=TERMS)
    assert not calls, "the layers' inputs must go when the block ends"


def test_gradients_that_never_meet_go_back_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, 4, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    out = (x**3).cumsum(-1)
    gradient = torch.zeros(2, 4, 3)
    gradient[0, 1], gradient[1, 3] = 1.0, 2.0
    expected = [torch.autograd.grad(out, x, one[None], retain_graph=True)[0][0] for one in gradient]
    calls = []
    real = torch.autograd.grad

    def counted(*args: Any, **kwargs: Any) -> Any:
        if args[0] is out:  # a thread that another test left at work may ask for gradients as well
            calls.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    (found,) = position_wise(out, (x,), gradient)
    assert len(calls) == 1
    close(found, torch.stack(expected), terms=TERMS)
    gradient[0, 3] = 1.0
    position_wise(out, (x,), gradient)
    assert len(calls) == 3


def test_a_layer_that_does_not_attend_is_refused(tiny_random: Lab, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = language_layers(tiny_random.model)[0]
    with torch.no_grad(), keep_calls([layer]) as calls:
        tiny_random.model(**tiny_random.inputs(run), use_cache=False)
        monkeypatch.setattr(layer.self_attn, "forward", lambda hidden_states, **kwargs: (hidden_states, None))
        with pytest.raises(
            LabError, match="LlamaDecoderLayer to attend once through transformers' attention interface, got 0 times"
        ):
            open_layer(calls[layer])
    assert not HANDLERS
