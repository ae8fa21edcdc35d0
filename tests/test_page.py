"""report.html: whole, and safe against names that want to be markup."""

import math
import re

from lowprec.export.page import Part, render_page
from lowprec.export.parity import Check, ParityReport, Stage
from lowprec.report import ChangeReport, Row

HOSTILE = "<script>alert(1)</script>\"'&"


def part(value=0.5, verdict="pass"):
    checks = (
        Check("rho:output", verdict, value, 6.0, HOSTILE),
        Check("agreement:output", "info", 0.99, None, HOSTILE, (0.98, 1.0)),
    )
    stage = Stage(HOSTILE, HOSTILE, "onnxruntime", HOSTILE, checks=checks)
    absent = Stage("engine", "model.rtx.engine", "tensorrt-rtx", "-", status="built, not run here", reason=HOSTILE)
    folded = ChangeReport([Row(HOSTILE, HOSTILE)], [Row(HOSTILE, HOSTILE)])
    return Part(HOSTILE, ParityReport((stage, absent)), folded, {HOSTILE: HOSTILE})


def test_hostile_names_stay_text():
    page = render_page([part()])
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 8


def test_the_bar_is_half_full_at_the_failing_limit_and_never_overfull():
    for value, width in ((6.0, 50), (3.0, 25), (0.001, 1), (1e9, 100), (math.inf, 100)):
        assert re.findall(r'class="bar" style="width:(\d+)%"', render_page([part(value)])) == [str(width)]


def test_the_verdict_is_said_in_words():
    assert "are the network that was trained" in render_page([part()])
    assert "are not the network that was trained" in render_page([part(7.0, "fail")])
