"""The texts of the table of layers; ``generate_layer_table.py`` makes the table, and a test checks it.

``exact``: the rows rebuild the gradient, and there is a case in which the curvature equals the dense Fisher matrix.
``approximate``: a rougher curvature. ``plain``: no curvature; the gradient stays unchanged.
"""

from __future__ import annotations

from typing import NamedTuple


class Case(NamedTuple):
    """A line of the table: options or uses of a layer, with the treatment."""

    options: str
    verdict: str
    how: str
    tests: tuple[str, ...]


def _in(file: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{file}::test_{name}" for name in names)


_DIAGONAL_SIDE = Case(
    "a factor larger than `max_factor_dim`",
    "approximate",
    "the diagonal of that factor",
    _in("curvature/test_large_layers.py", "a_factor_above_the_bound_is_the_diagonal_of_the_dense_one"),
)

_CANCELLING = Case(
    '`weight_sharing="reduce"` where inputs or derivatives cancel over the positions of an example',
    "exact",
    'as with `"expand"`: one line of the log and the coverage state it',
    _in("layers/test_reduction.py", "a_layer_whose_derivatives_cancel_over_positions_has_the_factors_of_expand"),
)

_COST_RULE = Case(
    "`groups`, and kernels of more than some 180 numbers a group (depthwise 15 x 15 and larger)",
    "approximate",
    "the diagonal of A, where dense factors would cost more than 64 times the layer's own forward and backward",
    _in("curvature/test_cost_rule.py", "a_large_depthwise_kernel_has_the_diagonal_of_its_dense_factor"),
)

_WIDE_CONV = Case(
    "very many inputs for each of few outputs (512 channels, 4 x 4, to 1)",
    "approximate",
    "the diagonal of A, where a dense factor would cost more than 16 times the layer's own forward and backward of a "
    "usual batch",
    _in("curvature/test_blocks.py", "a_wide_convolution_has_the_diagonal_instead"),
)

_BLOCKS = Case(
    "very many inputs and few outputs, or few and very many (9,216 to 128)",
    "approximate",
    "the larger factor in equal diagonal blocks, where a whole one would cost more than 16 times the layer's own "
    "forward and backward of 128 rows",
    _in(
        "curvature/test_blocks.py",
        "the_factors_are_blocks_of_the_whole_one_and_the_other_side_s_own",
        "the_step_is_the_dense_solve_of_each_block",
    ),
)

_CONV, _NORM, _LINEAR = "layers/test_conv.py", "layers/test_norm.py", "layers/test_linear.py"
_ATTENTION, _EMBEDDING = "layers/test_attention.py", "layers/test_embedding.py"
_RECURRENT, _PARAMETER, _SHARING = "layers/test_recurrent.py", "layers/test_parameter.py", "curvature/test_sharing.py"
_SCALE_LAW = "every_group_before_linear_maps_per_location_has_the_dense_fisher_of_squared_error"
_REDUCE_LAW = "every_group_before_a_sum_over_space_has_the_dense_fisher_of_squared_error_with_reduce"
_NORM_LAWS = ("rows_of_a_norm_layer_rebuild_its_gradient", "each_unit_s_block_is_that_of_the_dense_fisher")

#: By the name of the adapter's class.
CASES: dict[str, list[Case]] = {
    "ConvAdapter": [
        Case(
            "any stride, dilation, padding (`'same'`, `'valid'`) and `padding_mode`; batched or not",
            "exact",
            "a row for each output location; equals the Fisher block before linear maps per location with squared "
            "error, and for one example that the kernel covers; in general by the paper's theorem 1",
            _in(
                _CONV,
                "rows_of_a_convolution_rebuild_its_gradient_with_every_option",
                _SCALE_LAW,
                "every_group_of_a_kernel_as_large_as_its_input_has_the_dense_fisher_of_cross_entropy",
            ),
        ),
        Case(
            "`groups`, depthwise",
            "exact",
            "a pair of factors for each group, all in one batched tensor; groups are independent, as layers are",
            _in(
                _CONV,
                _SCALE_LAW,
                "the_update_of_each_group_is_that_of_its_own_dense_solve",
                "a_depthwise_convolution_has_one_batched_pair_of_factors",
            ),
        ),
        Case(
            '`weight_sharing="reduce"`',
            "exact",
            "a row for each example, the mean of its patches; equals the Fisher block before a sum over space with "
            "squared error",
            _in(_CONV, _REDUCE_LAW),
        ),
        Case(
            "frozen weight or bias",
            "exact",
            "the other one's rows",
            _in(_CONV, "a_frozen_weight_or_bias_leaves_the_other_s_rows"),
        ),
        _CANCELLING,
        _DIAGONAL_SIDE,
        _COST_RULE,
        _WIDE_CONV,
    ],
    "ConvTransposeAdapter": [
        Case(
            "any stride, dilation, padding, `output_padding` and `output_size`; batched or not",
            "exact",
            "a row for each output location: the patch of the input, zeros between its pixels, that the flipped "
            "kernel meets; exact where a convolution is",
            _in(
                _CONV,
                "rows_of_a_transposed_convolution_rebuild_its_gradient_with_every_option",
                "rows_of_a_transposed_convolution_follow_the_output_size_requested",
                _SCALE_LAW,
                "a_transposed_convolution_to_one_location_has_the_dense_fisher_of_cross_entropy",
            ),
        ),
        Case(
            "`groups`",
            "exact",
            "a pair of factors for each group",
            _in(_CONV, "the_update_of_each_group_is_that_of_its_own_dense_solve"),
        ),
        Case(
            '`weight_sharing="reduce"`; frozen weight or bias',
            "exact",
            "as a convolution",
            _in(_CONV, _REDUCE_LAW, "a_frozen_weight_or_bias_leaves_the_other_s_rows"),
        ),
    ],
    "LayerNormAdapter": [
        Case(
            "any `normalized_shape`, with or without bias, any leading dimensions",
            "exact",
            "scale and shift of each unit: a 2 x 2 block of the Fisher, 1 x 1 for one of both, from the gradients of "
            "single examples",
            _in(
                _NORM,
                *_NORM_LAWS,
                "the_update_of_each_unit_solves_its_damped_block",
                "positions_of_one_example_add_up_wherever_the_batch_axis_is",
            ),
        ),
    ],
    "RMSNormAdapter": [
        Case("any `normalized_shape` and `eps`", "exact", "a 1 x 1 block for each scale", _in(_NORM, *_NORM_LAWS)),
    ],
    "LanguageModelNormAdapter": [
        Case(
            "as built by the model's configuration",
            "exact",
            "a 1 x 1 block for each scale",
            _in(_NORM, "each_unit_of_a_language_model_s_norm_has_the_dense_fisher"),
        ),
    ],
    "GroupNormAdapter": [
        Case("any number of groups", "exact", "a 2 x 2 block for each channel", _in(_NORM, *_NORM_LAWS)),
    ],
    "InstanceNormAdapter": [
        Case(
            "`affine=True`, with or without running averages; batched or not",
            "exact",
            "a 2 x 2 block for each channel",
            _in(_NORM, *_NORM_LAWS, "what_changes_between_forward_and_backward_does_not_change_the_block"),
        ),
    ],
    "BatchNormAdapter": [
        Case(
            "training and evaluation mode",
            "exact",
            "a 2 x 2 block for each channel; the layer's own coupling of examples lies below the derivative at its "
            "output, and changes nothing",
            _in(_NORM, *_NORM_LAWS, "what_changes_between_forward_and_backward_does_not_change_the_block"),
        ),
        Case(
            "below another batch norm in training mode",
            "approximate",
            "the products between examples, which the other one couples, are left out",
            _in(_NORM, "a_batch_norm_above_another_leaves_out_the_products_between_examples"),
        ),
    ],
    "SyncBatchNormAdapter": [
        Case(
            "any number of ranks",
            "exact",
            "as batch norm, normalised by the moments of all ranks",
            _in(_NORM, _NORM_LAWS[0], "a_synchronised_batch_norm_is_normalised_by_the_moments_of_all_ranks"),
        ),
    ],
    "PReLUAdapter": [
        Case("one slope, or one a channel", "exact", "a 1 x 1 block for each slope", _in(_NORM, *_NORM_LAWS)),
    ],
    "LinearAdapter": [
        Case(
            "any leading dimensions, in either batch order",
            "exact",
            "a row for each input vector; equals the Fisher block for one row, and in a linear net with squared error",
            _in("factors/test_geometry.py", "rows_of_a_linear_rebuild_its_gradient_on_any_leading_dimensions")
            + _in(
                "engine/test_scale.py",
                "one_example_is_exact_whatever_the_widths_and_the_factor_on_the_loss",
                "a_linear_net_on_sequences_with_squared_error_is_exact_wherever_the_batch_axis_is",
            ),
        ),
        Case(
            '`weight_sharing="reduce"`',
            "exact",
            "a row for each example; equals the Fisher block before a sum or mean over positions with squared error",
            _in("engine/test_scale.py", "a_linear_on_sequences_then_a_mean_over_them_is_exact_with_reduce")
            + _in(_LINEAR, "a_linear_then_a_mean_or_sum_over_a_leading_sequence_is_exact_with_reduce"),
        ),
        Case(
            "called several times in a forward",
            "exact",
            "the rows of all calls together",
            _in("factors/test_geometry.py", "rows_of_all_calls_of_a_module_together_rebuild_its_gradient"),
        ),
        Case(
            "in a low-rank adapter (LoRA)",
            "exact",
            "the two small factors, each a Linear; the frozen weight has none",
            _in(_LINEAR, "a_low_rank_adapted_linear_trains_only_its_two_factors"),
        ),
        _DIAGONAL_SIDE,
        _BLOCKS,
    ],
    "TransposedLinearAdapter": [
        Case(
            "any leading dimensions",
            "exact",
            "as Linear",
            _in(
                _LINEAR,
                "rows_of_a_transposed_linear_rebuild_its_gradient",
                "a_transposed_linear_gets_the_transpose_of_the_linear_s_update",
            ),
        ),
    ],
    "BilinearAdapter": [
        Case(
            "up to 4,096 pairs of input features",
            "exact",
            "a Linear on the products of all pairs",
            _in(_LINEAR, "rows_of_a_bilinear_rebuild_its_gradient", "a_bilinear_with_squared_error_is_exact"),
        ),
        Case(
            "more pairs",
            "approximate",
            "diagonal: A would be too large",
            _in(_LINEAR, "a_bilinear_of_very_many_pairs_is_listed"),
        ),
    ],
    "ProjectionAdapter": [
        Case(
            "any options, masks and batch order; steps with statistics avoid its fast path",
            "exact",
            "query, key, value and output projections, each a Linear",
            _in(
                _ATTENTION,
                "rows_of_every_projection_rebuild_its_gradient",
                "factors_equal_the_dense_fisher_where_a_projection_has_one_row",
                "a_due_step_changes_neither_outputs_nor_random_numbers",
            ),
        ),
        Case(
            '`weight_sharing="reduce"`',
            "exact",
            'as with `"expand"`: a softmax takes out what all keys share, so that their reduced factor would be zero',
            _in(_ATTENTION, "projections_are_shared_by_expand_whatever_the_setting_is"),
        ),
        Case(
            "`add_bias_kv`; re-parametrised, or a subclass with another forward",
            "approximate",
            "diagonal, for those parameters",
            _in(
                _ATTENTION,
                "key_and_value_biases_get_a_diagonal_curvature_beside_the_projections",
                "a_re_parametrised_projection_is_listed_and_training_goes_on",
                "a_subclass_that_calls_its_output_projection_is_listed_not_crashed",
            ),
        ),
    ],
    "EmbeddingAdapter": [
        Case(
            "`padding_idx`; dense or sparse gradients",
            "exact",
            'one-hot rows: A is the diagonal of the tokens\' frequencies; each position is a row, with `"reduce"` too',
            _in(
                _EMBEDDING,
                "rows_of_an_embedding_rebuild_its_gradient",
                "input_factor_of_an_embedding_is_the_frequency_of_each_token_that_is_not_padding",
                "a_linear_net_on_tokens_with_squared_error_is_exact_for_any_number_of_examples",
                "a_sparse_gradient_stays_sparse_and_gets_the_update_of_the_dense_one",
            ),
        ),
        Case(
            "tied to a head; `scale_grad_by_freq`",
            "approximate",
            "diagonal",
            _in(
                _EMBEDDING,
                "a_tied_sparse_embedding_gets_a_diagonal_curvature_and_trains",
                "gradients_rescaled_by_token_frequency_are_listed",
            ),
        ),
    ],
    "EmbeddingBagAdapter": [
        Case(
            'modes `"sum"` and `"mean"`, offsets, `per_sample_weights`',
            "approximate",
            "the diagonal of A; exact for bags of one token",
            _in(
                _EMBEDDING,
                "rows_of_an_embedding_bag_rebuild_its_gradient",
                "input_factor_of_an_embedding_bag_is_the_diagonal_of_the_exact_one",
                "one_bag_of_one_token_is_exact_and_a_maximum_is_listed",
            ),
        ),
        Case(
            'mode `"max"`',
            "approximate",
            "diagonal: each feature comes from another token",
            _in(_EMBEDDING, "one_bag_of_one_token_is_exact_and_a_maximum_is_listed"),
        ),
    ],
    "GateAdapter": [
        Case(
            "any options, packed or padded sequences; cells called in a loop",
            "exact",
            "the products of all gates with the input, and with the state, each a Linear with a row for each step",
            _in(
                _RECURRENT,
                "rows_of_every_product_rebuild_its_gradient",
                "rows_of_a_cell_called_in_a_loop_rebuild_its_gradient",
                "one_step_of_one_example_is_exact",
                "the_recurrence_of_a_due_step_agrees_with_the_fused_one_and_draws_the_same_random_numbers",
            ),
        ),
        Case(
            "re-parametrised weights",
            "approximate",
            "diagonal",
            _in(_RECURRENT, "a_re_parametrised_recurrent_weight_is_listed"),
        ),
    ],
    "ParameterAdapter": [
        Case(
            "raw parameters: gates, position embeddings; layers without an adapter",
            "approximate",
            "diagonal, from the derivative of one sample of all targets; the tensor's mean counts as one sample more",
            _in(
                _PARAMETER,
                "the_diagonal_is_that_of_the_dense_fisher_on_average_over_samples",
                "the_tensor_s_mean_counts_as_one_sample_more",
            ),
        ),
        Case(
            "tied between modules of different kinds; re-parametrised (`weight_norm`, `spectral_norm`, `parametrize`)",
            "approximate",
            "diagonal, as above",
            _in(
                _SHARING,
                "a_tied_embedding_and_head_have_the_exact_diagonal_of_both_uses",
                "a_re_parametrised_weight_is_listed_with_the_exact_diagonal_and_trains",
            ),
        ),
        Case(
            "complex",
            "plain",
            "its own gradient: all factors are real",
            _in("curvature/test_complex.py", "a_complex_parameter_trains_as_its_real_twin_whose_gradient_is_plain"),
        ),
        Case(
            "in `exclude`, or not in `include`",
            "plain",
            "as configured",
            _in("curvature/test_coverage.py", "every_row_names_its_kind_treatment_and_factor_shapes"),
        ),
    ],
}
