"""Serve a model through OpenAI's speech API: ``voxkern serve``. It needs ``pip install 'voxkern[serve]'``.

::

    command.py         the command ``voxkern serve`` and its flags
    settings.py        names and limits of a server
    server.py          listens, and ends in order at SIGTERM
    app.py             the routes, and the API key
    speech.py          POST /v1/audio/speech: from a request's body to its sound
    speech_request.py  checks the fields of a request
    limits.py          limits of a body's size and time, and of a client that has gone
    formats.py         wav, pcm, mp3, flac and opus
    metrics.py         the figures of GET /metrics
    errors.py          errors in OpenAI's JSON form
"""
