"""What a cluster's Prometheus can see of aceray: every exported number, once, with its unit. No Ray.

Ray puts `ray_` before the names. All are gauges: a counter that first appears at 1 has not increased for Prometheus, so
a first restart would stay unseen. Dashboards, alerts and the table in dashboards/README.md are tested against this.
"""

from dataclasses import dataclass

RUN = ("run", "study")
"""Labels of a run: its name (of a pair's member TRIAL/MEMBER) and its study, empty for a run of its own."""


@dataclass(frozen=True)
class Metric:
    """An exported number; `labels` tell its series apart."""

    name: str
    unit: str
    help: str
    labels: tuple[str, ...]


METRICS = (
    Metric("aceray_train_step", "steps", "steps done, rounds of refinement included", RUN),
    Metric("aceray_train_steps_planned", "steps", "the run's last step, rounds of refinement included", RUN),
    Metric("aceray_train_particles_per_second", "particles/s", "particles of a step or round, all workers", RUN),
    Metric("aceray_train_step_seconds", "s", "duration of a step or round, on the slowest worker", RUN),
    Metric("aceray_train_data_wait_seconds", "s", "part of a step spent waiting for its images, longest", RUN),
    Metric("aceray_train_loss", "1", "a term of the loss, unweighted, and their weighted sum (total)", (*RUN, "term")),
    Metric("aceray_train_pip_weight", "1", "weight of the pose loss (PIP) in this step", RUN),
    Metric("aceray_train_label_filter", "number", "Gaussian filter of the labels, 1 (none) to 5", RUN),
    Metric("aceray_train_report_timestamp_seconds", "s", "Unix time of the newest step or round", RUN),
    Metric(
        "aceray_train_checkpoint_timestamp_seconds", "s", "Unix time of the newest checkpoint, else of the start", RUN
    ),
    Metric("aceray_train_restarts", "restarts", "times that workers were lost and started again", RUN),
    Metric("aceray_refine_round", "rounds", "rounds of refinement done", RUN),
    Metric("aceray_refine_moved_fraction", "share", "poses that left their minimum; the rest settled", RUN),
    Metric("aceray_refine_rescued_fraction", "share", "particles, worst explained, searched over all poses", RUN),
    Metric("aceray_refine_unexplained_fraction", "share", "mean whitened power that the map leaves unexplained", RUN),
    Metric("aceray_pose_rotation_error_degrees", "degree", "median against the truth, where it is known", RUN),
    Metric("aceray_pose_rotation_sqfrob", "0 to 8", "mean or median squared Frobenius error", (*RUN, "statistic")),
    Metric("aceray_pose_coverage", "share", "view directions that the predicted poses reach", RUN),
    Metric("aceray_fsc_resolution_angstrom", "angstrom", "where the FSC crosses", (*RUN, "against", "threshold")),
    Metric("aceray_select_score", "as named", "scores that need no truth, select/ in MLflow", (*RUN, "score")),
    Metric("aceray_tracking_backlog_records", "records", "records that MLflow has not taken yet", RUN),
    Metric("aceray_device_memory_bytes", "bytes", "most that torch held on a GPU so far", (*RUN, "device")),
    Metric("aceray_device_memory_total_bytes", "bytes", "memory of that GPU", (*RUN, "device")),
    Metric("aceray_data_particles", "particles", "particles written, refused ones included", ("dataset",)),
    Metric("aceray_data_particles_planned", "particles", "particles to be written", ("dataset",)),
    Metric("aceray_data_particles_per_second", "particles/s", "particles a second since the start", ("dataset",)),
    Metric("aceray_data_refused_particles", "particles", "particles of the input that were refused", ("dataset",)),
    Metric("aceray_study_trials", "trials", "trials of a status", ("study", "status")),
    Metric("aceray_study_restarts", "restarts", "times that a trial's process was lost and started again", ("study",)),
    Metric("aceray_study_objective", "as named", "newest value of a trial", ("study", "trial", "metric")),
    Metric("aceray_study_best", "as named", "best value of all finished trials", ("study", "metric")),
)
BY_NAME = {metric.name: metric for metric in METRICS}
