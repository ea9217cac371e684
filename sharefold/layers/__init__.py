"""nn.Modules of the shared form: one bank a group, and members that refer to it."""

from sharefold.layers.bank import Bank, add_bank, bank_key, banks, is_bank_name
from sharefold.layers.basis_conv import BasisConv
from sharefold.layers.batchnorm import absorb_scale, affine, make_identity, mean_output, set_affine, shift_output, takes_scale
from sharefold.layers.codebook_conv import CodebookConv, code_dtype
from sharefold.layers.foreign import carry
from sharefold.layers.form import STOCK_LAYERS, ConvForm, form_of, matrix_of, target_weight
from sharefold.layers.grouped_conv import GroupedPointwise, plain_norm
from sharefold.layers.hybrid_conv import HybridConv
from sharefold.layers.pivots import free_columns, free_moments, with_pivots
from sharefold.layers.repeat import Again, RepeatedBlock, own_modules, repeat_blocks, resolve, shared_parameters
from sharefold.layers.shared_conv import SharedConv, any_form_of, checked_form, weight_matrix
from sharefold.layers.spatial_conv import SpatialConv
from sharefold.layers.surgery import replace_module, replace_modules, running, shared_layers, stray_pointers, to_dense
from sharefold.layers.tied_conv import TiedConv
from sharefold.layers.tucker_conv import TuckerConv

__all__ = [
    "STOCK_LAYERS", "Again", "Bank", "BasisConv", "CodebookConv", "ConvForm", "GroupedPointwise", "HybridConv", "RepeatedBlock",
    "SharedConv", "SpatialConv", "TiedConv", "TuckerConv", "absorb_scale", "add_bank", "affine", "any_form_of", "bank_key",
    "banks", "carry", "checked_form", "code_dtype", "form_of", "free_columns", "free_moments", "is_bank_name", "make_identity",
    "matrix_of", "mean_output", "own_modules", "plain_norm", "repeat_blocks", "replace_module", "replace_modules", "resolve",
    "running", "set_affine", "shared_layers", "shared_parameters", "shift_output", "stray_pointers", "takes_scale",
    "target_weight", "to_dense", "weight_matrix", "with_pivots",
]  # fmt: skip
