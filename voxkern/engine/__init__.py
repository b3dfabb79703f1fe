"""Run many requests on one model, frame by frame.

::

    request.py       a request, and the state of a submitted one
    engine.py        the scheduler: admits requests, runs frames, delivers their output
    kv_cache.py      the paged KV cache: pages, reference counts, prefixes that requests share
    runner.py        the interface that runs a model's frames, and its implementation on the reference modules
    fused_runner.py  the implementation on fused modules, in static memory
    codec_runner.py  decodes the frames of all requests to samples
    cuda_graphs.py   captures a frame as one CUDA graph
    streaming.py     delivers a request's audio in chunks, also for asyncio
    frame_thread.py  one thread that runs the frames of all asyncio callers
"""
