# SPDX-License-Identifier: Apache-2.0
"""The old name of `pipeline_base`, for modules that still import it; to be deleted with their imports."""

from .pipeline_base import DEFAULT_NEGATIVE_PROMPT, FRAME_RATE, MAX_SEQUENCE_LENGTH  # noqa: F401
