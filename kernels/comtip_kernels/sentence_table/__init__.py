"""Products of spots with the sentence table in which each spot selects one level per gene, without a (B, G, D) tensor.

    sampled_dot             out[b, g]     = <vector[b], table[g, level[b, g]]>                  (an SDDMM)
    weighted_sum            out[b]        = sum_g weight[b, g] table[g, level[b, g]]            (an SpMM)
    weighted_sum_transpose  out[g, q]     = sum_b weight[b, g] [level[b, g] = q] vector[b]      (its transpose)

The gradients of each product are the other two, so pooling and the pair head need no other kernels (``triton_op.py``). L_level
uses the kernel of ``sampled_dot`` for the loss, and ``level_gradient`` for the derivatives of the scores.
"""
