"""Layers: the factorized forms, one class for each type of dense layer."""

from __future__ import annotations

from lr_callback.layers.base import FactorizedLayer as FactorizedLayer
from lr_callback.layers.base import any_weight as any_weight
from lr_callback.layers.base import dense_bias as dense_bias
from lr_callback.layers.base import weight_of as weight_of
from lr_callback.layers.convolution import CHANNELS_LAST as CHANNELS_LAST
from lr_callback.layers.convolution import FactorizedConv1d as FactorizedConv1d
from lr_callback.layers.convolution import FactorizedConv2d as FactorizedConv2d
from lr_callback.layers.convolution import FactorizedConv3d as FactorizedConv3d
from lr_callback.layers.convolution import FactorizedConvTranspose1d as FactorizedConvTranspose1d
from lr_callback.layers.convolution import FactorizedConvTranspose2d as FactorizedConvTranspose2d
from lr_callback.layers.convolution import FactorizedConvTranspose3d as FactorizedConvTranspose3d
from lr_callback.layers.convolution import channels_last as channels_last
from lr_callback.layers.embedding import FactorizedEmbedding as FactorizedEmbedding
from lr_callback.layers.linear import FactorizedConv1D as FactorizedConv1D
from lr_callback.layers.linear import FactorizedLinear as FactorizedLinear
from lr_callback.layers.linear import SlicedLinear as SlicedLinear
