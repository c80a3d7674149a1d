"""Modules: fake quantization with state, QAT layers, int8 and int4 layers, and the granularities that describe them."""

from . import codebook_quantizers, learned_quantizers, rounding_quantizers  # noqa: F401  # FakeQuantize constructs them
from .fake_quantize import FakeQuantize
from .functional import (
    Add,
    Cat,
    MatMul,
    QATAdd,
    QATCat,
    QATMatMul,
    QATScaledDotProductAttention,
    ScaledDotProductAttention,
)
from .granularity import Granularity, PerChannel, PerGroup, PerTensor, PerToken
from .int4 import Int4Linear
from .int8 import Int8Conv2d, Int8Linear
from .int8_cells import Int8GRUCell, Int8LSTMCell, Int8RNNCell
from .int8_conv1d import Int8Conv1d
from .int8_conv3d import Int8Conv3d
from .int8_conv_transpose import Int8ConvTranspose1d, Int8ConvTranspose2d, Int8ConvTranspose3d
from .int8_recurrent import Int8GRU, Int8LSTM, Int8RNN
from .int8_training import Int8TrainingLinear
from .integer_attention import IntegerMultiheadAttention
from .integer_embedding import Int4Embedding, Int8Embedding, Int8EmbeddingBag
from .qat import QATBilinear, QATConv1d, QATConv2d, QATConv3d, QATLinear
from .qat_attention import QATMultiheadAttention
from .qat_cells import QATGRUCell, QATLSTMCell, QATRNNCell
from .qat_classes import QAT_CLASSES
from .qat_conv_transpose import QATConvTranspose1d, QATConvTranspose2d, QATConvTranspose3d
from .qat_embedding import QATEmbedding, QATEmbeddingBag
from .qat_layer import QATLayer
from .qat_lora import QATAdapted
from .qat_recurrent import QATGRU, QATLSTM, QATRNN
from .quantized_parameters import QATParameters

__all__ = [
    "QATGRU",
    "QATLSTM",
    "QATRNN",
    "QAT_CLASSES",
    "Add",
    "Cat",
    "FakeQuantize",
    "Granularity",
    "Int4Embedding",
    "Int4Linear",
    "Int8Conv1d",
    "Int8Conv2d",
    "Int8Conv3d",
    "Int8ConvTranspose1d",
    "Int8ConvTranspose2d",
    "Int8ConvTranspose3d",
    "Int8Embedding",
    "Int8EmbeddingBag",
    "Int8GRU",
    "Int8GRUCell",
    "Int8LSTM",
    "Int8LSTMCell",
    "Int8Linear",
    "Int8RNN",
    "Int8RNNCell",
    "Int8TrainingLinear",
    "IntegerMultiheadAttention",
    "MatMul",
    "PerChannel",
    "PerGroup",
    "PerTensor",
    "PerToken",
    "QATAdapted",
    "QATAdd",
    "QATBilinear",
    "QATCat",
    "QATConv1d",
    "QATConv2d",
    "QATConv3d",
    "QATConvTranspose1d",
    "QATConvTranspose2d",
    "QATConvTranspose3d",
    "QATEmbedding",
    "QATEmbeddingBag",
    "QATGRUCell",
    "QATLSTMCell",
    "QATLayer",
    "QATLinear",
    "QATMatMul",
    "QATMultiheadAttention",
    "QATParameters",
    "QATRNNCell",
    "QATScaledDotProductAttention",
    "ScaledDotProductAttention",
]
