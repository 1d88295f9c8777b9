"""The two tasks of ACE-EM in one forward pass: image-pose-image (IPI) and pose-image-pose (PIP)."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor, nn

from aceray.em.dihedral import coefficient_tables, element_rotations, transform_coefficients
from aceray.em.filters import transfer_on_disc
from aceray.em.rotation import rotation_sqfrob
from aceray.models.autoencoder import AutoEncoder
from aceray.models.encoder import Hypotheses
from aceray.train.statistics import sum_over_workers

# share of the pose loss that every head gets, so that heads which never win do not die
LOSER_WEIGHT = 0.1
# share of the running moments of the shifts that a step leaves
MOMENT_DECAY = 0.99


@dataclass(frozen=True)
class Batch:
    """b images as half-disc coefficients in units of the signal's standard deviation, with their contrast transfer.

    `views` are the elements of D4 under which the encoder sees each image; None: only as it is.
    """

    coefficients: Complex[Tensor, "b p"]
    ctf: Float[Tensor, "b p"] | None
    views: Int[Tensor, "v b"] | None = None


@dataclass(frozen=True)
class DrawnPoses:
    """Random poses to render, the contrast transfer to render them with and the noise to add (ACE-EM eq. 11)."""

    rotation: Float[Tensor, "m 3 3"]
    shift_px: Float[Tensor, "m 2"]
    ctf: Float[Tensor, "m p"] | None
    noise: Complex[Tensor, "m p"]


class ShiftMoments(nn.Module):
    """Running mean and mean square of the shifts the encoder finds on real images, x and y apart, over all workers.

    They begin as those of the given spread, and no truth enters them.
    """

    mean: Tensor
    square: Tensor

    def __init__(self, spread_px: float) -> None:
        super().__init__()
        self.spread_px = spread_px
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("square", torch.full((2,), spread_px**2))

    @torch.no_grad()
    def update(self, shift_px: Float[Tensor, "b 2"]) -> None:
        """Take in the shifts of one step."""
        sums = torch.stack([shift_px.sum(0), shift_px.square().sum(0), torch.full_like(self.mean, len(shift_px))])
        total, squares, count = sum_over_workers(sums)
        self.mean.lerp_(total / count, 1 - MOMENT_DECAY)
        self.square.lerp_(squares / count, 1 - MOMENT_DECAY)

    def match(self, shift_px: Float[Tensor, "m 2"]) -> Float[Tensor, "m 2"]:
        """Shifts drawn with the given spread, moved and stretched to the running moments."""
        if self.spread_px == 0:
            return shift_px
        return self.mean + shift_px * ((self.square - self.mean.square()).clamp_min(0).sqrt() / self.spread_px)


def pairwise_contrast(codes: Float[Tensor, "b f"]) -> Float[Tensor, ""]:
    """Mean squared difference between the cosines of all pairs of codes and the identity (CryoPoseNet).

    It is 0 where the codes of different images are orthogonal and 1 - 1/b where all point one way.
    """
    directions = nn.functional.normalize(codes, dim=1)
    return (directions @ directions.mT - torch.eye(len(codes), device=codes.device)).square().mean()


class Objective(nn.Module):
    """Losses of one step. Every parameter that trains is a parameter of this module, so it can be wrapped for DDP.

    `shifts`, when given, sets the spread of PIP's shifts in place of the drawn one. `train_decoder` lets PIP's loss
    reach the volume through the rendered images. `contrastive` adds the term of that name for the images.
    """

    _source: Tensor
    _sign: Tensor
    _turns: Tensor
    _label_transfer: Tensor

    def __init__(
        self,
        model: AutoEncoder,
        *,
        shift_spread_px: float,
        shift_weight: float,
        train_shift: bool,
        train_decoder: bool = False,
        shifts: ShiftMoments | None = None,
        lanes: int = 1,
        contrastive: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.shift_spread_px, self.shift_weight, self.lanes = shift_spread_px, shift_weight, lanes
        self.train_shift, self.train_decoder, self.shifts = train_shift, train_decoder, shifts
        self.contrastive = contrastive
        source, sign = coefficient_tables(model.disc)
        self.register_buffer("_source", source, persistent=False)
        self.register_buffer("_sign", sign, persistent=False)
        self.register_buffer("_turns", element_rotations(), persistent=False)
        self.register_buffer("_label_transfer", transfer_on_disc(model.disc), persistent=False)

    def forward(self, batch: Batch | None, drawn: DrawnPoses | None, label_filter: int = 1) -> dict[str, Tensor]:
        """Losses `ipi` of images and `pip` of drawn poses; `shift` is the mean |t| of the images in pixels.

        The encoder sees real and rendered images in one pass. Renderings are compared with the images behind the
        Gaussian filter of the given number; filter 1 changes nothing.
        """
        transform = self.model.decoder.transform()
        groups = [] if batch is None else self._views(batch)
        if drawn is not None:
            if self.shifts is not None:
                drawn = replace(drawn, shift_px=self.shifts.match(drawn.shift_px))
            groups.append(Batch(self._rendered(transform, drawn), drawn.ctf))
        poses = self._encode(groups)
        losses: dict[str, Tensor] = {}
        if batch is not None:
            views = poses if drawn is None else poses[:-1]
            losses = self._image_pose_image(transform, batch, views, label_filter)
            if self.contrastive:
                losses["contrastive"] = self._contrast(views)
        if drawn is not None:
            losses["pip"] = self._pose_image_pose(drawn, poses[-1])
        return losses

    def _rendered(self, transform: Tensor, drawn: DrawnPoses) -> Complex[Tensor, "m p"]:
        """Noisy images at drawn poses, with a gradient for the decoder only where PIP trains it."""
        with torch.set_grad_enabled(self.train_decoder):
            return self.model.render(transform, drawn.rotation, drawn.shift_px, drawn.ctf) + drawn.noise

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
            lanes.append(zip(*(column.split(sizes) for column in poses), strict=True))
        return [
            Hypotheses(*(torch.cat(column) for column in zip(*group, strict=True)))
            for group in zip(*lanes, strict=True)
        ]

    def _views(self, batch: Batch) -> list[Batch]:
        """The images under each of their quarter turns and mirrors, contrast transfer included."""
        if batch.views is None:
            return [batch]
        tables = (self._source, self._sign)
        return [
            Batch(
                transform_coefficients(batch.coefficients, element, tables),
                None if batch.ctf is None else batch.ctf.gather(1, self._source[element]),
            )
            for element in batch.views
        ]

    def _turned_back(self, batch: Batch, poses: list[Hypotheses]) -> list[Hypotheses]:
        """Poses found on the views as poses of the images: the error of the rendering stays what it was on the view."""
        if batch.views is None:
            return poses
        back = self._turns[batch.views].mT
        return [
            Hypotheses(turn[:, None] @ rotation, (turn[:, :2, :2] @ shift_px[..., None])[..., 0], codes)
            for turn, (rotation, shift_px, codes) in zip(back, poses, strict=True)
        ]

    def _image_pose_image(
        self, transform: Tensor, batch: Batch, poses: list[Hypotheses], label_filter: int
    ) -> dict[str, Tensor]:
        """Error of the best candidate pose of each image over heads and views (ACE-EM eqs. 5, 6, 7 and 10).

        All candidates are scored without gradient; only the winner is rendered again with one.
        """
        label = batch.coefficients
        if label_filter > 1:
            label = label * self._label_transfer[label_filter - 1]
        poses = self._turned_back(batch, poses)
        rotation = torch.cat([pose.rotation for pose in poses], 1)
        shift_px = torch.cat([pose.shift_px[:, None].expand(-1, pose.rotation.shape[1], -1) for pose in poses], 1)
        best = self.model.choose(transform, rotation, shift_px, label, batch.ctf)
        row = torch.arange(len(best), device=best.device)
        rotation, shift_px = rotation[row, best], shift_px[row, best]
        if self.shifts is not None and self.training:
            self.shifts.update(shift_px)
        rendered = self.model.render(
            transform, rotation, shift_px if self.train_shift else shift_px.detach(), batch.ctf
        )
        residual = self.model.residual(rendered, label)
        return {"ipi": residual.mean(), "shift": shift_px.abs().sum(-1).mean()}

    def _contrast(self, views: list[Hypotheses]) -> Tensor:
        """Contrast of the images' codes, view by view and lane by lane like batch normalisation."""
        parts = [codes for view in views for codes in view.codes.chunk(self.lanes)]
        return torch.stack([pairwise_contrast(codes) for codes in parts]).mean()

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
