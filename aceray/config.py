"""Every setting of aceray: its type, unit, bounds, default and meaning. Frozen, without logic, without files.

A setting is read from YAML and dotted overrides by `aceray.presets.load_config`; nothing past it sees a dictionary.
Sizes, pixel sizes, voltages and noise levels of a dataset are not settings: they are read from its manifest.
"""

import itertools
from typing import Annotated, Literal

from pydantic import Field, model_validator

from aceray.networks import Decoder, Encoder, MlpEncoder, VoxelDecoder
from aceray.schema import BoxSize, Fraction, Model, Uri


class CtfRanges(Model):
    """What the microscope of a simulated dataset does: one defocus a particle, the rest fixed."""

    defocus_mean_angstrom: float = Field(20222.0, description="mean defocus, underfocus positive")
    defocus_std_angstrom: float = Field(4429.0, ge=0, description="standard deviation of the defocus")
    defocus_min_angstrom: float = Field(8112.0, description="smallest defocus; smaller draws are clipped to it")
    defocus_max_angstrom: float = Field(38474.0, description="largest defocus; larger draws are clipped to it")
    astigmatism_max_angstrom: float = Field(
        500.0, ge=0, description="largest difference of the two defoci; drawn uniformly, as is its angle"
    )
    voltage_kv: float = Field(300.0, gt=0, le=2000, description="acceleration voltage, kilovolt")
    spherical_aberration_mm: float = Field(2.7, ge=0, le=20, description="spherical aberration, millimetre")
    amplitude_contrast: float = Field(0.1, ge=0, le=1, description="amplitude contrast, fraction")
    b_factor_angstrom_sq: float = Field(0.0, ge=0, description="envelope exp(-B k^2 / 4), square angstrom")

    @model_validator(mode="after")
    def _ordered(self) -> "CtfRanges":
        if not self.defocus_min_angstrom <= self.defocus_mean_angstrom <= self.defocus_max_angstrom:
            raise ValueError("defocus_min_angstrom <= defocus_mean_angstrom <= defocus_max_angstrom does not hold")
        return self


class Simulation(Model):
    """A dataset made from an atomic model; `aceray simulate` writes it to `data.path`."""

    model: str = Field(
        "5NRL", min_length=1, description="5NRL (built in), a .pdb or .cif file, or pdb:XXXX to download"
    )
    box: BoxSize = Field(32, description="side of the images, pixels")
    pixel_size_angstrom: float = Field(17.0, gt=0, le=100, description="pixel size, angstrom")
    particles: int = Field(5000, ge=1, le=10**9, description="number of images")
    snr_db: float = Field(0.0, ge=-60, le=200, description="10 log10(var signal / var noise); 200 is noise-free")
    shift_sigma_fraction: float = Field(
        0.03, ge=0, le=0.25, description="standard deviation of the shifts along x and y, fraction of the box"
    )
    density_width_px: float = Field(0.67, ge=0.3, le=5, description="sigma of an atom's Gaussian blob, pixels")
    ctf: CtfRanges | None = Field(None, description="ranges of the CTF; null simulates without one")
    pose_table: str | None = Field(
        None, description="STAR or Parquet file whose row i has the pose of particle i; null: uniform rotations"
    )
    ctf_table: str | None = Field(
        None, description="STAR or Parquet file whose row i has the CTF of particle i; null: drawn from ctf"
    )
    seed: int = Field(1, ge=0, description="seed of poses, shifts, CTFs and noise")
    image_dtype: Literal["float16", "float32"] = Field("float16", description="type of the stored pixels")
    rows_per_shard: int = Field(1024, ge=1, description="images in one Parquet file")


