# SPDX-License-Identifier: Apache-2.0
"""What is built on the components: the command, converting, repositories, plans of memory. They import none of it."""
