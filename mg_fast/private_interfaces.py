"""The private parts of other libraries that this package uses: what each stands for, and what is used without it.

A release may remove or change them without notice. tests/test_private_interfaces.py looks each of them up in
the installed releases, and finds uses in the package that are not listed here.
"""

import importlib
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

# What a use does where nothing stands in for the private part.
NOTHING = "nothing: the use raises AttributeError or ImportError"


class Interface(NamedTuple):
    """One private part.

    Attributes:
        stands_for: what it is.
        instead: what is used in a release that lacks it.
        since: the first tested release that has it, where older ones are supported too.
    """

    stands_for: str
    instead: str = NOTHING
    since: str | None = None


_HOOKS = "the hooks that are registered for all modules at once, which make packed copies of modules invalid"
_OWN_HOOKS = "the hooks of one module, which make packed copies of it invalid"
_NOT_IN_THE_KEY = "nothing: the key lacks it"
_SETTING = "a setting of float arithmetic, which is part of the key of kept results"

# By the dotted name; "()" makes an instance of a class, whose attributes follow. "module:name" is an attribute that the
# module sets on objects of other modules.
INTERFACES: dict[str, Interface] = {
    # numerics.py. The public properties take several times as long.
    "torch._C._get_fp32_precision_getter": Interface(_SETTING, "torch.backends.*.fp32_precision"),
    **{
        f"torch._C.{name}": Interface(_SETTING, f"torch.{public}")
        for name, public in (
            (
                "_get_cublas_allow_fp16_reduced_precision_reduction",
                "backends.cuda.matmul.allow_fp16_reduced_precision_reduction",
            ),
            (
                "_get_cublas_allow_bf16_reduced_precision_reduction",
                "backends.cuda.matmul.allow_bf16_reduced_precision_reduction",
            ),
            ("_get_cublas_allow_fp16_accumulation", "backends.cuda.matmul.allow_fp16_accumulation"),
            ("_get_flash_sdp_enabled", "backends.cuda.flash_sdp_enabled"),
            ("_get_mem_efficient_sdp_enabled", "backends.cuda.mem_efficient_sdp_enabled"),
            ("_get_math_sdp_enabled", "backends.cuda.math_sdp_enabled"),
            ("_get_cudnn_sdp_enabled", "backends.cuda.cudnn_sdp_enabled"),
            ("_get_math_sdp_allow_fp16_bf16_reduction", "backends.cuda.fp16_bf16_reduction_math_sdp_allowed"),
            ("_get_cudnn_enabled", "backends.cudnn.enabled"),
            ("_get_cudnn_benchmark", "backends.cudnn.benchmark"),
            ("_get_cudnn_deterministic", "backends.cudnn.deterministic"),
            ("_get_mkldnn_enabled", "backends.mkldnn.enabled"),
            ("_get_mkldnn_deterministic", "backends.mkldnn.deterministic"),
            ("_get_deterministic_algorithms", "are_deterministic_algorithms_enabled"),
            ("_get_blas_preferred_backend", "backends.cuda.preferred_blas_library"),
        )
    },
    "torch._C._get_cudnn_depthwise_kernel": Interface(_SETTING, "torch.backends.cudnn.depthwise_kernel", "2.14"),
    "torch._C._get_cublaslt_prefer_grouped_gemm": Interface(_SETTING, _NOT_IN_THE_KEY, "2.14"),
    "torch._C._get_cpu_allow_fp16_reduced_precision_reduction": Interface(_SETTING, _NOT_IN_THE_KEY),
    "torch._C._get_sdp_priority_order": Interface(_SETTING, _NOT_IN_THE_KEY),
    # weights.py and placement.py
    "torch.nn.modules.module._global_forward_pre_hooks": Interface(_HOOKS),
    "torch.nn.modules.module._global_forward_hooks": Interface(_HOOKS),
    "torch.nn.modules.module._global_backward_pre_hooks": Interface(_HOOKS),
    "torch.nn.modules.module._global_backward_hooks": Interface(_HOOKS),
    "torch.nn.Module()._forward_pre_hooks": Interface(_OWN_HOOKS),
    "torch.nn.Module()._forward_hooks": Interface(_OWN_HOOKS),
    "torch.nn.Module()._backward_pre_hooks": Interface(_OWN_HOOKS),
    "torch.nn.Module()._backward_hooks": Interface(_OWN_HOOKS),
    "torch.nn.Module()._modules": Interface("the parts of a module by name, in the order of registration"),
    "torch.nn.Module()._parameters": Interface("the parameters of a module itself by name, None included"),
    "torch.nn.parallel.replicate:_former_parameters": Interface("the parameters of a replica of DataParallel"),
    "accelerate.hooks:_hf_hook": Interface("accelerate's hook of a module, which places or offloads its weights"),
    "accelerate.hooks:_old_forward": Interface("the forward of a module before accelerate replaced it"),
    "torch.Tensor._version": Interface("a count of the writes into a tensor in place"),
    "torch._subclasses.FakeTensor": Interface("tensors without numbers, which traces and torch.compile hand over"),
    "torch.multiprocessing.reductions.StorageWeakRef": Interface("a reference that keeps a storage's address taken"),
    # ops/
    "torch._subclasses.FakeTensorMode": Interface("makes tensors without numbers; compiling ahead of time needs it"),
    "torch._subclasses.fake_tensor.unset_fake_temporarily": Interface("leaves that mode for constants"),
    "torch.utils._python_dispatch.TorchDispatchMode": Interface("sees every operator that runs under fake tensors"),
    "torch._C.DispatchKey.CompositeExplicitAutograd": Interface("the key of a custom operator's body"),
    "torch._C._dispatch_tls_local_exclude_set": Interface("the dispatch keys that are masked within an operator"),
    "torch._C._dispatch_tls_local_include_set": Interface("the dispatch keys that are added within an operator"),
    "torch._C._ForceDispatchKeyGuard": Interface("sets both within a block, so that an operator's body gets gradients"),
    "torch.ops.aten.add.Tensor._op_dk": Interface("the body of an operator under one dispatch key"),
    "torch.ops.aten.add.Tensor._schema": Interface("the name and the arguments of an operator"),
    "torch.UntypedStorage()._cdata": Interface("the identity of a storage"),
    "torch.ops.mkldnn._linear_pointwise": Interface(
        "oneDNN's product that ends in GELU or a sum, on CPUs", "F.linear or a 1x1 convolution, and a second pass"
    ),
    "torch.ops.mkldnn._linear_pointwise.binary": Interface(
        "oneDNN's product that ends in a sum of two tensors", "F.linear or a 1x1 convolution, and a second pass"
    ),
    "triton.runtime.interpreter._convert_float": Interface(
        "how the interpreter rounds to bfloat16, which is corrected", "the interpreter's own rounding"
    ),
    "triton.runtime.driver._active": Interface("the driver in force; compiling ahead of time puts another in place"),
    "triton.runtime.jit.JITFunction.run": Interface("a kernel's launch, which compiling ahead of time replaces"),
    "triton.runtime.jit.MockTensor": Interface("an argument that has a dtype and no memory"),
    "triton.backends.compiler.GPUTarget": Interface("the architecture to compile for"),
    # decoding/ and quantization/
    "torch._dynamo.exc.TorchDynamoException": Interface(
        "an error of torch.compile, after which a pass runs without it"
    ),
    "torch._dynamo.exc.FailOnRecompileLimitHit": Interface("torch.compile has met too many shapes"),
    "torch._dynamo.mark_dynamic": Interface("says that a compiled pass must not rely on the size of a window"),
    "torch._weight_int8pack_mm": Interface("the product with int8 weights on CPUs", "the product of torchao's tensor"),
    "torch._assert_async": Interface("a check within a graph, whose result the host does not wait for"),
    "transformers.PreTrainedConfig()._attn_implementation": Interface("the name of the attention in force"),
    "transformers.PreTrainedConfig()._experts_implementation": Interface("the name of the experts' products in force"),
    "transformers.generation.utils:_pad_token_tensor": Interface("the id that fills up rows that have ended"),
    "transformers.integrations.moe.ALL_EXPERTS_FUNCTIONS": Interface("the table of the experts' products by name"),
    "transformers.models.mixtral.modeling_mixtral.MixtralExperts._apply_gate": Interface(
        "an expert's gated activation"
    ),
    "transformers.cache_utils.CacheLayerMixin": Interface("the base class of a cache's layers"),
    # models/ and integrations/
    "transformers.CLIPVisionModel._from_config": Interface("a tower with the attention of the whole model"),
    "transformers.GenerationMixin._expand_inputs_for_generation": Interface("repeats the inputs for beams"),
    "transformers.core_model_loading.WeightRenaming": Interface("a pattern of tensor names and its replacement"),
    "transformers.core_model_loading.revert_weight_conversion": Interface("the tensors by their published names"),
    "transformers.conversion_mapping.register_checkpoint_conversion_mapping": Interface("sets these patterns"),
    "transformers.models.auto.configuration_auto.CONFIG_MAPPING": Interface("configuration classes by model type"),
    "transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": Interface("models whose labels shift"),
    "transformers.models.auto.modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES": Interface(
        "models that take pictures"
    ),
    "transformers.models.auto.modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING._extra_content": Interface(
        "the models that other packages registered"
    ),
    "transformers.models.auto.processing_auto.PROCESSOR_MAPPING._extra_content": Interface(
        "the processors that other packages registered"
    ),
    "importlib._bootstrap:_initializing": Interface("whether a module is half imported"),
    **{
        f"transformers.models.clip.modeling_clip.{name}": Interface("a part of CLIP, whose arithmetic is repeated")
        for name in ("CLIPAttention", "CLIPEncoder", "CLIPEncoderLayer", "CLIPMLP", "CLIPVisionEmbeddings")
    },
    "timm.models.convnext.ConvNeXtBlock": Interface("timm's block, which is exchanged"),
    "timm.models.convnext.ConvNeXtStage": Interface("timm's stage, which is exchanged"),
    # integrations/vllm/. All that a model outside of vLLM needs changes from release to release.
    "vllm.model_executor.models.config.MODELS_CONFIG_MAP": Interface(
        "what completes the configuration of an architecture"
    ),
    "vllm.tokenizers.registry.TokenizerRegistry": Interface("tokenizers by the name of their mode"),
    "vllm.renderers.registry.RENDERER_REGISTRY": Interface("renderers of prompts by the same name"),
    "vllm.renderers.hf.HfRenderer._tokenize_prompt": Interface("turns a prompt's text into ids, and is overridden"),
    **{
        f"vllm.multimodal.processing.BaseMultiModalProcessor.{name}": Interface(f"{what}, and is overridden")
        for name, what in (
            ("_call_hf_processor", "turns pictures into pixels"),
            ("_get_mm_fields_config", "says how the pixels of several pictures lie in one tensor"),
            ("_get_prompt_updates", "says how many places a picture takes"),
        )
    },
    "vllm.model_executor.models.interfaces.SupportsMultiModal._mark_tower_model": Interface(
        "says which part of a model sees, so that it can be left out where no pictures are allowed"
    ),
    "vllm.model_executor.models.interfaces.SupportsMultiModal._mark_language_model": Interface(
        "says which part of a model is its language model"
    ),
    # The web page.
    "gradio.blocks:_queue": Interface("the queue of a page, which keeps lists of events of sessions that were left"),
}


