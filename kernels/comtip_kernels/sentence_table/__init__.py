"""Products with the sentence table (G, Q, D), which has one vector for each of G genes at each of Q levels.

Each of B spots selects one level of every gene. The products read the selected vectors directly from the table, so that no tensor
(B, G, D) of selected vectors is stored:

    sampled_dot             out[b, g]     = <vector[b], table[g, level[b, g]]>                  (an SDDMM)
    weighted_sum            out[b]        = sum_g weight[b, g] table[g, level[b, g]]            (an SpMM)
    weighted_sum_transpose  out[g, q]     = sum_b weight[b, g] [level[b, g] = q] vector[b]      (its transpose)

The gradients of each product are the other two (``triton_op.py``). Pooling of the sentences of a spot
(:mod:`comtip_kernels.table_pool`) and scores of the pair head (:func:`comtip_kernels.pair_scores`) therefore need no other kernels.
The cross-entropy over levels, L_level (:mod:`comtip_kernels.level_cross_entropy`), uses the kernel of ``sampled_dot`` for the loss,
and the kernel ``level_gradient`` for its derivatives with respect to the scores.
"""
