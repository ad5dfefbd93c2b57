"""The screenshots that the README shows, and the script that makes them."""

from __future__ import annotations

import itertools
import re
import struct
import subprocess
import sys

import pytest

from tests.screenshots import IN_README, SCREENS
from tests.support import CHROMIUM, HERE, README, in_browser

IMAGE_BYTES_MAX = 150_000


def test_screenshots_in_the_readme_are_made_by_the_script_and_small():
    shown = re.findall(r"!\[[^]]+\]\((docs/[^)]+)\)", README)
    assert shown
    assert set(shown) <= {f"docs/{name}.png" for name in IN_README}
    for path in shown:
        assert 0 < (HERE / path).stat().st_size < IMAGE_BYTES_MAX
    assert {path.name for path in (HERE / "docs").glob("*.png")} == {path[5:] for path in shown}


@pytest.mark.slow
@in_browser
def test_script_shows_a_state_of_the_page_on_each_screen_light_and_dark(tmp_path):
    if not CHROMIUM:
        pytest.skip("there is no browser here: apt-get install chromium")
    script = [sys.executable, "-m", "tests.screenshots", "--all", tmp_path, "holder"]
    done = subprocess.run(script, cwd=HERE, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert "WIDER" not in done.stdout
    images = {path.stem: path.read_bytes() for path in tmp_path.iterdir()}
    expected = {
        f"holder-{screen['width']}-{scheme}": screen
        for screen, scheme in itertools.product(SCREENS, ("light", "dark"))
    }
    assert images.keys() == expected.keys()
    for name, image in images.items():
        width, height = struct.unpack(">II", image[16:24])  # A PNG begins so.
        assert width == expected[name]["width"]
        assert height >= expected[name]["height"]
    assert len(set(images.values())) == len(images)