class Data(Model):
    """The particles that are trained on."""

    path: str = Field("data/particles", min_length=1, description="folder of the dataset")
    box: BoxSize | None = Field(
        32, description="train on Fourier crops of at most this size, pixels; null: the stored size"
    )
    half_set: Literal[1, 2] | None = Field(
        None, description="train on this half of the particles alone, for half maps; null: on all"
    )
    heldout_fraction: float = Field(
        0.0, ge=0, le=0.5, description="share of the particles that training never samples, for select/heldout_*"
    )
    shift_sigma_fraction: float = Field(
        0.0, ge=0, le=0.25, description="prior spread of the shifts along x and y, fraction of the box; 0: no shifts"
    )
    memory_gib: float | None = Field(
        None, gt=0, description="what a worker may hold of its images, GiB; it streams what does not fit; null: all"
    )


class LabelFilter(Model):
    """A stage of the low-pass warm-up."""

    until_step: int = Field(ge=1, description="first step, counted from 0, that the filter is no longer used in")
    filter: int = Field(ge=1, le=5, description="Gaussian of variance 10^(filter - 3) px^2; 1 changes nothing")


class Ipi(Model):
    """Image-pose-image: encode a particle, project the volume at that pose, compare."""

    loss: Literal["mse", "symmetric", "generalised"] = Field(
        "mse",
        description="mean squared error, or its minimum over the image and its turn by 180 degrees, or over two random "
        "quarter turns and mirrors of it",
    )
    label_filters: tuple[LabelFilter, ...] = Field(
        (), description="low-pass warm-up: filters of the image that renderings are compared with, ACE-EM eq. 10"
    )
    augment: bool = Field(True, description="turn and mirror each image at random by one of the eight elements of D4")
    shift_l1_weight: float = Field(
        0.01, ge=0, description="weight of the mean |shift| (fraction of the box), ACE-EM eq. 8"
    )
    shift_l1_schedule: Literal["constant", "linear"] = Field(
        "constant", description="that weight as it is, or falling along a line to 0 at the last step"
    )
    contrastive_weight: float = Field(
        0.0, ge=0, description="weight of the mean squared cosine of the encoder's features of two images; 0: none"
    )
    train_shift: bool = Field(
        False, description="let the image loss train the shift head too; otherwise PIP alone does"
    )

    @model_validator(mode="after")
    def _ascending(self) -> "Ipi":
        steps = [stage.until_step for stage in self.label_filters]
        if any(later <= earlier for earlier, later in itertools.pairwise(steps)):
            raise ValueError(f"label_filters end at steps {steps}, which must ascend")
        return self


class ManifestNoise(Model):
    """White, at the level measured when the dataset was written."""

    kind: Literal["white"] = "white"


class SnrNoise(Model):
    """White, at a given ratio to the signal that is estimated from the images."""

    kind: Literal["snr"] = "snr"
    snr_db: float = Field(0.0, ge=-60, le=200, description="10 log10(var signal / var noise) of rendered images")


class BackgroundNoise(Model):
    """Mean, level and radial spectrum of the images' own backgrounds."""

    kind: Literal["background"] = "background"
    radius_fraction: float = Field(
        0.45, ge=0.3, le=0.55, description="background is what lies farther from the centre, fraction of the box"
    )


PipNoise = Annotated[ManifestNoise | SnrNoise | BackgroundNoise, Field(discriminator="kind")]


