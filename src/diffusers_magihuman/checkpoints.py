# SPDX-License-Identifier: Apache-2.0
"""Published checkpoints, from the original's names to ours: all about them in one place to import from.

A face of other modules: `conversion` has the table, `loading` opens and loads, `tools.convert` writes repositories.
Nothing in the package imports it.
"""

from .conversion import *  # noqa: F403
from .loading import *  # noqa: F403
from .tools.convert import convert_checkpoint  # noqa: F401
