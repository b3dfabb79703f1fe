"""Accelerate the flow heads of public servers, recognised by their attributes; no server is imported.

The layers of vLLM-Omni's and SGLang-Omni's heads have the checkpoint's names. Both heads store the sizes in
``model_args`` and ``acoustic_transformer_args``, and the flow times in ``_timesteps``. vLLM-Omni captures its head in
CUDA graphs through a wrapper, which is not a module. The wrapper's method ``_forward_cudagraph_compatible`` repeats the
head's computation.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..reference.config import AcousticTransformerConfig, AudioModelConfig
from ..reference.flow_head import FlowHead
from ..reference.quantized import format_of, quantizable, replace_linears
from ..reference.solver import time_grid
from ..reference.transformer_head import FlowMatchingAudioTransformer

if TYPE_CHECKING:
    from .fused_server_head import FusedServerHead

CAPTURED_METHOD, VELOCITY_METHOD = "_forward_cudagraph_compatible", "_predict_velocity"
REPLACED_METHODS = "_voxkern_replaced"  # attribute with the names of the methods that were replaced on an object
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class UnsupportedHead(ValueError):
    """Raised for a server's head or wrapper that kernels cannot replace; the message gives the reason."""


def is_server_head(module: nn.Module) -> bool:
    """Return whether `module` has the two output layers of a flow head and is not one of voxkern's own heads."""
    outputs = {"semantic_codebook_output", "acoustic_codebook_output"}
    return outputs <= dict(module.named_children()).keys() and not isinstance(module, FlowHead)


def is_graph_wrapper(thing: object) -> bool:
    """Return whether `thing` captures a flow head in CUDA graphs as vLLM-Omni's wrapper does."""
    return hasattr(thing, CAPTURED_METHOD) and isinstance(getattr(thing, "acoustic_transformer", None), nn.Module)


def as_reference(module: nn.Module) -> FlowMatchingAudioTransformer:
    """Return a reference head made of the layers of a server's head.

    No weight is copied, so later changes of the server's weights take effect in the reference head too.

    Raises:
        UnsupportedHead: a name, a number, a shape or a dtype differs from the public model's head.
    """
    config, audio = _configs(module)
    with torch.device("meta"):
        head = FlowMatchingAudioTransformer(config, audio)
    mine, theirs = ({name: list(p.shape) for name, p in one.named_parameters()} for one in (head, module))
    for name in sorted(mine.keys() | theirs.keys()):
        if mine.get(name) != theirs.get(name):
            raise UnsupportedHead(f"{name} is {theirs.get(name, 'missing')} but must be {mine.get(name, 'missing')}")
    dtypes = {p.dtype for p in module.parameters()}
    if len(dtypes) > 1 or not dtypes <= set(DTYPES):
        raise UnsupportedHead(
            f"its weights are {', '.join(sorted(map(str, dtypes)))} but must be one of fp32, bf16, fp16"
        )
    for name, layer in list(head.named_modules()):
        if next(layer.children(), None) is None:
            (owner, _, child), own = name.rpartition("."), module.get_submodule(name)
            if getattr(own, "eps", None) not in (None, config.norm_eps):
                raise UnsupportedHead(f"{name}.eps is {own.eps} but must be {config.norm_eps}, the config's norm_eps")
            setattr(head.get_submodule(owner), child, own)
    return head


def accelerate_servers(model: object, max_batch: int, quantize: str | None = None) -> tuple[list[str], dict[str, str]]:
    """Replace the methods of every server's flow head in `model`, and of every wrapper that captures such a head.

    Args:
        model: a module that contains servers' heads, or vLLM-Omni's wrapper.
        max_batch: the most requests that run together, 1..64; larger batches run in groups.
        quantize: the format of copies of the large weights, "int8" or "fp8", or None for no copies.

    Returns:
        The names of the replaced methods, and a dict from the names of methods, heads and wrappers that were not
        replaced to the reasons.

    Raises:
        ValueError: `max_batch` is out of range.
        RuntimeError: a head's weights are on a device on which kernels cannot run.
    """
    replaced: list[str] = []
    left: dict[str, str] = {}
    for name, thing in _find_servers(model):
        try:
            if is_graph_wrapper(thing):
                done, undone = _accelerate_wrapper(thing)
            else:
                done, undone = _accelerate_head(thing, max_batch, quantize)
        except UnsupportedHead as why:
            left[name] = str(why)
            continue
        replaced += [f"{name}.{method}".removesuffix(".forward") for method in done]
        left |= {f"{name}.{method}": why for method, why in undone.items()}
    return replaced, left


def restore_servers(model: object) -> list[str]:
    """Undo :func:`accelerate_servers`, and return the names of the methods that were restored."""
    restored = []
    for name, thing in _find_servers(model):
        for method in vars(thing).get(REPLACED_METHODS, ()):
            delattr(thing, method)
            restored.append(f"{name}.{method}".removesuffix(".forward"))
        vars(thing).pop(REPLACED_METHODS, None)
    return restored