class Pip(Model):
    """Pose-image-pose: draw a pose, project the volume, predict the pose back."""

    weight: float = Field(2.0, ge=0, description="weight lambda of the pose loss, ACE-EM eq. 14; 0 turns PIP off")
    warmup_steps: int = Field(0, ge=0, description="steps before PIP begins")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="how its weight comes after the warm-up: at once, along a line or along half a cosine"
    )
    ramp_steps: int = Field(1000, ge=1, description="linear, cosine: steps from initial_factor to the full weight")
    initial_factor: float = Field(
        0.0, ge=0, le=100, description="linear, cosine: share of the weight at the ramp's start; above 1 it falls"
    )
    turns: Literal["simultaneous", "alternating"] = Field(
        "simultaneous", description="both tasks in every step, or IPI and PIP in turn after the warm-up"
    )
    combination: Literal["additive", "convex"] = Field(
        "additive", description="IPI + lambda PIP, or (1 - lambda) IPI + lambda PIP"
    )
    batch_factor: float = Field(1.0, gt=0, le=16, description="drawn poses for each particle of the batch")
    shift_weight: float = Field(
        0.2, ge=0, description="weight of the squared shift error, in units of data.shift_sigma_fraction squared"
    )
    shifts: Literal["spread", "matched"] = Field(
        "spread",
        description="drawn with data.shift_sigma_fraction, or with the running moments of the encoder's shifts",
    )
    noise: PipNoise = Field(default_factory=ManifestNoise, description="noise of the rendered images, ACE-EM eq. 11")
    train_decoder: bool = Field(
        False, description="let the pose loss train the volume too, through the rendered images"
    )

    @model_validator(mode="after")
    def _convex(self) -> "Pip":
        largest = self.weight if self.schedule == "constant" else self.weight * max(1.0, self.initial_factor)
        if self.combination == "convex" and largest > 1:
            raise ValueError(f"weight {largest} exceeds 1, which the convex combination cannot take")
        return self


class Optim(Model):
    """AdamW with one learning rate for the encoder and one for the decoder."""

    encoder_lr: float = Field(5e-4, gt=0, le=10, description="learning rate of the encoder")
    decoder_lr: float = Field(
        4e-2, gt=0, le=10, description="learning rate of the decoder; voxels: times decoder.scale"
    )
    betas: tuple[Fraction, Fraction] = Field((0.9, 0.99), description="decay of the two running means of AdamW")
    weight_decay: float = Field(0.0, ge=0, le=1, description="decoupled weight decay of the encoder; none on decoders")
    amsgrad: bool = Field(False, description="divide by the largest running mean of squares so far: AMSGrad, as cryoAI")
    clip_norm: float | None = Field(
        None, gt=0, description="longest gradient of a step, all parameters as one vector; null: no limit"
    )
    warmup_steps: int = Field(100, ge=0, description="steps of the linear rise of the learning rates")
    schedule: Literal["cosine", "multistep"] = Field("cosine", description="how the learning rates fall")
    hold_fraction: float = Field(0.3, ge=0, lt=1, description="cosine: share of the steps before the fall begins")
    final_factor: Fraction = Field(0.05, description="cosine: share of the learning rates left at the end")
    milestones: tuple[Fraction, ...] = Field(
        (0.6, 0.85), description="multistep: shares of the steps at which they fall tenfold"
    )


class Train(Model):
    """Length, batch and rhythm of a training run."""

    steps: int = Field(800, ge=1, description="optimiser steps")
    batch: int = Field(64, ge=2, description="particles in one step, all workers together")
    lanes: int | None = Field(
        None, ge=1, description="independent shares of the set and of the batch; null: as many as workers, at least one"
    )
    evaluate_every: int = Field(200, ge=1, description="steps between two evaluations; the last step always has one")
    checkpoint_every: int = Field(400, ge=1, description="steps between two checkpoints; the last step always has one")
    keep_checkpoints: int = Field(2, ge=1, description="newest checkpoints that are kept")
    threads: int | None = Field(None, ge=1, description="threads of torch in a worker; null: its share of the cores")


