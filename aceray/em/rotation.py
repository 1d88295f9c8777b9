"""Rotations as (… 3 3) matrices that map object-frame columns (x, y, z) to the image frame.

The rows of a rotation are the image's x axis, its y axis and the beam, which is RELION's Euler matrix.
"""

import math

import roma
import torch
from jaxtyping import Float
from torch import Tensor

try:
    from pytorch3d.transforms import rotation_6d_to_matrix as _rows_from_sixd  # pyright: ignore[reportMissingImports]
except ImportError:

    def _rows_from_sixd(sixd: Tensor) -> Tensor:
        columns = sixd.unflatten(-1, (2, 3)).transpose(-1, -2)
        frame = roma.special_gramschmidt(columns, epsilon=1e-12)  # pyright: ignore[reportArgumentType]
        return frame.transpose(-1, -2)


def rotation_from_sixd(sixd: Float[Tensor, "*batch 6"]) -> Float[Tensor, "*batch 3 3"]:
    """Rotation whose rows are the Gram-Schmidt frame of two 3-vectors (Zhou et al. 2019; ACE-EM eq. 17, G_S6)."""
    return _rows_from_sixd(sixd)


def rotation_from_relion(
    rot_deg: Float[Tensor, "*batch"], tilt_deg: Float[Tensor, "*batch"], psi_deg: Float[Tensor, "*batch"]
) -> Float[Tensor, "*batch 3 3"]:
    """Rotation of RELION's ZYZ Euler angles in degrees: A = Rz(psi) Ry(tilt) Rz(rot) of passive matrices."""
    active = roma.euler_to_rotmat("ZYZ", torch.stack([rot_deg, tilt_deg, psi_deg], dim=-1), degrees=True)
    return active.transpose(-1, -2)


def relion_from_rotation(
    rotation: Float[Tensor, "*batch 3 3"],
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """RELION's (rot, tilt, psi) in degrees, tilt in [0, 180]; a beam exactly along z or -z has rot 0, as in RELION."""
    beam_x, beam_y, beam_z = rotation[..., 2, :].unbind(-1)
    # adding zero turns -0.0 into 0.0, so that the pole has rot 0 and not 180
    rot = torch.atan2(beam_y + 0.0, beam_x + 0.0)
    # the sine from two entries keeps precision near the poles, where the arc cosine of beam_z loses half its digits
    tilt = torch.atan2(torch.hypot(beam_x, beam_y), beam_z)
    # psi is what rot leaves over: near a pole rot is rounding noise, and psi must undo exactly that noise
    x_axis, y_axis = rotation[..., 0, :], rotation[..., 1, :]
    psi = torch.atan2(
        x_axis[..., 1] * rot.cos() - x_axis[..., 0] * rot.sin(), y_axis[..., 1] * rot.cos() - y_axis[..., 0] * rot.sin()
    )
    return torch.rad2deg(rot), torch.rad2deg(tilt), torch.rad2deg(psi)


def rotation_from_vector(vector: Float[Tensor, "*batch 3"]) -> Float[Tensor, "*batch 3 3"]:
    """Rotation by |vector| radians about the axis of the vector (exponential map of SO(3))."""
    return roma.rotvec_to_rotmat(vector)


def random_rotations(count: int, generator: torch.Generator) -> Float[Tensor, "n 3 3"]:
    """Rotations uniform over SO(3) (Haar measure), from normalised Gaussian quaternions."""
    quaternion = torch.randn(count, 4, generator=generator, device=generator.device)
    return roma.unitquat_to_rotmat(torch.nn.functional.normalize(quaternion, dim=-1))


def rotation_sqfrob(
    predicted: Float[Tensor, "*#batch 3 3"], true: Float[Tensor, "*#batch 3 3"]
) -> Float[Tensor, "*batch"]:
    """Squared Frobenius distance |R - R'|^2 = 8 sin^2(angle / 2): 0 to 8, mean 6 for random rotations."""
    return (predicted - true).square().sum(dim=(-2, -1))


def sqfrob_to_degrees(sqfrob: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """Rotation angle in degrees of a squared Frobenius distance."""
    return 2 * torch.asin((sqfrob / 8).sqrt().clamp(max=1.0)) * (180 / math.pi)
