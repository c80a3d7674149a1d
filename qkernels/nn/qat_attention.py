"""QATMultiheadAttention: attention whose projections, inputs and products are fake-quantized."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .attention import AttentionForward
from .qat import QATLinear
from .qat_layer import QATLayer, Role

SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


def projection_weights(layer: nn.Module) -> tuple[str, ...]:
    """The names of the parameters that project query, key and value; one name: it holds all three."""
    return ("in_proj_weight",) if layer._qkv_same_embed_dim else SEPARATE


class QATMultiheadAttention(QATLayer, AttentionForward, nn.MultiheadAttention):
    """nn.MultiheadAttention with fake quantization (see ``QATLayer``), in training and in eval mode alike.

    Softmax and products are computed in float, by ``F.scaled_dot_product_attention`` unless the weights are wanted. The
    roles beside the weights of the projections are

    - "input": the query, and key and value too where there is no quantizer for "memory". A tensor that serves as
      several of them is quantized once.
    - "memory": key and value of an attention whose query is another tensor. ``prepare`` gives it the spec of "input"
      where the layer is known to be such a one: in nn.TransformerDecoderLayer, and if kdim or vdim differ from
      embed_dim. Elsewhere a rule has to ask for it: the scale of a quantizer that nothing calls gets no gradient,
      which DistributedDataParallel takes for an error.
    - "query", "key", "value": what goes into the products, so also what a cache of keys and values would hold; of kind
      "attention", which a rule has to ask for.
    - "output": the result.

    ``out_proj`` is a layer of its own, which the forward calls.
    """

    float_class = nn.MultiheadAttention

    @classmethod
    def roles(cls, layer: nn.Module) -> dict[str, Role]:
        return {
            **{name: Role("weight", name) for name in projection_weights(layer)},
            "input": Role("input", per_token=True),
            "memory": Role("memory", per_token=True, like="input"),
            **{name: Role("attention", per_token=True) for name in ("query", "key", "value")},
            "output": Role("output", per_token=True),
        }

    def is_float(self) -> bool:
        return super().is_float() and not (isinstance(self.out_proj, QATLayer) and not self.out_proj.is_float())

    def projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        memory = "input" if self.quantizer_of("memory") is None else "memory"
        x = self.passed("input", query)
        y = x if key is query else self.passed(memory, key)
        z = x if value is query else y if value is key else self.passed(memory, value)
        weights = [self.passed(name, getattr(self, name)) for name in projection_weights(self)]
        if len(weights) == 1 and x is y and y is z:
            q, k, v = F.linear(x, weights[0], self.in_proj_bias).chunk(3, -1)
            return q, k, v
        if len(weights) == 1:
            weights = list(weights[0].chunk(3))
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = (F.linear(t, w, b) for t, w, b in zip((x, y, z), weights, biases, strict=True))
        return q, k, v


class QATOutProjection(QATLinear):
    """The ``out_proj`` of an attention: a QATLinear for the class of Linear that torch has there."""

    float_class = NonDynamicallyQuantizableLinear