class Refine(Model):
    """Rounds of every particle's own pose against the map of all, after the training."""

    search_rounds: int = Field(
        12,
        ge=1,
        le=100,
        description="first rounds at most, at the box of the training, in which all poses are searched until they rest",
    )
    settled_fraction: Fraction = Field(
        0.002, description="once no more than this share of the poses moved in a round, later ones search few"
    )
    rescued_fraction: Fraction = Field(
        0.02, description="share of the particles, those explained worst, that settled rounds and the last ones search"
    )
    registers: bool = Field(
        True, description="look for a near-symmetry of the map after the first search, and solve its registers"
    )
    near_symmetry: float = Field(
        0.6,
        gt=0,
        le=0.85,
        description="least correlation of the map with itself turned that counts as a near-symmetry of order three or "
        "more; .14 more where it is two-fold",
    )
    halves: Literal["joint", "independent"] = Field(
        "joint",
        description="map that an image is compared with: that of all images, or that of its own half of them beyond "
        "the first four shells (gold standard)",
    )
    mask: Literal["molecule", "sphere"] = Field(
        "molecule",
        description="where a map may have density: close around the molecule, found anew in every map, or in the whole "
        "sphere",
    )
    polish_rounds: int = Field(
        3,
        ge=0,
        le=100,
        description="last rounds at most, each at twice the box of the one before up to the largest",
    )
    box: BoxSize | None = Field(None, description="largest box, pixels; null: the stored size")
    search_radius: float = Field(
        8.0, gt=2, le=64, description="resolution of the search, cycles per box; cost grows with its square"
    )
    steps: int = Field(3, ge=1, le=50, description="Gauss-Newton steps from a particle's present pose in a round")


class Resources(Model):
    """Where the run happens."""

    workers: int = Field(0, ge=0, le=4096, description="0: in this process, without Ray; n: Ray Train with n workers")
    gpu: bool | None = Field(None, description="one GPU for each worker; null: if there is one")
    cpus_per_worker: float = Field(1.0, gt=0, description="CPU cores that Ray sets aside for each worker")
    address: str | None = Field(
        None, description="address of a running Ray cluster (auto, HOST:PORT); null: a local one"
    )
    patience_seconds: float | None = Field(
        None,
        gt=0,
        le=7200,
        description="how long a cluster may take to give the workers; null: 60, of a study 20",
    )


class Tracking(Model):
    """The MLflow run."""

    enabled: bool = Field(True, description="record the run in MLflow when it is installed")
    uri: Uri = Field("sqlite:///mlflow.db", description="MLflow tracking URI")
    experiment: str = Field("aceray", min_length=1, description="MLflow experiment")


class Config(Model):
    """One run, whole."""

    presets: tuple[str, ...] = Field(
        (), description="presets that the settings came from; filled in when they are read"
    )
    name: str = Field(
        "run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$", description="name of the run and of its folder"
    )
    runs: str = Field("runs", min_length=1, description="folder that holds the run folders")
    seed: int = Field(1, ge=0, description="seed of the network, the batches and the drawn poses")
    seeds: int = Field(
        1, ge=1, le=64, description="starts, of seed and the next ones; the one with the best label-free score is kept"
    )
    simulation: Simulation | None = Field(None, description="how the dataset is made; null: it is there already")
    data: Data = Field(default_factory=Data, description="the particles")
    encoder: Encoder = Field(default_factory=MlpEncoder, description="image to pose")
    decoder: Decoder = Field(default_factory=VoxelDecoder, description="pose to image")
    ipi: Ipi = Field(default_factory=Ipi, description="image-pose-image task")
    pip: Pip = Field(default_factory=Pip, description="pose-image-pose task")
    optim: Optim = Field(default_factory=Optim, description="optimiser")
    train: Train = Field(default_factory=Train, description="length and rhythm")
    refine: Refine | None = Field(
        default_factory=Refine, description="refinement of the encoder's poses, and the map by statistics; null: none"
    )
    resources: Resources = Field(default_factory=Resources, description="workers and devices")
    tracking: Tracking = Field(default_factory=Tracking, description="MLflow")

    @property
    def label_free_score(self) -> str:
        """The metric that starts of this run are compared by, less is better: the refinement's, else the encoder's."""
        return "select/d4_consistency_median" if self.refine is None else "refine/energy"

    @model_validator(mode="after")
    def _taught(self) -> "Config":
        if self.pip.shifts == "matched" and not self.ipi.train_shift:
            raise ValueError(
                "pip.shifts=matched needs ipi.train_shift=true: without it the shifts are matched to themselves"
            )
        return self
