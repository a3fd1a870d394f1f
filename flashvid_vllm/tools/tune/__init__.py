# SPDX-License-Identifier: MIT
"""Which retention ratio one's own videos allow: ``flashvid tune DATA --base-url URL``.

The way of the data: ``data`` reads videos and questions, ``grid`` the settings, ``collect`` asks the server through
``client`` and keeps every answer in ``results`` as it comes, ``summary`` makes a row of figures for each setting with
``stats``, ``advice`` says what they mean, and ``table``, ``page`` (HTML) and ``pictures`` show it.
"""
