"""Products of spots with the sentence table in which each spot picks one level per gene: no (B, G, D) tensor anywhere.

    take     out[b, g]     = <c[b], table[g, level[b, g]]>
    spread   out[b]        = sum_g w[b, g] table[g, level[b, g]]
    collect  out[g, q]     = sum_b w[b, g] [level[b, g] = q] c[b]

Each is the gradient of another, so pooling, the pair head and L_level are made of these three (``op.py``).
"""
