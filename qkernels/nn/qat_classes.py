"""Which QAT layer stands for which layer of torch."""

from __future__ import annotations

from torch import nn

from .functional import QAT_FUNCTIONS
from .qat import QATBilinear, QATConv1d, QATConv2d, QATConv3d, QATLinear
from .qat_attention import QATMultiheadAttention, QATOutProjection
from .qat_cells import QATGRUCell, QATLSTMCell, QATRNNCell
from .qat_conv_transpose import QATConvTranspose1d, QATConvTranspose2d, QATConvTranspose3d
from .qat_embedding import QATEmbedding, QATEmbeddingBag
from .qat_layer import QATLayer
from .qat_lazy import LAZY_CLASSES
from .qat_recurrent import QATGRU, QATLSTM, QATRNN

# The first whose float class a layer derives from stands for it.
QAT_CLASSES: tuple[type[QATLayer], ...] = (
    QATOutProjection,
    QATLinear,
    QATConv1d,
    QATConv2d,
    QATConv3d,
    QATLSTM,
    QATGRU,
    QATRNN,
    QATLSTMCell,
    QATGRUCell,
    QATRNNCell,
    QATMultiheadAttention,
    *QAT_FUNCTIONS,
    QATBilinear,
    QATConvTranspose1d,
    QATConvTranspose2d,
    QATConvTranspose3d,
    QATEmbedding,
    QATEmbeddingBag,
)
QUANTIZABLE = tuple(kind.float_class for kind in QAT_CLASSES)


def qat_class_of(module: nn.Module) -> type[QATLayer] | None:
    """The QAT layer for a module; None: there is none for its class."""
    lazy = LAZY_CLASSES.get(type(module))
    return lazy or next((kind for kind in QAT_CLASSES if isinstance(module, kind.float_class)), None)
