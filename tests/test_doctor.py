"""The report tells the truth about a whole, a cut-off and a missing model, and never stops on what it finds."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest

from llava_lab import doctor

FILES = {"config.json": "{}", "tokenizer.json": "{}", "processor_config.json": "{}"}


def _folder(folder: Path, weights: bytes) -> Path:
    folder.mkdir()
    for name, text in FILES.items():
        (folder / name).write_text(text, "utf-8")
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def _weights(*, cut: int = 0) -> bytes:
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    whole = len(header).to_bytes(8, "little") + header + bytes(8)
    return whole[: len(whole) - cut]


def test_a_whole_model_folder_is_usable_and_counted(tmp_path: Path) -> None:
    found = doctor.check_folder(_folder(tmp_path / "tiny", _weights()))
    assert found["usable"]
    assert found["why"].startswith("1 tensors")


@pytest.mark.parametrize(
    ("weights", "why"),
    [(_weights(cut=3), "cut off"), (b"not weights at all", "not a safetensors file"), (b"", "not a safetensors file")],
    ids=["cut off", "other bytes", "empty"],
)
def test_broken_weights_are_named(tmp_path: Path, weights: bytes, why: str) -> None:
    found = doctor.check_folder(_folder(tmp_path / "tiny", weights))
    assert not found["usable"]
    assert why in found["why"]


def test_missing_files_are_named(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "tiny", _weights())
    (folder / "tokenizer.json").unlink()
    assert doctor.check_folder(folder) == {"usable": False, "why": "tiny lacks tokenizer.json"}
    assert not doctor.check_folder(tmp_path / "nowhere")["usable"]


def test_the_report_holds_what_it_promises() -> None:
    report = json.loads(json.dumps(doctor.examine()))
    assert report["versions"]["torch"].startswith("2.")
    assert report["compute"]["threads"] >= 1
    assert {"device", "dtype", "why"} <= report["compute"]["small"].keys()
    assert report["machine"]["cores"] >= 1
    for name in ("captum", "jupyterlab", "anywidget", "chromium", "tiny"):
        assert isinstance(report["parts"][name]["usable"], bool)
        assert report["parts"][name]["why"]
    assert report["compute"]["small"]["why"] in doctor.render(report)


def test_a_torch_that_cannot_be_loaded_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **options: Any) -> Any:
        if name == "torch":
            raise ImportError("libtorch.so is broken")
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    report = doctor.examine()
    assert report["compute"]["problem"] == "torch cannot be loaded: libtorch.so is broken"
    assert "libtorch.so is broken" in doctor.render(report)


def test_a_named_browser_wins_and_a_wrong_name_is_not_replaced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    browser = tmp_path / "my-browser"
    browser.touch()
    monkeypatch.setenv("CHROME_PATH", str(browser))
    assert doctor.find_chromium() == str(browser)
    monkeypatch.setenv("CHROME_PATH", str(tmp_path / "nothing"))
    assert doctor.find_chromium() is None
    monkeypatch.delenv("CHROME_PATH")
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/bin/{name}" if name == "google-chrome" else None)
    assert doctor.find_chromium() == "/bin/google-chrome"
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr(doctor, "BROWSER_PLACES", (str(tmp_path / "absent"), str(browser)))
    assert doctor.find_chromium() == str(browser)


def test_unknown_memory_is_said_not_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(doctor.os, "sysconf_names", raising=False)  # as on Windows
    report = doctor.examine()
    assert report["machine"]["memory_gb"] is None
    assert "unknown in all" in doctor.render(report)