def _find_servers(model: object) -> Iterator[tuple[str, Any]]:
    """Yield the name and object of each server's head and wrapper in `model`; `model` itself may be one."""
    if is_graph_wrapper(model):
        yield "acoustic_transformer", model.acoustic_transformer  # type: ignore[attr-defined]
        yield type(model).__name__, model
    modules = dict(model.named_modules()) if isinstance(model, nn.Module) else {}
    for name, module in modules.items():
        if is_server_head(module):
            yield name or type(module).__name__, module
    for name, module in modules.items():
        for attribute, thing in vars(module).items():
            if is_graph_wrapper(thing):
                yield f"{name}.{attribute}".lstrip("."), thing


def _configs(module: Any) -> tuple[AcousticTransformerConfig, AudioModelConfig]:
    try:
        times, args, audio = module._timesteps, module.acoustic_transformer_args, module.model_args
        numbers = {f.name: getattr(args, f.name) for f in fields(AcousticTransformerConfig) if hasattr(args, f.name)}
        config = AcousticTransformerConfig(**numbers | {"n_decoding_steps": len(times) - 1})
        sizes = audio.semantic_codebook_size, audio.acoustic_codebook_size, audio.n_acoustic_codebook
        grid = time_grid("euler", config.n_decoding_steps)
    except (AttributeError, TypeError, ValueError) as why:
        raise UnsupportedHead(str(why)) from None
    even = torch.tensor(grid, dtype=torch.float64, device=times.device)
    if not torch.allclose(times.double(), even, rtol=0, atol=4e-3):  # the times may have been rounded to bf16
        raise UnsupportedHead(f"its _timesteps are {times.tolist()} but must be even steps from 0 to 1")
    return config, AudioModelConfig(*sizes)


def _accelerate_head(module: Any, max_batch: int, quantize: str | None) -> tuple[list[str], dict[str, str]]:
    from .fused_server_head import FusedServerHead

    fused = _fused_head_of(module)
    if fused is None and "forward" in vars(module):
        raise UnsupportedHead("its forward has been replaced already, by something else")
    forward = _parameters(type(module).forward)
    if forward not in (["llm_hidden", "cfg_alpha"], ["llm_hidden"]):
        raise UnsupportedHead(f"its forward takes ({', '.join(forward)}) but must take (llm_hidden, cfg_alpha)")
    if fused is None or fused.max_batch != max_batch or fused.quantize != quantize:
        head = as_reference(module)
        if quantize is not None:
            linears = quantizable(head)
            if len(linears) != 7 * len(head.layers) + 1:  # wq, wk, wv, wo, w1, w2, w3 of a layer; the semantic head
                raise UnsupportedHead("quantize needs layers that are torch.nn.Linear without bias")
            with torch.device("meta"):  # prepare() gives them their memory
                replace_linears(head, linears, format_of(quantize))
        fused = FusedServerHead(head, module, max_batch, quantize)
    fused.prepare()
    methods: dict[str, Callable[..., Any]] = {"forward": fused.forward}
    left = {}
    if hasattr(module, VELOCITY_METHOD):
        ways = {tuple(_parameters(way)): way for way in (fused.velocity_of_projected, fused.velocity_of_embedded)}
        taken = _parameters(getattr(type(module), VELOCITY_METHOD))
        if tuple(taken) in ways:
            methods[VELOCITY_METHOD] = ways[tuple(taken)]
        else:
            left[VELOCITY_METHOD] = f"its arguments ({', '.join(taken)}) are not those of a known server"
    return _bind(module, methods), left


def _accelerate_wrapper(wrapper: Any) -> tuple[list[str], dict[str, str]]:
    from .fused_server_head import CapturableFrame

    fused = _fused_head_of(wrapper.acoustic_transformer)
    taken = _parameters(getattr(type(wrapper), CAPTURED_METHOD))
    if fused is None or taken != ["hidden_states", "cfg_alpha", "noise"]:
        raise UnsupportedHead(
            f"its captured method takes ({', '.join(taken)}) but must take (hidden_states, cfg_alpha, noise), and its "
            f"head, which must be accelerated, is {'accelerated' if fused else 'not'}"
        )
    if wrapper.graphs:
        if REPLACED_METHODS not in vars(wrapper):
            raise UnsupportedHead("it has captured its CUDA graphs already, so a new method would not change them")
        return list(vars(wrapper)[REPLACED_METHODS]), {}
    return _bind(wrapper, {CAPTURED_METHOD: CapturableFrame(fused, wrapper.n_steps, wrapper.capture_sizes)}), {}


def _bind(thing: object, methods: dict[str, Callable[..., Any]]) -> list[str]:
    for name, method in methods.items():
        setattr(thing, name, method)
    setattr(thing, REPLACED_METHODS, tuple(methods))
    return list(methods)


def _fused_head_of(module: nn.Module) -> "FusedServerHead | None":
    return vars(module)["forward"].__self__ if REPLACED_METHODS in vars(module) else None


def _parameters(function: Callable[..., Any]) -> list[str]:
    """Return the names of a function's arguments, without `self` and keyword-only ones, which only voxkern adds."""
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.name != "self" and p.kind is not p.KEYWORD_ONLY]
