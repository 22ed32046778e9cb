# SPDX-License-Identifier: Apache-2.0
from .tools.embedded import EMBEDDED_MODELS, embedded_model  # noqa: F401
