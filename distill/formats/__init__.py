"""Checkpoint files of other projects: what lies in them, by the names that they use themselves.

`t5x` and `hugging_face` each open a folder and tell its arrays as `tensors.Tensor`s, which are read
when somebody asks, whole or in part; and each writes such a folder. Whose name is whose is
`distill.convert`'s business.
"""
