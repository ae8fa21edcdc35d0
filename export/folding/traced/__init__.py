"""Traced networks: from torch.export to a program in float64, and that program as the neutral graph and back.

A network's way: `examples` and `tracing` export it, `lift` and `functionalise` make it a `Program`, `bake` computes
what depends on constants alone, `read` and `moves` give the neutral graph, `write` takes the edits back, `module` is
what comes out. `apply` is that way in fifty lines.
"""
