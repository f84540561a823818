"""Pictures of any size as frames."""

from __future__ import annotations

import pytest
import torch

from videofactory_core.fit import FITS, fit_frames


@pytest.mark.parametrize("fit", FITS)
def test_a_picture_of_the_same_shape_is_only_scaled(fit) -> None:
    frames = torch.rand(2, 8, 16, 3)
    same, said = fit_frames(frames, 16, 8, fit)
    assert torch.equal(same, frames)
    assert said == ""
    larger, said = fit_frames(torch.full((1, 8, 16, 3), 0.3), 32, 16, fit)
    assert said == ""
    assert torch.allclose(larger, torch.full((1, 16, 32, 3), 0.3), atol=1e-6)


def test_another_shape_is_cut_barred_or_pulled() -> None:
    # Red, green and blue thirds of a picture three times as wide as high.
    thirds = torch.eye(3).repeat_interleave(8, 0)[None, None].expand(1, 8, 24, 3)
    cut, said = fit_frames(thirds, 8, 8, "crop")
    assert torch.equal(cut[0, 4, 4], torch.tensor([0.0, 1.0, 0.0]))
    assert cut[..., 0].max() == 0
    assert said == "24x8 was cut to the shape of 8x8"
    barred, said = fit_frames(thirds, 24, 24, "pad")
    assert not barred[0, :8].any()
    assert not barred[0, 16:].any()
    assert torch.equal(barred[0, 8:16], thirds[0])
    assert said == "24x8 was set between black bars to the shape of 24x24"
    pulled, said = fit_frames(thirds, 24, 24, "stretch")
    assert torch.allclose(pulled, thirds.expand(24, -1, -1, -1)[:, 0][None], atol=1e-6)
    assert said == "24x8 was pulled to the shape of 24x24"


@pytest.mark.parametrize("shape", [(2, 600), (600, 2)])
@pytest.mark.parametrize("fit", FITS)
def test_of_a_very_thin_picture_something_is_left(fit, shape: tuple[int, int]) -> None:
    frames, _ = fit_frames(torch.ones(1, *shape, 3), 16, 8, fit)
    assert frames.shape == (1, 8, 16, 3)
    assert frames.max() == pytest.approx(1)


def test_what_is_transparent_lies_over_black_and_grey_is_a_colour() -> None:
    frames = torch.ones(1, 8, 8, 4)
    frames[:, :, 4:, 3] = 0
    opaque, said = fit_frames(frames, 8, 8)
    assert opaque[0, :, :4].min() == 1
    assert opaque[0, :, 4:].max() == 0
    assert said == "what is transparent became black"
    assert fit_frames(torch.full((1, 8, 8, 1), 0.5), 8, 8)[0].shape == (1, 8, 8, 3)


def test_what_holds_no_pictures_is_refused() -> None:
    for wrong in (torch.zeros(8, 8, 3), torch.zeros(0, 8, 8, 3), torch.zeros(1, 8, 8, 5)):
        with pytest.raises(ValueError, match="name a picture"):
            fit_frames(wrong, 8, 8)
