"""ONNX models: read into the neutral graph, folded by the same rules, written back. No torch anywhere.

`program` reads a model with its constants and shapes, `read`, `operators` and `moves` give the neutral graph, `write`,
`assembly` and `edits` put the result into a copy of the model. `fold` is that way.
"""
