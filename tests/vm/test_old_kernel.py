"""What depends on the kernel, on the oldest one that we promise to work on: Debian 12's 6.1."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from tests.support import vm

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.kernel, pytest.mark.needs("vm"), pytest.mark.timeout(1200)]


def test_the_udp_data_path_in_the_kernel_works_there() -> None:
    # modprobe: without udev nothing loads the driver when the device file is opened
    script = f"""
        set -e
        modprobe tun
        cd {shlex.quote(str(ROOT))}
        exec {sys.executable} -m pytest -q -p no:cacheprovider --timeout 300 --require=netns,udp_kernel \\
            tests/netns/test_udp_fast.py tests/netns/test_tun.py
    """
    result = vm.run(script, 1100)
    assert result.status == 0, result.log[-8000:]
