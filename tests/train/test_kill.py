"""SIGKILL at random moments, saves included: the curve after resuming is the uninterrupted one."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from tests.train.runs import ROOT

NUM_KILLS = int(os.environ.get("SLOTH_TEST_KILLS", "50"))
SEED = int(os.environ.get("SLOTH_TEST_SEED", "0"))


def test_a_run_killed_at_random_moments_resumes_to_the_identical_curve(tmp_path):
    """Row 11: after each kill the newest good checkpoint is no older than before."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    arguments = [str(tmp_path), str(NUM_KILLS), str(SEED)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.train.kill_loop", *arguments],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["kills"] == NUM_KILLS
    assert told["in_a_save"] > 0 or NUM_KILLS < 20
