from __future__ import annotations

import pytest
from hypothesis import settings

from support_certificates import Certificates, make_certificates

settings.register_profile("without deadline", deadline=None)  # a machine that is busy is no fault of what is tested
settings.load_profile("without deadline")


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))
