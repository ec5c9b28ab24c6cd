"""What vLLM calls when it starts: the attention of this package becomes its back-end CUSTOM.

EXPERIMENTAL. Written against vLLM 0.33.0. Its classes have run on a CPU behind that release's own Attention layer, its
cache views and metadata; no engine and no GPU has run them, and the tests use a stand-in for vLLM. vLLM finds this
module by the entry point `anabranch` in the group `vllm.general_plugins` and calls `register` in each of its processes;
VLLM_PLUGINS narrows down whose it calls. Choose the back-end by

    vllm serve MODEL --attention-backend CUSTOM

on a GPU (vLLM's CPU platform always takes its own back-end). Importing this module does not import vLLM.
"""

BACKEND = "anabranch.integrations.vllm.backend.AnabranchBackend"


def register() -> None:
    """Tell vLLM where its back-end CUSTOM is; the module of the back-end is loaded when it is chosen.

    May be called any number of times. Raises ImportError if vLLM has no registry of attention back-ends.
    """
    try:
        from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
    except ImportError as error:
        raise ImportError(
            f"anabranch's plug-in needs a vLLM with vllm.v1.attention.backends.registry (0.33.0 has it): {error}"
        ) from error
    register_backend(AttentionBackendEnum.CUSTOM, BACKEND)
