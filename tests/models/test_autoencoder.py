"""Encoder, decoder and physics together."""

import torch
from torch.testing import assert_close

from aceray.em.formation import shift_image
from tests.train.phantom import autoencoder, projections


def test_rendering_at_the_true_pose_gives_the_image_up_to_its_scale() -> None:
    model = autoencoder().requires_grad_(False)
    particles, rotation, shift = projections(6, noise=0.0)
    index = torch.arange(6)
    rendered = model.render(model.decoder.transform(), rotation, shift, particles.transfer(index, model.disc))
    ratio = model.disc.energy(rendered).sqrt() / model.disc.energy(particles.coefficients).sqrt()
    scale = ratio.mean()
    assert float(model.residual(rendered / scale, particles.coefficients).max()) < 1e-3


def test_shift_is_applied_after_the_ctf_with_its_sign() -> None:
    model = autoencoder()
    particles, rotation, _ = projections(3, noise=0.0)
    ctf = particles.transfer(torch.arange(3), model.disc)
    shift = torch.tensor([[2.0, 0.0], [0.0, -1.0], [1.5, 0.5]])
    transform = model.decoder.transform()
    centred = model.disc.scatter(model.render(transform, rotation, torch.zeros(3, 2), ctf))
    moved = model.disc.scatter(model.render(transform, rotation, shift, ctf))
    assert_close(moved, shift_image(centred, shift), atol=1e-4, rtol=0)
    assert_close(moved[0], centred[0].roll(2, dims=-1), atol=1e-4, rtol=0)


def test_choose_finds_the_true_pose_among_wrong_ones() -> None:
    model = autoencoder()
    particles, rotation, shift = projections(8, noise=0.0)
    ctf = particles.transfer(torch.arange(8), model.disc)
    rotations = torch.stack([rotation.roll(1, 0), rotation, rotation.roll(2, 0)], 1)
    best = model.choose(
        model.decoder.transform(), rotations, shift[:, None].expand(-1, 3, -1), particles.coefficients, ctf
    )
    assert best.tolist() == [1] * 8
