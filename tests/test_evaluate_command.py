"""`videofactory evaluate` from its words to files: what is measured, made, shown and refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from videofactory_train.cli import main

from videofactory_core.video import probe, write_video

pytest.importorskip("cv2")


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """Four small clips with captions, of noise whose right half moves."""
    folder = tmp_path / "clips"
    folder.mkdir()
    for number in range(4):
        picture = torch.rand(36, 64, 3, generator=torch.Generator().manual_seed(number))
        frames = torch.stack([torch.cat([picture, picture.roll(2 * i, 1)], 1) for i in range(16)])
        write_video(folder / f"{number}.mp4", frames, 8)
        (folder / f"{number}.txt").write_text(f"clip {number}", encoding="utf-8")
    return folder


def test_a_folder_is_measured_without_any_weights(clips: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "score", str(clips), "--frames", "8", "--resamples", "20", "--workers", "1"]) == 0
    said = capsys.readouterr().out
    results = json.loads((clips / "results.json").read_text(encoding="utf-8"))
    assert {result["metric"] for result in results["results"]} == {"warping-error", "flicker"}
    assert all(result["metric"] in said and result["n"] == 4 for result in results["results"])
    page = clips / "report.html"
    assert str(page) in said
    before = page.read_bytes()
    page.unlink()
    assert main(["evaluate", "report", str(clips)]) == 0
    assert page.read_bytes() == before


def test_results_of_other_settings_are_not_put_side_by_side(
    clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    command = ["evaluate", "score", str(clips), "--metrics", "flicker", "--resamples", "0", "--workers", "1"]
    assert main([*command, "--out", str(one)]) == 0
    assert main([*command, "--out", str(two), "--frames", "8"]) == 0
    capsys.readouterr()
    assert main(["evaluate", "report", str(one), str(two)]) == 2
    assert "frames" in capsys.readouterr().err
    assert main(["evaluate", "report", str(one), str(two), "--anyway"]) == 0
    assert "flicker" in capsys.readouterr().out


def test_clips_of_a_file_of_prompts(tmp_path: Path) -> None:
    prompts, out = tmp_path / "prompts.txt", tmp_path / "made"
    prompts.write_text("a red circle moving right on a black background\n", encoding="utf-8")
    command = ["evaluate", "generate", str(prompts), "--out", str(out), "--clips", "2", "--steps", "1"]
    assert main([*command, "--frames", "4", "--size", "64x32", "--device", "cpu"]) == 0
    made = sorted(out.glob("*.mp4"))
    assert [(probe(path).frames, probe(path).width, probe(path).height) for path in made] == [(4, 64, 32)] * 2
    rows = [json.loads(line) for line in (out / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(row["prompt"], row["seed"]) for row in rows] == [
        (prompts.read_text(encoding="utf-8").strip(), i) for i in (0, 1)
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["score", "{clips}", "--metrics", "fvd"], "'fvd' is no metric"),
        (["score", "{clips}", "--metrics", "clipsim"], "clipsim is measured by a network: give a local copy"),
        (["score", "nowhere"], "nowhere"),
        (["report", "{clips}"], "results.json"),
        (["protocol", "ucf101", "captions.txt", "--out", "{clips}/x"], "name CLASSES"),
        (["protocol", "shapes", "captions.txt", "--out", "{clips}/x"], "leave out LIST"),
        (["generate", "nowhere.txt", "--out", "{clips}/x"], "nowhere.txt"),
        (["ablation", "train/recipes/demo.toml", "--rows", "best"], "'best'"),
        (["ablation", "train/recipes/demo.toml", "--seeds", "0"], "use 1 or more"),
    ],
)
def test_bad_input_gets_one_sentence(
    clips: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert main(["evaluate", *(argument.format(clips=clips) for argument in arguments)]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert words in error[0]
    assert not (clips / "x").exists()
