# SPDX-License-Identifier: Apache-2.0
"""The old place of the output class, for modules that still import it; to be deleted with their imports."""

from .pipeline_base import MagiHumanPipelineOutput  # noqa: F401
