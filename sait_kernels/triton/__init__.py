"""Triton kernels, one file per op: functions that take what the op of the same name in ``csrc/ops`` takes, checked.

Names in kernels: ``p_`` a pointer, ``s_`` a stride in elements, ``b_`` a block that is loaded, ``o_`` offsets, ``m_`` a
mask. Whatever is loaded is made float32 before any arithmetic, because the interpreter computes bfloat16 wrongly; rows
are addressed in int64; lengths and counts are not specialised on, so a new token count compiles nothing.
"""
