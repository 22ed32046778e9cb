# SPDX-License-Identifier: Apache-2.0
from .tools.hub import *  # noqa: F403
from .tools.hub import write_file  # noqa: F401
