# SPDX-License-Identifier: Apache-2.0
"""A Space with the demo page of the package's tiny models; add "--model", "owner/name" for others."""

from diffusers_magihuman.tools.cli import main

main(["demo", "--host", "0.0.0.0"])
