"""Pretrained weights if the hub answers in time, else those in its cache, else random ones, said plainly."""

from __future__ import annotations

import contextlib
import http.server
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import save_file
from sait_cli import options

MODEL = "test_vit"


@contextlib.contextmanager
def hub(status: int) -> Iterator[str]:
    """The address of a server that answers everything with this status."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(("status", "answers"), [(200, True), (401, False), (404, False), (500, False)])
def test_hub_answers(status: int, answers: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with hub(status) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        assert options.hub_answers("timm/anything") is answers


def test_a_hub_that_accepts_and_stays_silent_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(options, "HUB_SECONDS", 0.2)
        assert not options.hub_answers("timm/anything")


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "no address"])
def test_no_hub_at_all(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    assert not options.hub_answers("timm/anything")


def test_without_hub_and_cache_the_weights_are_random_and_repeatable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "hub_answers", lambda repository: False)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    (first, described), (second, _) = (options.load_model(MODEL, "auto") for _ in range(2))
    assert described.startswith("random weights (the hub gave none")
    assert torch.equal(first.head.weight, second.head.weight)


def test_without_hub_the_cache_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = timm.create_model(MODEL)
    path = tmp_path / "model.safetensors"
    save_file(trained.state_dict(), path)
    monkeypatch.setattr(options, "hub_answers", lambda repository: False)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: str(path))
    model, described = options.load_model(MODEL, "auto")
    assert described == "pretrained weights"
    assert torch.equal(model.blocks[3].attn.qkv.weight, trained.blocks[3].attn.qkv.weight)


def test_a_download_that_breaks_off_leaves_random_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model

    def break_off(name: str, pretrained: bool = False, **options: object) -> torch.nn.Module:
        if pretrained:
            raise ConnectionResetError("connection reset by peer")
        return create(name, **options)

    monkeypatch.setattr(options, "hub_answers", lambda repository: True)
    monkeypatch.setattr(timm, "create_model", break_off)
    _, described = options.load_model(MODEL, "auto")
    assert described.startswith("random weights")
