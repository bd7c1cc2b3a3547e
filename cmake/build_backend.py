"""setuptools' build backend. CUTLASS's headers are one more requirement where nvcc is found."""

from typing import Any

import cuda_toolkit
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return build_meta.get_requires_for_build_wheel(config_settings) + cuda_toolkit.requirements()


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return build_meta.get_requires_for_build_editable(config_settings) + cuda_toolkit.requirements()