def find(name: str) -> Any | None:
    """Returns a listed interface, or None where the installed release has no such name.

    Raises:
        KeyError: the interface is not listed.
    """
    assert INTERFACES[name]
    try:
        return look_up(name)
    except ImportError:
        return None


def look_up(name: str) -> Any:
    """Returns what a dotted name stands for; ImportError where there is none."""
    module, _, attribute = name.partition(":")
    if attribute:
        if attribute not in inspect.getsource(importlib.import_module(module)):
            raise ImportError(f"{module} has no {attribute}")
        return attribute
    first, *rest = name.split(".")
    path, found = first, importlib.import_module(first)
    for part in rest:
        part, makes = part.removesuffix("()"), part.endswith("()")
        path = f"{path}.{part}"
        try:
            found = getattr(found, part)
        except (AttributeError, RuntimeError):
            found = importlib.import_module(path)
        found = found() if makes else found
    return found


def setting(name: str) -> Callable[[], Any] | None:
    """A function that reads a setting of torch by a listed private name, or by the public name in its place.

    Returns None where the installed release has neither.
    """
    private = find(f"torch._C.{name}")
    if private is not None:
        return private
    public = INTERFACES[f"torch._C.{name}"].instead
    if public == _NOT_IN_THE_KEY:
        return None
    *path, last = public.split(".")
    try:
        owner = look_up(".".join(path))
    except ImportError:
        return None
    found = getattr(owner, last, None)
    return found if found is None or callable(found) else lambda: getattr(owner, last)
