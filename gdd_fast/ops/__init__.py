"""The operators, one module each: `from gdd_fast.ops.to_uint8 import to_uint8`.

Every module holds the definition in plain PyTorch (`<op>_ref`), the public function (`<op>`), the schema with its fake
implementation, and `OPERATOR`, which names the fused implementations there are.
"""
