# SPDX-License-Identifier: Apache-2.0
"""The pipelines as blocks of Modular Diffusers, which call the functions that the pipelines call."""
