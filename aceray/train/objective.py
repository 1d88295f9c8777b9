"""The two tasks of ACE-EM in one forward pass: image-pose-image (IPI) and pose-image-pose (PIP)."""

from dataclasses import dataclass

import torch
from jaxtyping import Complex, Float
from torch import Tensor, nn

from aceray.em.dihedral import HALF_TURN, coefficient_tables, element_rotations, transform_coefficients
from aceray.em.rotation import rotation_sqfrob
from aceray.models.autoencoder import AutoEncoder
from aceray.models.encoder import Hypotheses

# share of the pose loss that every head gets, so that heads which never win do not die
LOSER_WEIGHT = 0.1


@dataclass(frozen=True)
class Batch:
    """b images as half-disc coefficients in units of the signal's standard deviation, with their contrast transfer."""

    coefficients: Complex[Tensor, "b p"]
    ctf: Float[Tensor, "b p"] | None


@dataclass(frozen=True)
class DrawnPoses:
    """Random poses to render, the contrast transfer to render them with and the noise to add (ACE-EM eq. 11)."""

    rotation: Float[Tensor, "m 3 3"]
    shift_px: Float[Tensor, "m 2"]
    ctf: Float[Tensor, "m p"] | None
    noise: Complex[Tensor, "m p"]


class Objective(nn.Module):
    """Losses of one step. Every parameter that trains is a parameter of this module, so it can be wrapped for DDP."""

    _source: Tensor
    _sign: Tensor
    _turns: Tensor

    def __init__(
        self,
        model: AutoEncoder,
        *,
        symmetric: bool,
        shift_spread_px: float,
        shift_weight: float,
        train_shift: bool,
        lanes: int = 1,
    ) -> None:
        super().__init__()
        self.model = model
        self.views = (0, HALF_TURN) if symmetric else (0,)
        self.shift_spread_px, self.shift_weight, self.train_shift = shift_spread_px, shift_weight, train_shift
        self.lanes = lanes
        source, sign = coefficient_tables(model.disc)
        self.register_buffer("_source", source, persistent=False)
        self.register_buffer("_sign", sign, persistent=False)
        self.register_buffer("_turns", element_rotations(), persistent=False)

    def forward(self, batch: Batch, drawn: DrawnPoses | None) -> dict[str, Tensor]:
        """Losses `ipi` and, when poses were drawn, `pip`; `shift` is the mean |t| of the images in pixels.

        The encoder sees real and rendered images in one pass; PIP's images come from a decoder without gradient.
        """
        model = self.model
        transform = model.decoder.transform()
        groups = [self._turned(batch, view) for view in self.views]
        if drawn is not None:
            with torch.no_grad():
                rendered = model.render(transform.detach(), drawn.rotation, drawn.shift_px, drawn.ctf)
            groups.append(Batch(rendered + drawn.noise, drawn.ctf))
        poses = self._encode(groups)
        losses = self._image_pose_image(transform, batch, poses[: len(self.views)])
        if drawn is not None:
            losses["pip"] = self._pose_image_pose(drawn, poses[-1])
        return losses

    def _encode(self, groups: list[Batch]) -> list[Hypotheses]:
        """Poses of each group of images (the views, the renderings), all encoded together, lane by lane.

        Batch normalisation sees one lane at a time, so a step does not depend on how many workers share the lanes.
        """
        sizes = [len(group.coefficients) // self.lanes for group in groups]
        coefficients = [group.coefficients.chunk(self.lanes) for group in groups]
        ctfs = [group.ctf.chunk(self.lanes) for group in groups if group.ctf is not None]
        lanes = []
        for lane in range(self.lanes):
            ctf = torch.cat([parts[lane] for parts in ctfs]) if ctfs else None
            poses = self.model.encoder(torch.cat([parts[lane] for parts in coefficients]), ctf)
            lanes.append(zip(poses.rotation.split(sizes), poses.shift_px.split(sizes), strict=True))
        return [
            Hypotheses(torch.cat([part[0] for part in group]), torch.cat([part[1] for part in group]))
            for group in zip(*lanes, strict=True)
        ]

    def _turned(self, batch: Batch, view: int) -> Batch:
        """The images under one of the eight quarter turns and mirrors, contrast transfer included."""
        if view == 0:
            return batch
        element = torch.full((len(batch.coefficients),), view, device=self._source.device)
        coefficients = transform_coefficients(batch.coefficients, element, (self._source, self._sign))
        return Batch(coefficients, None if batch.ctf is None else batch.ctf[:, self._source[view]])

    def _image_pose_image(self, transform: Tensor, batch: Batch, poses: list[Hypotheses]) -> dict[str, Tensor]:
        """Error of the best candidate pose of each image over heads and views (ACE-EM eqs. 5 and 6).

        All candidates are scored without gradient; only the winner is rendered again with one. A pose found on a
        turned view is turned back, which leaves its error unchanged.
        """
        rotations, shifts = [], []
        for view, (rotation, shift_px) in zip(self.views, poses, strict=True):
            back = self._turns[view].T
            rotations.append(back @ rotation)
            shifts.append((shift_px @ back[:2, :2].T)[:, None].expand(-1, rotation.shape[1], -1))
        rotation, shift_px = torch.cat(rotations, 1), torch.cat(shifts, 1)
        best = self.model.choose(transform, rotation, shift_px, batch.coefficients, batch.ctf)
        row = torch.arange(len(best), device=best.device)
        rotation, shift_px = rotation[row, best], shift_px[row, best]
        rendered = self.model.render(
            transform, rotation, shift_px if self.train_shift else shift_px.detach(), batch.ctf
        )
        residual = self.model.residual(rendered, batch.coefficients)
        return {"ipi": residual.mean(), "shift": shift_px.abs().sum(-1).mean()}

    def _pose_image_pose(self, drawn: DrawnPoses, poses: Hypotheses) -> Tensor:
        """Squared error of the predicted poses of rendered images (ACE-EM eq. 13).

        With several heads the nearest one learns, and all of them a little, so that none dies. The shift term counts
        in units of the shifts' spread.
        """
        distance = rotation_sqfrob(poses.rotation, drawn.rotation[:, None])
        loss = (1 - LOSER_WEIGHT) * distance.min(1).values.mean() + LOSER_WEIGHT * distance.mean()
        if self.shift_spread_px > 0:
            scaled = (poses.shift_px - drawn.shift_px) / self.shift_spread_px
            loss = loss + self.shift_weight * scaled.square().sum(-1).mean()
        return loss
