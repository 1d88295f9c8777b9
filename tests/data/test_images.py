import numpy as np
import pytest
import torch
from torch.testing import assert_close

from aceray.data.images import brightness, common_field, cropped_to, normalised, outside_circle, prepared, refusals
from aceray.errors import DataError
from tests.data.inputs import some_images, with_nan


def wave(side: int, frequency: tuple[int, int], phase: float) -> np.ndarray:
    """A wave with whole periods in the box whose phase is counted from pixel side // 2: the frame of all images."""
    axis = np.arange(side) - side // 2
    x, y = frequency
    return np.cos(2 * np.pi * (x * axis + y * axis[:, None]) / side + phase)


@pytest.mark.parametrize("side", [24, 25])
@pytest.mark.parametrize("box", [12, 13])
def test_a_fourier_crop_is_the_same_wave_on_fewer_pixels(side, box):
    """Below Nyquist waves keep phase (about the centre, odd or even) and grow by the ratio; others vanish."""
    for frequency in [(0, 0), (1, 2), (-3, 5), (5, -5)]:
        image = torch.from_numpy(wave(side, frequency, 0.7)).float()[None]
        expected = torch.from_numpy(wave(box, frequency, 0.7)).float()[None] * (side / box)
        # orthonormal coefficients are kept, so a wave's amplitude grows by the ratio of the boxes
        assert_close(cropped_to(image, side, box), expected, atol=1e-4, rtol=0)
    for frequency in [(7, 0), (0, -8), (9, 9)]:
        image = torch.from_numpy(wave(side, frequency, 0.7)).float()[None]
        assert float(cropped_to(image, side, box).abs().max()) < 1e-4


def test_nyquist_of_an_even_box_is_empty():
    image = torch.from_numpy(wave(24, (6, 1), 0.0)).float()[None]
    assert float(cropped_to(image, 24, 12).abs().max()) < 1e-4
    assert float(cropped_to(image, 24, 13).abs().max()) > 1


def test_the_centre_stays_the_centre():
    """A point at the origin of any box is at the origin of the smaller one, real-space crop and all."""
    for side in (20, 21):
        for crop in (15, 16):
            image = torch.zeros(1, side, side)
            image[0, side // 2, side // 2] = 1
            found = cropped_to(image, crop, 11)[0]
            assert divmod(int(found.argmax()), 11) == (5, 5)
            assert_close(found, found.T)


def test_one_group_keeps_its_whole_images():
    field = common_field([(360, 1.34)], 128)
    assert field.crop_px == (360,) and field.pixel_size_angstrom == pytest.approx(360 * 1.34 / 128)
    assert common_field([(65, 2.0)], None).box == 65


def test_groups_of_several_pixel_sizes_get_one_field_of_view():
    field = common_field([(360, 1.34), (300, 1.6), (256, 2.0)], 128)
    assert all(crop <= side for crop, side in zip(field.crop_px, (360, 300, 256), strict=True))
    for crop, size in zip(field.crop_px, (1.34, 1.6, 2.0), strict=True):
        assert crop * size / 128 == pytest.approx(field.pixel_size_angstrom, rel=1e-3)
    # as much as the smallest field allows
    assert field.pixel_size_angstrom * 128 > 0.9 * 300 * 1.6


def test_pixel_sizes_that_do_not_fit_are_refused():
    with pytest.raises(DataError, match=r"no common field of view fits images of 16 px of 1 A, 16 px of 1.03"):
        common_field([(16, 1.0), (16, 1.037)], None)
    with pytest.raises(DataError, match=r"--box 300: is larger than the images.*at most 256"):
        common_field([(256, 1.0)], 300)


def test_why_an_image_is_refused():
    images = torch.from_numpy(with_nan(some_images(4), 2))
    images[1] = 7.0
    images[3, 0, 0] = float("inf")
    found = refusals(images)
    assert [bool(each) for each in found] == [False, True, True, True]
    assert found[1] == "is constant" and "not finite" in found[2]


def test_the_background_has_mean_zero_and_deviation_one():
    images = torch.from_numpy(some_images(50, side=32))
    found, reasons = normalised(images * 3 + 5)
    assert not any(reasons)
    corner = found[:, outside_circle(32)].double()
    assert_close(corner.mean(1), torch.zeros(50, dtype=torch.float64), atol=1e-5, rtol=0)
    assert_close(corner.std(1), torch.ones(50, dtype=torch.float64), atol=1e-5, rtol=0)
    assert_close(found, normalised(images)[0], atol=1e-4, rtol=0)
    images[3, outside_circle(32)] = 2.0
    assert "constant background" in normalised(images)[1][3]


def test_protein_is_bright_or_dark():
    images = torch.from_numpy(some_images(80, side=32, bright=0.5))
    for invert, sign in ((False, 1), (True, -1)):
        treated, reasons = prepared(images, 32, 16, invert=invert, normalise="background")
        bright, error = brightness(treated)
        assert not any(reasons) and sign * bright > 5 * error > 0
