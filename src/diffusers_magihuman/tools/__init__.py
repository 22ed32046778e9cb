# SPDX-License-Identifier: Apache-2.0
"""What people use around the models: the command, converting, repositories, plans of memory."""
