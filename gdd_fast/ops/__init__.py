"""The operators, one module each: `from gdd_fast.ops.residual import residual`.

Every module holds the definition in plain PyTorch (`<op>_ref`), the public function (`<op>`), the schema with its fake
implementation, and `OPERATOR`, which names its fused implementations. `to_uint8` has only its definition.
"""
