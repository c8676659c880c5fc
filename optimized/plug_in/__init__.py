"""transformers' own DeepSeek V3.2 and GLM-5 classes on the operators of `optimized.ops`.

    import optimized
    optimized.plug_into_transformers()

`registry.py` says what is replaced and puts it back; `attention.py`, `layers.py` and `models.py` say what the replaced
parts do; `deepseek_v32.py` and `glm_moe_dsa.py` are the two families. docs/plug-in.md lists what changes in results.
"""

from .registry import TESTED_VERSIONS, PlugIn, plug_into_transformers

__all__ = ["TESTED_VERSIONS", "PlugIn", "plug_into_transformers"]
