"""torch.compile, one transformer layer at a time.

All layers share one compiled graph, so compilation takes as long as for one layer, whatever the depth; compiling the whole model
measured no faster (performance reference, A3). Parameter names do not change.
"""

from __future__ import annotations

from torch import nn

from steep.models.layers import transformer_layers


def compile_layers(model: nn.Module) -> int:
    """Compile each transformer layer in place and return how many. Compilation itself happens at the first call.

    Raises ModelError for a model without a list of layers. Weakness: needs a C++ compiler on CPUs; attention that is computed
    document by document is not compiled and splits the graph of its layer.
    """
    layers = transformer_layers(model)
    for layer in layers:
        getattr(layer.forward, "compile", layer.compile)()  # of a checkpointed layer, the part inside the checkpoint
    return len(layers)
