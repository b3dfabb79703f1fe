"""Serve a model through OpenAI's speech API: ``voxkern serve``. It needs ``pip install 'voxkern[serve]'``.

::

    command.py         the command ``voxkern serve`` and its flags
    settings.py        names and limits of a server
    server.py          listens, and ends in order at SIGTERM
    app.py             the routes, and the API key
    service.py         what all routes share: the model, and the number of requests in it
    speech.py          POST /v1/audio/speech: from a request's body to its sound
    speech_request.py  checks the fields of a request
    reply.py           sends a sound, events or an error
    limits.py          limits of a body; stops the work when a client has gone
    formats.py         wav, pcm, mp3, flac and opus
    session.py         WS /v1/audio/speech/stream: text that arrives in pieces
    session_config.py  checks the fields of a session
    speaker.py         generates a session's sentences, and sends them in order
    page.py            the page at /
    ray_app.py         replicas on Ray Serve
    metrics.py         the figures of GET /metrics
    errors.py          errors in OpenAI's JSON form
"""
