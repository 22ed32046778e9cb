# SPDX-License-Identifier: Apache-2.0
"""Today's place of the plan, until all callers name `tools.plan`."""

from .tools.plan import *  # noqa: F403
