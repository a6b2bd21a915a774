"""What the comparison of seams measures, on errors that are known; its figures are in RESULTS.md, not here."""

import os
import subprocess
import sys

import numpy as np
import pytest

from nfscale.signals.tiles import Tile
from pipelines.tiles import _bytes_of, _family, patch_steps, seam_steps

CUTS = Tile((16, 16), (0, 4)).cuts((64, 52))


def test_white_noise_has_no_seams_and_no_patches():
    error = np.random.default_rng(0).normal(0, 0.01, (64, 52, 3))
    for share, ratio in seam_steps(error, CUTS):
        assert share == pytest.approx(0.01 * 2**0.5, rel=0.1)
        assert ratio == pytest.approx(1, abs=0.1)
    assert all(ratio < 1.5 for _, ratio in patch_steps(error, CUTS))


def test_blocks_that_are_off_show_as_seams_and_as_patches():
    draw = np.random.default_rng(0)
    offsets = np.repeat(draw.normal(0, 0.1, (4, 52, 3)), 16, axis=0).mean(axis=1, keepdims=True)
    error = offsets + draw.normal(0, 0.001, (64, 52, 3))
    (_, down), (_, across) = seam_steps(error, CUTS)
    assert down > 5
    assert across == pytest.approx(1, abs=0.2)
    (share, down), (_, across) = patch_steps(error, CUTS)
    assert down > 5
    assert share == pytest.approx(np.sqrt(np.square(np.diff(offsets[::16, 0], axis=0)).mean()), rel=0.2)
    assert across < 2


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it reads /proc")
def test_memory_is_that_of_a_process_and_its_children():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        assert {os.getpid(), child.pid} <= set(_family(os.getpid()))
        assert _family(child.pid) == [child.pid]
        assert _bytes_of(os.getpid()) > 10 << 20
        child.communicate(b"\n")
    assert _bytes_of(child.pid) == 0, "it has ended"
