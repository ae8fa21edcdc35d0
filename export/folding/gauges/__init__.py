"""How every tensor of a network is stored: the scale and shift per channel that let its norms disappear.

A tensor may be stored differently from its true value, per channel: true = S * stored + T. Linear operations take any
such gauge into their constants, others let some of it pass, and a per-channel affine is gone as soon as
S_out = a S_in and T_out = a T_in + c. Folding a whole network is choosing S and T.

`constraints` walks the graph and says what each operation demands, `scales` and `shifts` keep the demands consistent,
`solve` drops one affine after the other as long as they stay so, `apply` writes the result into the constants.
"""
