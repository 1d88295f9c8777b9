"""What `tests/bench/rivals.py` gives to cryoDRGN and takes from it, and how it counts."""

import json
import pickle
import sys

import mrcfile
import numpy as np
import pytest
import torch

from aceray.data.pose_files import read_poses, unpickle_arrays
from tests.bench.rivals import (
    SHOWN,
    Followed,
    Reached,
    abinit_words,
    as_fractions,
    evaluations,
    followed,
    print_ratios,
    print_reached,
    progress,
    write_cryodrgn_input,
)
from tests.data.conftest import BOX, PIXEL_SIZE


def reached(cpu_seconds: float, median: float, resolution_px: float) -> Reached:
    return Reached(cpu_seconds, dict(zip(SHOWN, (resolution_px, 1.0, median, 1.0), strict=True)))


def test_cryodrgn_gets_the_images_and_a_column_for_each_part_of_the_ctf(write_example, tmp_path):
    particles = write_example()
    write_cryodrgn_input(particles, tmp_path)
    with mrcfile.open(tmp_path / "particles.mrcs") as file:
        assert file.data is not None and file.data.shape == (400, BOX, BOX) and file.is_image_stack()
        assert file.voxel_size.x == pytest.approx(PIXEL_SIZE)
    known = particles.read(particles.row_groups()).to_pandas()
    (table,) = unpickle_arrays(tmp_path / "ctf.pkl")
    names = ["defocus_u_angstrom", "defocus_v_angstrom", "astigmatism_deg", "voltage_kv", "spherical_aberration_mm"]
    assert table.dtype == np.float32 and table.shape == (400, 9)
    np.testing.assert_array_equal(
        table[:, 2:], known[[*names, "amplitude_contrast", "phase_shift_deg"]].to_numpy(np.float32)
    )
    np.testing.assert_allclose(table[:, :2], np.tile([BOX, PIXEL_SIZE], (400, 1)))


def test_translations_of_abinit_are_pixels_by_which_the_image_is_centred(write_example, tmp_path):
    particles = write_example()
    rotation, shift_px = particles.read_truth().rotation, particles.read_truth().shift_px / 8
    left = tmp_path / "pose.1.pkl"
    left.write_bytes(pickle.dumps((rotation.double().numpy(), -shift_px.double().numpy())))
    (tmp_path / "poses.pkl").write_bytes(as_fractions(left, BOX))
    found, found_px, _ = read_poses(tmp_path / "poses.pkl", particles.manifest)
    torch.testing.assert_close(found, rotation)
    torch.testing.assert_close(found_px, shift_px, atol=1e-5, rtol=0)


def test_progress_is_the_last_count_of_the_log():
    log = "# [Train Epoch: 1/30] [208/5000 particles]\n# [Train Epoch: 2/30] [1408/5000 particles]\nWill"
    assert progress(log, 77.4) == "77 CPU s, its last count is image 1,408 of 5,000 in epoch 2 of 30"
    assert progress("INFO", 77.4) == "77 CPU s, nothing counted yet"


def test_evaluations_are_whole_rows_that_hold_one(tmp_path):
    row = dict.fromkeys(SHOWN, 0.5)
    assert evaluations(tmp_path / "none.jsonl") == []
    lines = [json.dumps({"step": 1}), json.dumps({"step": 2, **row}), json.dumps({"step": 3, **row})]
    (tmp_path / "history.jsonl").write_text("\n".join(lines))
    assert evaluations(tmp_path / "history.jsonl") == [row]


def test_a_program_is_followed_by_its_cpu_seconds_and_ended(tmp_path):
    program = "import sys, time\nwhile time.process_time() < {}: pass\nopen({!r}, 'w')\nwhile {}: pass"
    mark = tmp_path / "mark"
    command = [sys.executable, "-c", program.format(0.5, str(mark), True)]
    found, seconds = followed(command, tmp_path / "log", lambda: ["here"] * mark.exists(), 1.0)
    assert [item for _, item in found] == ["here"] and 0.4 < found[0][0] <= seconds and 1.0 < seconds < 2.0
    command = [sys.executable, "-c", program.format(0.0, str(mark), False)]
    assert [item for _, item in followed(command, tmp_path / "log", lambda: ["here"], 1.0)[0]] == ["here"]
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        followed([sys.executable, "-c", "1 / 0"], tmp_path / "log", list, 1.0)


def test_ratios_are_of_the_first_results_that_are_good_enough_in_both(capsys):
    ours = Followed("we", [reached(20, 0.5, 4.0), reached(50, 0.001, 2.0)], 60)
    rival = Followed("it", [reached(30, 0.4, 5.0), reached(100, 0.4, 4.0), reached(250, 0.05, 2.2)], 400)
    print_ratios([ours, rival, Followed("nothing", [], 400)])
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in capsys.readouterr().out.splitlines()[5:]]
    assert cells == [
        ["we", "20", "50", "50", "50", "50"],
        ["it", "100 (5.0)", "250 (5.0)", *["> 400 (> 8.0)"] * 3],
        ["nothing", "> 400 (> 20.0)", *["> 400 (> 8.0)"] * 4],
    ]


def test_what_was_there_by_then():
    program = Followed("", [reached(10, 0.5, 4.0), reached(30, 0.2, 3.0)], 40)
    assert program.within(9) is None
    assert [program.within(seconds) for seconds in (29.0, 30.0)] == program.reached


def test_the_commands_of_cryodrgn_name_their_files(tmp_path):
    words = abinit_words("cryodrgn", tmp_path, tmp_path / "out", "-n 3")
    assert words[:3] == ["cryodrgn", "abinit", f"{tmp_path}/particles.mrcs"] and words[-2:] == ["-n", "3"]
    assert words[words.index("-o") + 1] == f"{tmp_path}/out" and "--uninvert-data" not in words


def test_a_row_for_each_multiple_of_our_seconds_that_a_program_came_to(capsys):
    ours = Followed("we", [reached(20, 0.5, 4.0), reached(48, 0.001, 2.0)], 50)
    ended = Followed("ended", [reached(60, 0.4, 5.0), reached(100, 0.3, 4.0)], 120, "stopped")
    print_reached([ours, ended, Followed("cut", [reached(300, 0.2, 3.0)], 401)], 50)
    lines = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in row.split("|")[1:6]] for row in lines[5:-1]]
    assert cells == [
        ["we", "50", "48", "2.0000", "1.0000"],
        ["ended", "50", "", "nothing yet", ""],
        ["ended", "120", "100", "4.0000", "1.0000"],
        ["cut", "50", "", "nothing yet", ""],
        ["cut", "200", "", "nothing yet", ""],
        ["cut", "400", "300", "3.0000", "1.0000"],
    ]
    assert lines[-1] == "ended: stopped"
