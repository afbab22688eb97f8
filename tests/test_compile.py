"""What the kernels' compiler reads from machine code."""

from __future__ import annotations

from heat_fast.kernels.compile import loop_lengths

LISTING = """
        /*0100*/              @!P2 LDG.E R4, desc[UR6][R12.64] ;   /* 0x000000060c04a981 */
        /*0200*/              @P0 BRA 0x100 ;                      /* 0xfffffffc00000947 */
        /*0210*/              BRA.U UP0, 0x00000110 ;              /* 0xfffffffc00000947 */
        /*0220*/              @P1 BRA 0x210 ;                      /* 0xfffffffc00000947 */
        /*0230*/              @P1 BRA 0x400 ;                      /* 0xfffffffc00000947 */
        /*0400*/              EXIT ;                               /* 0x000000000000794d */
        /*0500*/              BRA 0x100 ;                          /* 0xfffffffc00000947 */
        /*12340*/             BRA 0x12340;                         /* 0xfffffffc00000947 */
"""


def test_loops_are_the_stretches_that_a_branch_jumps_back_over() -> None:
    """Not a wait of two instructions, a jump ahead, or what lies behind the end."""
    assert loop_lengths(LISTING) == (17, 17)
