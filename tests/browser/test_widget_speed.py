"""Pointing must feel immediate. Times on a shared machine are noisy, so the bounds are loose; the numbers are printed."""

from __future__ import annotations

import json

from tests.support.lab_server import LabPage
from tests.support.measure_widget import measure

SLOWEST_MS = 50  # three frames; 8 to 10 ms were measured
LEAST_TIMES = 5  # 20 and more were measured
ATTEMPTS = 3  # someone else may be using the machine


def test_pointing_repaints_within_frames_and_far_sooner_than_redrawing_in_the_kernel(lab: LabPage) -> None:
    for _ in range(ATTEMPTS):
        found = measure(lab)
        print(json.dumps(found))
        if found["explorer"]["median_ms"] < SLOWEST_MS and found["times_faster"] > LEAST_TIMES:
            break
    assert found["explorer"]["n"] >= 30
    assert found["explorer"]["median_ms"] < SLOWEST_MS
    assert found["times_faster"] > LEAST_TIMES
