"""Many requests on one model, frame by frame.

::

    request.py       what is to be generated, and how far it has come
    engine.py        the scheduler: admits requests, runs frames, delivers their output
    kv_cache.py      the paged KV cache: pages, reference counts, prefixes that requests share
    runner.py        runs a model's frames; here on the reference modules
    fused_runner.py  the same on fused modules, in static memory
    codec_runner.py  decodes every request's frame to samples
    cuda_graphs.py   captures a frame as one CUDA graph
    streaming.py     delivers a request's audio in chunks, also for asyncio
"""
