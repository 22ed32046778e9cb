# SPDX-License-Identifier: Apache-2.0
"""The workshop: what people use around the models. Nothing of the core imports it."""
