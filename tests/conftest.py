from __future__ import annotations

import os
from typing import Any

import pytest
from hypothesis import settings

from support_certificates import Certificates, make_certificates

settings.register_profile("without deadline", deadline=None)  # a machine that is busy is no fault of what is tested
settings.load_profile("without deadline")

for variable in ("grpc_proxy", "https_proxy", "http_proxy", "all_proxy"):  # the tests' own clients speak over loopback
    os.environ.pop(variable, None)
    os.environ.pop(variable.upper(), None)

TOGETHER = ("tests/system/test_dashboards.py", "tests/system/test_ray.py")
"""Modules that one process has, as they start a Prometheus with its runs, and a Ray cluster, for all of their tests."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Hand the tests out one by one, but those modules; xdist's own groups are none with this pytest."""
    if config.getvalue("dist") != "loadscope":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class OneByOne(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            module = nodeid.partition("::")[0]
            return module if module in TOGETHER else nodeid

    return OneByOne(config, log)


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))
