"""Costs read off compiled programs, against what the formulas of the operations say."""

import jax
import jax.numpy as jnp
import pytest

from distill import hlo, partitioning

F32 = jnp.float32


def compiled(fn, *shapes, **kwargs):
    arguments = [jax.ShapeDtypeStruct(s, F32) if isinstance(s, tuple) else s for s in shapes]
    return jax.jit(fn, **kwargs).lower(*arguments).compile()


def test_a_product():
    cost = hlo.cost(compiled(jnp.matmul, (64, 32), (32, 48)).as_text())
    assert cost.flops == 2 * 64 * 32 * 48
    assert cost.bytes == 4 * (64 * 32 + 32 * 48 + 64 * 48)
    assert cost.sent == 0


def test_what_is_in_a_loop_counts_every_round():
    def fn(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    program = compiled(fn, (64, 32), (24, 32, 32))
    cost = hlo.cost(program.as_text())
    assert cost.flops == 24 * 2 * 64 * 32 * 32
    assert not cost.unknown_loops
    # Which XLA's own analysis does not do.
    assert program.cost_analysis()["flops"] < cost.flops / 4


def test_loops_in_loops_and_gradients():
    def layers(x, w):
        return jnp.sum(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0])

    def fn(x, w):
        def part(total, x):
            return total + jax.grad(layers, argnums=1)(x, w), None

        return jax.lax.scan(part, jnp.zeros_like(w), x)[0]

    cost = hlo.cost(compiled(fn, (3, 64, 32), (5, 32, 32)).as_text())
    one = 2 * 64 * 32 * 32
    # Forward and gradient of the weights in each of 5 layers; of the inputs, too, perhaps in all.
    assert 3 * (5 + 5 + 4) * one <= cost.flops <= 3 * (5 + 5 + 5) * one


def test_a_loop_that_ends_when_it_likes_is_said_to():
    def fn(x):
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 100, lambda x: x @ x, x)

    text = compiled(fn, (16, 16)).as_text()
    assert hlo.cost(text).unknown_loops == 1
    one = 2 * 16**3
    assert hlo.cost(text).flops == one and hlo.cost(text, unknown_rounds=7).flops == 7 * one


def test_slices_of_a_stack_are_not_the_stack():
    def fn(stack, x):
        return jax.lax.scan(lambda x, w: (x * w, None), x, stack)[0]

    cost = hlo.cost(compiled(fn, (100, 1024), (1024,)).as_text())
    assert cost.bytes < 100 * 1024 * 4 * 8  # and not 100 times the stack


def test_talk_between_devices():
    mesh = partitioning.make_mesh(partitioning.MeshConfig(data=1, fsdp=8))

    def sharding(*axes):
        return jax.NamedSharding(mesh, jax.P(*axes))

    x = jax.ShapeDtypeStruct((64, 8 * 32), F32, sharding=sharding(None, "fsdp"))
    w = jax.ShapeDtypeStruct((8 * 32, 40), F32, sharding=sharding("fsdp", None))
    program = jax.jit(jnp.matmul, out_shardings=sharding()).lower(x, w).compile()
    cost = hlo.cost(program.as_text())
    assert {kind: c.bytes for kind, c in cost.collectives.items()} == {
        "all-reduce": pytest.approx(2 * 7 / 8 * 64 * 40 * 4)
    }
    assert cost.flops == 2 * 64 * 32 * 40  # of one device


@pytest.mark.parametrize(
    "call, kind, sent",
    [
        ("f32[16,40] reduce-scatter(%a), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}",
         "reduce-scatter", 3 / 4 * 64 * 40 * 4),
        ("f32[256,40] all-gather(%a), replica_groups=mesh['x'=2,'y'=4] {'y'}, dimensions={0}",
         "all-gather", 3 / 4 * 256 * 40 * 4),
        ("(f32[64,40], f32[512,40]) all-gather-start(%a), replica_groups=[1,8]<=[8]",
         "all-gather", 7 / 8 * 512 * 40 * 4),
        ("(f32[64,40], f32[64,40], u32[]) collective-permute-start(%a), source_target_pairs={}",
         "collective-permute", 64 * 40 * 4),
        ("f32[64,40] all-to-all(%a), replica_groups=[4,2]<=[8]", "all-to-all", 64 * 40 * 4 / 2),
    ],
)  # fmt: skip
def test_bytes_that_each_kind_sends(call, kind, sent):
    text = f"""ENTRY %main (a: f32[64,40]) -> f32[] {{
  %a = f32[64,40]{{1,0}} parameter(0)
  ROOT %out = {call}
}}
"""
    assert {k: c.bytes for k, c in hlo.cost(text).collectives.items()} == {kind: sent}


def loop(start, bound, step):
    return f"""%body (p: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {{
  %p = (s32[], f32[8,8]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8,8] get-tuple-element(%p), index=1
  %s = s32[] constant({step})
  %next = s32[] add(%i, %s)
  %y = f32[8,8] dot(%x, %x), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
  ROOT %t = (s32[], f32[8,8]) tuple(%next, %y)
}}

%cond (p: (s32[], f32[8,8])) -> pred[] {{
  %p = (s32[], f32[8,8]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] constant({bound})
  ROOT %c = pred[] compare(%i, %n), direction=LT
}}

ENTRY %main (a: s32[], b: f32[8,8]) -> f32[8,8] {{
  %a = s32[] parameter(0)
  %b = f32[8,8] parameter(1)
  %zero = s32[] {start}
  %init = (s32[], f32[8,8]) tuple(%zero, %b)
  %w = (s32[], f32[8,8]) while(%init), condition=%cond, body=%body
  ROOT %r = f32[8,8] get-tuple-element(%w), index=1
}}
"""


def test_rounds_that_no_note_tells_are_read_off_the_loop():
    """As a TPU's windowed products are written."""
    one = 2 * 8**3
    assert hlo.cost(loop("constant(0)", 8, 2)).flops == 4 * one
    assert hlo.cost(loop("constant(3)", 8, 1)).flops == 5 * one
    # jax 0.12 names an element of a tuple by its number, without an instruction.
    newer = loop("constant(0)", 8, 2).replace("compare(%i,", "compare(%p#0,")
    assert hlo.cost(newer.replace("add(%i,", "add(%p#0,")).flops == 4 * one
    unknown = hlo.cost(loop("copy(%a)", 8, 2))
    assert unknown.flops == one and unknown.unknown_loops == 1


def test_products_of_a_tpu_are_convolutions():
    """A batch axis is a window that is padded all round, of which only the inside counts."""
    text = """HloModule m

ENTRY %main (a: f32[16,32,1], b: f32[1024,512,32]) -> f32[16,1024,512] {
  %a = f32[16,32,1]{1,0,2:T(8,128)} parameter(0)
  %b = f32[1024,512,32]{2,1,0:T(8,128)S(1)} parameter(1)
  ROOT %d = f32[16,1024,512]{2,0,1:T(8,128)} convolution(%a, %b), window={size=1024 pad=1023_1023 rhs_reversal=1}, dim_labels=bf0_0oi->b0f
}
"""  # noqa: E501
    cost = hlo.cost(text)
    assert cost.flops == 2 * 16 * 1024 * 512 * 32
    # What lies on the chip costs no traffic.
    assert cost.bytes == 4 * (16 * 32 + 16 * 1024 * 512)


def test_other_text_is_an_error():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.cost("HloModule nothing")
